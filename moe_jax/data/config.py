"""Which text to train and evaluate on."""

import dataclasses

from moe_jax.data.tokenizer import SMALLEST_VOCABULARY
from moe_jax.options import check_options, expected, option

EVALUATION_SETS = ('validation', 'shakespeare')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text to train and evaluate on.

  Raises:
    ValueError: a value is impossible.
  """

  dataset: str = option('sotu')
  """Name of a source in `moe_jax/data/sources.py`, such as 'sotu' (State of the
  Union addresses) or 'text_files', or of a TFDS data set, such as 'lm1b',
  prepared as array_record."""
  files: str = option('')
  """For 'text_files', comma-separated paths and globs of .txt (one document a
  file), .jsonl (one a line) and .gz of both."""
  validation_files: str = option('')
  """The same for validation. Empty: the first distinct document of `files` and
  every 20th after it are held out. (A TFDS data set is validated on its split
  validation, else on test, else on the last 5 % of train.)"""
  text_field: str = option('text')
  """Name of the text in .jsonl lines or TFDS features."""
  vocabulary: int = option(6400, least=SMALLEST_VOCABULARY, most=2**24)
  """Number of token ids; 256 bytes and the end of a document are among them."""
  evaluation_sets: str = option('validation,shakespeare', change='named')
  """Comma-separated, of 'validation' and 'shakespeare'."""
  maximum_documents: int = option(0, least=0, most=2**62)
  """Most documents that are read of the data set for training, and as many for
  validation; 0 for all."""
  tfds_dir: str = option('', change='yes')
  """Directory of prepared TFDS data sets, which may be remote; empty for TFDS's
  default, ~/tensorflow_datasets."""
  cache_dir: str = option('', change='yes')
  """Local directory of tokenizers and token files; empty for
  $XDG_CACHE_HOME/moe_jax or ~/.cache/moe_jax."""

  def __post_init__(self):
    check_options(self, 'data.')
    if self.dataset == 'text_files' and not self.files.strip(', '):
      raise ValueError(
        f'data.files={self.files}: data.dataset=text_files needs comma-'
        'separated paths or globs here'
      )
    for name in ('files', 'validation_files'):
      value = getattr(self, name)
      if value and self.dataset != 'text_files':
        raise ValueError(
          f'data.{name}={value}: read only with data.dataset=text_files, not '
          f'with data.dataset={self.dataset}'
        )
    for name in split_names(self.evaluation_sets):
      if name not in EVALUATION_SETS:
        raise ValueError(
          f'data.evaluation_sets={name}: {expected(name, EVALUATION_SETS)}'
        )


def split_names(names: str) -> list[str]:
  """Returns the names in a comma-separated list."""
  return [name.strip() for name in names.split(',') if name.strip()]
