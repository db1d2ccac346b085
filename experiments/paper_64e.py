"""MiniMind with 64 experts, 1.1 B parameters: the paper's 1.1B model.

It differs from paper_16e.py in its 64 experts, of which each token takes 8.

  python -m moe_jax.main --config=experiments/paper_64e.py:bip --workdir=DIR
"""

from ml_collections import ConfigDict

from moe_jax import config


def get_config(method: str = 'bip') -> ConfigDict:
  """Returns the options under one method."""
  options = config.default_config(method)
  options.steps = 1000
  options.batch_size = 256
  options.accumulation = 8
  options.sequence_length = 512
  options.learning_rate = 5e-4
  options.eval_every = 100
  options.checkpoint_every = 100
  options.model.experts = 64
  options.model.experts_per_token = 8
  if method == 'quantile':  # Exact quantiles do not add up over microbatches.
    options.balancer.estimator = 'histogram'
  return options
