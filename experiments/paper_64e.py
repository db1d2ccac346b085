"""MiniMind with 64 experts, 1.1 B parameters: the paper's 1.1B model.

As paper_16e.py, but for 64 experts of which each token takes 8.

  python -m moe_jax.main --config=experiments/paper_64e.py:bip --workdir=DIR
"""

from ml_collections import ConfigDict

from moe_jax import config as config_lib


def get_config(method: str = 'bip') -> ConfigDict:
  """Returns the options under one method."""
  config = config_lib.default_config(method)
  config.steps = 1000
  config.batch_size = 256
  config.accumulation = 8
  config.sequence_length = 512
  config.learning_rate = 5e-4
  config.eval_every = 100
  config.checkpoint_every = 100
  config.model.experts = 64
  config.model.experts_per_token = 8
  if method == 'quantile':  # Exact ones do not add up over microbatches.
    config.balancer.estimator = 'histogram'
  return config
