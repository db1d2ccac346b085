"""105 B parameters, 9.4 B for a token: a model for 8 nodes of 8 H100.

Sizes are those of GLM-4.5-Air, which has 106 B: 46 layers of width 4096, 128
experts of 1408, 8 for a token, one shared. All layers are MoE layers here, with
32 query heads of 128 on 8 key/value heads in place of 96. A step has 524,288
tokens, 8,192 for each of 64 GPUs, which have 16 experts of each layer.
Parameters and moments are split over all of them.

  python -m launch.plan --config=experiments/pods/moe_106b.py:midpoint_t1 \\
      --topology=h100:8x8
"""

from ml_collections import ConfigDict

from experiments.pods import pretraining


def get_config(method: str = 'midpoint_t1') -> ConfigDict:
  """Returns the options under one method."""
  options = pretraining(method, expert=8, fsdp=True)
  options.batch_size = 128
  options.model.update(
    layers=46,
    width=4096,
    hidden=1408,
    experts=128,
    experts_per_token=8,
    heads=32,
    kv_heads=8,
  )
  return options
