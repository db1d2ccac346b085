"""A model for pods: 256 experts, 235 B parameters, 10 B for a token.

Nobody has trained it; it is here to be planned, see launch/plan.py. Width 4096,
48 layers, 256 experts and 8 of them for a token are given. The rest: experts
of 1,536 hidden units and 32 query heads of 128 on 4 key/value heads, as in
Qwen3-235B-A22B, which is as wide; one shared expert, as in DeepSeek-V3; two
sequences of 4,096 tokens for each of 512 devices. The experts of a layer are
split over 64 devices, 4 for each. Everything is split over the other 8 as well:
no device could hold a copy of the float32 parameters and moments, 2.8 TB. Room
for 1.25 times the even share keeps buffers at a fixed, small size.

  python -m launch.plan --config=experiments/giant_256e.py:bip \\
      --topology=v5p:8x8x8
"""

from ml_collections import ConfigDict

from moe_jax import config


def get_config(method: str = 'bip') -> ConfigDict:
  """Returns the options under one method."""
  options = config.default_config(method)
  options.steps = 100_000
  options.warmup_steps = 2_000
  options.batch_size = 1024
  options.sequence_length = 4096
  options.learning_rate = 3e-4
  options.weight_decay = 0.1
  options.eval_every = 1_000
  options.checkpoint_every = 1_000
  options.experts_every = 100  # A record of all takes some 0.3 MB.
  options.capacity_factor = 1.25
  options.mesh.data = -1
  options.mesh.expert = 64
  options.mesh.fsdp = True
  options.model.update(
    layers=48,
    width=4096,
    hidden=1536,
    experts=256,
    experts_per_token=8,
    heads=32,
    kv_heads=4,
    dtype='bfloat16',
    remat=True,
  )
  options.data.vocabulary = 65_536
  return options
