"""The text sources by name.

To add one, write a file beside this one with a function that takes the options
of `DataConfig` and returns the corpora 'train' and 'validation', as `sotu.py`
has it, and add one line to `SOURCES`. Whatever is not named there is looked up
among the data sets of TFDS, which is imported only then: it is slow.
"""

from collections.abc import Callable

from moe_jax.data import python, shakespeare, sotu, text_files
from moe_jax.data.config import DataConfig
from moe_jax.data.documents import Corpus

SOURCES: dict[str, Callable[[DataConfig], dict[str, Corpus]]] = {
  'python': python.open_corpora,
  'shakespeare': shakespeare.open_corpora,
  'sotu': sotu.open_corpora,
  'text_files': text_files.open_corpora,
}
# Sets to evaluate on beside the source's own 'validation'. A function that
# returns a text instead of a corpus says why the set is missing.
EVALUATION_SETS: dict[str, Callable[[], Corpus | str]] = {
  'shakespeare': shakespeare.open_corpus,
}


def open_corpora(config: DataConfig) -> dict[str, Corpus]:
  """Returns the corpora 'train' and 'validation' of `config.dataset`.

  Args:
    config: names the source and has its options.

  Raises:
    ValueError, FileNotFoundError: the source or a file is missing or bad. A
      file's content is judged when its documents are read.
  """
  if config.dataset in SOURCES:
    return SOURCES[config.dataset](config)
  from moe_jax.data import catalog

  return catalog.open_corpora(config, known=list(SOURCES))
