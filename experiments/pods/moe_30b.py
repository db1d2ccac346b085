"""30 B parameters, 3.1 B for a token: for 32 H100 or a v5e:16x16.

Sizes are those of Qwen3-30B-A3B: 48 layers of width 2048, 128 experts of 768, 8
for a token, 32 query heads of 128 on 4; one shared expert is ours. A step has
524,288 tokens, 16,384 for each of 32 GPUs, which have 16 experts of each layer.
On a v5e:16x16 it has twice as many, 4,096 for each of 256 chips with 8 experts.
Parameters and moments are split over all devices.

  python -m launch.plan --config=experiments/pods/moe_30b.py:midpoint_t1 \\
      --topology=h100:8x4
  python -m launch.plan --config=experiments/pods/moe_30b.py:midpoint_t1 \\
      --topology=v5e:16x16 --config.mesh.expert=16 --config.batch_size=256
"""

from ml_collections import ConfigDict

from experiments.pods import pretraining


def get_config(method: str = 'midpoint_t1') -> ConfigDict:
  """Returns the options under one method."""
  options = pretraining(method, expert=8, fsdp=True)
  options.batch_size = 128
  options.model.update(
    layers=48,
    width=2048,
    hidden=768,
    experts=128,
    experts_per_token=8,
    heads=32,
    kv_heads=4,
    head_size=128,
  )
  return options
