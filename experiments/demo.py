"""The demo: three trainings of a small model in a few minutes on two cores.

python -m moe_jax.main --config=experiments/demo.py:bip --workdir=runs/bip
"""

from ml_collections import ConfigDict

from moe_jax import config


def get_config(method: str = 'bip') -> ConfigDict:
  """Returns the options of the demo under one method."""
  options = config.default_config(method)
  options.steps = 120
  options.batch_size = 16
  options.sequence_length = 128
  options.learning_rate = 2e-3
  options.warmup_steps = 10
  options.eval_every = 30
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
  options.data.vocabulary = 2048
  return options
