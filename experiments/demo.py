"""The demo: three trainings of a small model in a few minutes on two cores.

python -m moe_jax.main --config=experiments/demo.py:bip --workdir=runs/bip
"""

from ml_collections import ConfigDict

from moe_jax import config as config_lib


def get_config(method: str = 'bip') -> ConfigDict:
  """Returns the options of the demo under one method."""
  config = config_lib.default_config(method)
  config.steps = 120
  config.batch_size = 16
  config.sequence_length = 128
  config.learning_rate = 2e-3
  config.warmup_steps = 10
  config.eval_every = 30
  config.eval_sequences = 128
  config.checkpoint_every = 50
  config.model.update(
    width=128,
    hidden=128,
    layers=4,
    heads=4,
    kv_heads=2,
    experts=16,
    experts_per_token=4,
  )
  config.data.vocabulary = 2048
  return config
