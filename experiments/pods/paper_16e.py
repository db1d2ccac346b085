"""MiniMind with 16 experts on a TPU slice: 16 times the paper's batch.

On v5e:16x16 a step has 2,097,152 tokens, 8,192 for a chip; each chip of a row
of 16 has one expert. With the paper's batch, 256 sequences, it fits v5e:4x4,
whose chips have as many tokens, and one expert each of all 16.

  python -m launch.plan --config=experiments/pods/paper_16e.py:midpoint_t1 \\
      --topology=v5e:16x16
  python -m launch.plan --config=experiments/pods/paper_16e.py:midpoint_t1 \\
      --topology=v5e:4x4 --config.batch_size=256
"""

from ml_collections import ConfigDict

from experiments import paper_16e
from experiments.pods import for_pod


def get_config(method: str = 'midpoint_t1') -> ConfigDict:
  """Returns the options under one method."""
  options = for_pod(paper_16e.get_config(method), expert=16)
  options.batch_size = 4096
  return options
