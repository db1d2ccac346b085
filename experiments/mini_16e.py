"""16 experts, 4 a token: a million tokens of SOTU on two cores in minutes.

python -m moe_jax.main --config=experiments/mini_16e.py:bip --workdir=runs/mini
"""

from ml_collections import ConfigDict

from moe_jax import config


def get_config(method: str = 'bip') -> ConfigDict:
  """Returns the options under one method."""
  options = config.default_config(method)
  options.steps = 250
  options.batch_size = 32
  options.sequence_length = 128
  options.learning_rate = 2e-3
  options.warmup_steps = 20
  options.eval_every = 25
  options.eval_sequences = 128
  options.checkpoint_every = 50
  options.model.update(
    width=128,
    hidden=128,
    layers=4,
    heads=4,
    kv_heads=2,
    experts=16,
    experts_per_token=4,
  )
  return options
