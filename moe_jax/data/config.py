"""Which text to train and evaluate on."""

import dataclasses
import difflib
from typing import ClassVar

from moe_jax.data.tokenizer import SMALLEST_VOCABULARY
from moe_jax.options import Range
from moe_jax.options import check_ranges

EVALUATION_SETS = ('validation', 'shakespeare')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What text to train and evaluate on.

  Attributes:
    dataset: 'sotu' (State of the Union addresses), 'text_files', or the name of
      a TFDS data set, such as 'lm1b', prepared as array_record.
    files: for 'text_files', comma-separated paths and globs of .txt (one
      document a file), .jsonl (one a line) and .gz of both.
    validation_files: likewise. Empty: the first distinct document of `files`
      and every 20th after it are held out. (A TFDS data set is validated on its
      split validation, else on test, else on the last 5 % of train.)
    text_field: name of the text in .jsonl lines or TFDS features.
    vocabulary: number of token ids, at least 257.
    evaluation_sets: comma-separated, of 'validation' and 'shakespeare'.
    maximum_documents: read no more than so many of the data set's documents for
      training, and as many for validation; 0 for all.
    tfds_dir: where TFDS data sets are prepared; empty for TFDS's default,
      ~/tensorflow_datasets.
    cache_dir: where prepared corpora, tokenizers and token files are kept;
      empty for $XDG_CACHE_HOME/moe_jax or ~/.cache/moe_jax.

  Raises:
    ValueError: a value is impossible.
  """

  RANGES: ClassVar[dict[str, Range]] = {
    # At least 256 bytes and the end-of-document token.
    'vocabulary': Range(SMALLEST_VOCABULARY, 2**24),
    'maximum_documents': Range(0, 2**62),
  }

  dataset: str = 'sotu'
  files: str = ''
  validation_files: str = ''
  text_field: str = 'text'
  vocabulary: int = 6400
  evaluation_sets: str = 'validation,shakespeare'
  maximum_documents: int = 0
  tfds_dir: str = ''
  cache_dir: str = ''

  def __post_init__(self):
    check_ranges(self, self.RANGES, 'data.')
    if self.dataset == 'text_files' and not self.files.strip(', '):
      raise ValueError(
        f'data.files={self.files}: data.dataset=text_files needs comma-'
        'separated paths or globs here'
      )
    for option in ('files', 'validation_files'):
      value = getattr(self, option)
      if value and self.dataset != 'text_files':
        raise ValueError(
          f'data.{option}={value}: read only with data.dataset=text_files, not '
          f'with data.dataset={self.dataset}'
        )
    for name in split_names(self.evaluation_sets):
      if name not in EVALUATION_SETS:
        close = difflib.get_close_matches(name, EVALUATION_SETS, 1, 0.0)
        raise ValueError(
          f'data.evaluation_sets={self.evaluation_sets}: unknown set {name}; '
          f'did you mean {close[0]}? There are {", ".join(EVALUATION_SETS)}'
        )


def split_names(names: str) -> list[str]:
  """Returns the names in a comma-separated list."""
  return [name.strip() for name in names.split(',') if name.strip()]
