"""Python's own standard library: code that every machine has, some 12 MB.

It is read as text and known by its content, which differs from one version of
Python to the next. Tests are left out. Every twentieth file is held out.
"""

import pathlib
import sysconfig

from moe_jax.data import documents
from moe_jax.data.config import DataConfig

_LEFT_OUT = {'site-packages', 'test', 'tests', 'idle_test', '__pycache__'}
_HELD_OUT = 20


def open_corpora(config: DataConfig) -> dict[str, documents.Corpus]:
  """Returns the corpora 'train' and 'validation'."""
  del config  # There is nothing to choose.
  folder = pathlib.Path(sysconfig.get_paths()['stdlib'])
  paths = [
    path
    for path in sorted(folder.rglob('*.py'))
    if not _LEFT_OUT & set(path.relative_to(folder).parts)
    and path.stat().st_size
  ]
  held_out = paths[::_HELD_OUT]
  train = [path for path in paths if path not in set(held_out)]
  return {
    split: documents.Files('data.dataset=python', found).corpus('python')
    for split, found in (('train', train), ('validation', held_out))
  }
