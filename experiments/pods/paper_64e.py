"""MiniMind with 64 experts on a TPU slice, otherwise as pods/paper_16e.py.

On v5e:16x16 a step has 2,097,152 tokens, 8,192 for a chip; each chip of a row
of 16 has 4 experts. With the paper's batch, 256 sequences, it fits v5e:4x4,
whose chips have as many tokens, and 4 experts each of all 64.

  python -m launch.plan --config=experiments/pods/paper_64e.py:midpoint_t1 \\
      --topology=v5e:16x16
  python -m launch.plan --config=experiments/pods/paper_64e.py:midpoint_t1 \\
      --topology=v5e:4x4 --config.batch_size=256
"""

from ml_collections import ConfigDict

from experiments.pods import paper_16e


def get_config(method: str = 'midpoint_t1') -> ConfigDict:
  """Returns the options under one method."""
  options = paper_16e.get_config(method)
  options.model.update(experts=64, experts_per_token=8)
  return options
