"""Speeches, drama and code, a third of the rows each: do experts specialise?

python -m moe_jax.main --config=experiments/domains_16e.py:bip \\
    --workdir=runs/domains
"""

from ml_collections import ConfigDict

from experiments import mini_16e


def get_config(method: str = 'bip') -> ConfigDict:
  """Returns the options under one method."""
  options = mini_16e.get_config(method)
  options.data.corpus = 'sotu:1,shakespeare:1,python:1'
  options.data.evaluation_sets = 'validation'
  return options
