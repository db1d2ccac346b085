"""64 experts, 8 a token: fine-grained experts, a million tokens.

python -m moe_jax.main --config=experiments/mini_64e.py:bip --workdir=runs/mini
"""

from ml_collections import ConfigDict

from moe_jax import config as config_lib


def get_config(method: str = 'bip') -> ConfigDict:
  """Returns the options under one method."""
  config = config_lib.default_config(method)
  config.steps = 250
  config.batch_size = 32
  config.sequence_length = 128
  config.learning_rate = 2e-3
  config.warmup_steps = 20
  config.eval_every = 25
  config.eval_sequences = 128
  config.checkpoint_every = 50
  config.model.update(
    width=128,
    hidden=64,
    layers=4,
    heads=4,
    kv_heads=2,
    experts=64,
    experts_per_token=8,
  )
  return config
