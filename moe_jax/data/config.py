"""Which text to train and evaluate on."""

import dataclasses
import math

from moe_jax.data.tokenizer import SMALLEST_VOCABULARY
from moe_jax.options import check_options, expected, option


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text to train and evaluate on.

  Raises:
    ValueError: a value is impossible.
  """

  dataset: str = option('sotu')
  """Name of a source in `moe_jax/data/sources.py`: 'sotu' (State of the Union
  addresses), 'python' (its standard library), 'shakespeare' or 'text_files'; or
  of a TFDS data set, such as 'lm1b', prepared as array_record. Empty for a
  model from elsewhere, of unknown text: training it needs `corpus`."""
  corpus: str = option('', change='named')
  """Prepared corpora to train on in place of `dataset`: a directory that
  `python -m moe_jax.data.prepare` made, or several with their shares of the
  rows, such as 'DIR1:0.7,gs://bucket/DIR2:0.2,sotu:0.1'. `vocabulary` follows
  from their tokenizer. Where all are embedded, as in 'sotu:1,python:1', one is
  learnt of all. A run resumes from corpora that were moved, with
  the same content and, in a mixture, weights and last parts of paths."""
  anneal_corpus: str = option('', change='named')
  """Corpora in place of `corpus`, written alike, from `anneal_from` on; those
  of both mixtures continue where they were."""
  anneal_from: int = option(0, least=0, most=2**62)
  """Tokens of training after which rows are of `anneal_corpus`: `batch_size` *
  `sequence_length` a step."""
  wait_seconds: int = option(0, least=0, most=7 * 24 * 3600, change='yes')
  """Longest wait for a prepared corpus that is not there yet, as where one
  process prepares it and others start to train; 0 refuses at once."""
  files: str = option('', change='named')
  """For 'text_files', comma-separated paths and globs of .txt (one document a
  file), .jsonl (one a line) and .gz of both. A run resumes from files that were
  moved, with the same content."""
  validation_files: str = option('', change='named')
  """The same for validation. Empty: the first distinct document of `files` and
  every 20th after it are held out. (A TFDS data set is validated on its split
  validation, else on test, else on the last 5 % of train.)"""
  text_field: str = option('text')
  """Name of the text in .jsonl lines or TFDS features."""
  vocabulary: int = option(6400, least=2, most=2**24)
  """Number of token ids; 257 or more where a tokenizer is learnt: all bytes and
  the end of a document."""
  cross_documents: bool = option(True, change='named')
  """Whether attention, in training and in evaluation, also sees the documents
  that come before in a sequence. If not, positions begin anew with each."""
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
    if self.vocabulary < SMALLEST_VOCABULARY and self.dataset:
      raise ValueError(
        f'data.vocabulary={self.vocabulary}: must be {SMALLEST_VOCABULARY} or '
        'more where a tokenizer is learnt, of every byte and the end of a '
        'document'
      )
    if self.dataset == 'text_files' and not self.files.strip(', '):
      raise ValueError(
        f'data.files={self.files}: data.dataset=text_files needs comma-'
        'separated paths or globs here'
      )
    parse_corpora('data.corpus', self.corpus)
    if self.corpus and self.maximum_documents:
      raise ValueError(
        f'data.maximum_documents={self.maximum_documents}: not with '
        'data.corpus; prepare fewer documents'
      )
    self._check_annealing()
    for name in ('files', 'validation_files'):
      value = getattr(self, name)
      if value and self.dataset != 'text_files':
        raise ValueError(
          f'data.{name}={value}: read only with data.dataset=text_files, not '
          f'with data.dataset={self.dataset}'
        )
    from moe_jax.data.sources import EVALUATION_SETS  # It imports this file.

    known = ('validation', *EVALUATION_SETS)
    for name in split_names(self.evaluation_sets):
      if name not in known:
        raise ValueError(
          f'data.evaluation_sets={name}: {expected(name, known)}'
        )

  def _check_annealing(self) -> None:
    later = parse_corpora('data.anneal_corpus', self.anneal_corpus)
    if bool(later) != bool(self.anneal_from):
      raise ValueError(
        f'data.anneal_from={self.anneal_from}: with data.anneal_corpus='
        f'{self.anneal_corpus}; set both or neither'
      )
    if later and not self.corpus:
      raise ValueError(
        f'data.anneal_corpus={self.anneal_corpus}: needs data.corpus, which it '
        'takes the place of'
      )
    if later and later == parse_corpora('data.corpus', self.corpus):
      raise ValueError(
        f'data.anneal_corpus={self.anneal_corpus}: is data.corpus itself; '
        'choose other corpora or weights'
      )

  @property
  def shares(self) -> list[tuple[str, tuple[float, float]]]:
    """What decides which row is of which corpus, wherever these are.

    The name of each, which in a mixture decides the order of its rows, and its
    weights.
    """
    several = len(self.mixture) > 1
    return [
      (last_part(name) if several else '', weights)
      for name, weights in self.mixture.items()
    ]

  @property
  def mixture(self) -> dict[str, tuple[float, float]]:
    """The corpora by name: weights in `corpus` and in `anneal_corpus`."""
    first = parse_corpora('data.corpus', self.corpus)
    later = parse_corpora('data.anneal_corpus', self.anneal_corpus)
    return {
      name: (first.get(name, 0.0), later.get(name, 0.0))
      for name in first | later
    }


def parse_corpora(option: str, corpora: str) -> dict[str, float]:
  """Returns the corpora that an option names, and their weights.

  Raises:
    ValueError: a weight is missing or no number above 0, a name comes twice, or
      there is none.
  """
  names = split_names(corpora)
  if corpora and not names:
    raise ValueError(f'{option}={corpora}: names nothing; give a directory')
  if len(names) == 1 and not _weight(names[0]):
    return {names[0]: 1.0}
  found = {}
  for part in names:
    name, weight = part.rpartition(':')[0], _weight(part)
    if not name or not weight or not 0 < float(weight) < math.inf:
      raise ValueError(
        f'{option}={part}: must be DIR:WEIGHT, a number above 0, such as '
        'DIR:0.7'
      )
    if name in found:
      raise ValueError(f'{option}={name}: named twice; add its weights up')
    found[name] = float(weight)
  return found


def last_part(corpus: str) -> str:
  """Returns the last part of a path, by which metrics name a corpus."""
  return corpus.rstrip('/').rpartition('/')[2]


def _weight(part: str) -> str:
  """Returns what stands after the last colon, if it is a number."""
  text = part.rpartition(':')[2]
  try:
    float(text)
  except ValueError:
    return ''
  return text if ':' in part else ''


def split_names(names: str) -> list[str]:
  """Returns the names in a comma-separated list."""
  return [name.strip() for name in names.split(',') if name.strip()]
