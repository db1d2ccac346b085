"""A model for pods: 256 experts, 235 B parameters, 10 B for a token.

Nobody has trained it; it is here to be planned, see launch/plan.py. Width 4096,
48 layers, 256 experts and 8 of them for a token are given. The rest: experts
of 1,536 hidden units and 32 query heads of 128 on 4 key/value heads, as in
Qwen3-235B-A22B, which is as wide; one shared expert, as in DeepSeek-V3. A step
has 4,194,304 tokens, 8,192 for each of 512 devices. The experts of a layer are
split over 64 devices, 4 for each. Everything is split over the other 8 as well:
no device could hold a copy of the float32 parameters and moments, 2.8 TB.

  python -m launch.plan --config=experiments/giant_256e.py:midpoint_t1 \\
      --topology=v5p:8x8x8
"""

from ml_collections import ConfigDict

from experiments.pods import pretraining


def get_config(method: str = 'midpoint_t1') -> ConfigDict:
  """Returns the options under one method."""
  options = pretraining(method, expert=64, fsdp=True)
  options.batch_size = 1024
  options.model.update(
    layers=48,
    width=4096,
    hidden=1536,
    experts=256,
    experts_per_token=8,
    heads=32,
    kv_heads=4,
  )
  return options
