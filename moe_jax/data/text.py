"""From the options to tokens: reads, tokenizes and caches a text.

Shape letters: N tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import itertools
import pathlib
import time
from typing import NamedTuple

import numpy as np
import tokenizers

from moe_jax.data import cache, sources
from moe_jax.data.config import DataConfig, last_part, split_names
from moe_jax.data.documents import Corpus
from moe_jax.data.mixtures import Source, Tokens
from moe_jax.data.prepared import Prepared
from moe_jax.data.tokenizer import Tokenizer, load_tokenizer, load_tokens

_FORMAT = 1  # Part of every key: raise it when tokens are made differently.
_SECONDS_BETWEEN_REPORTS = 5.0


class TextData(NamedTuple):
  """Tokenized text. Token arrays are memory-mapped, uint16 or uint32 [N].

  Each document is followed by the end-of-document token; `token_counts` tells
  how many documents and bytes there are.

  Attributes:
    tokenizer: trained on the training text alone.
    train: to give to `training_batches`; one, unless `data.corpus` has several.
    evaluation: set name -> tokens, to give to `evaluation_batches`.
    not_evaluated: name of a set that was asked for -> why it is not there.
    fingerprint: hash of training text and tokenizer; equal on all machines.
  """

  tokenizer: Tokenizer
  train: tuple[Source, ...]
  evaluation: dict[str, Tokens]
  not_evaluated: dict[str, str]
  fingerprint: str


def load_text(config: DataConfig) -> TextData:
  """Reads, tokenizes and caches the text that a config asks for.

  The first call for a text takes seconds per 10 MB; later ones only hash the
  source files and what is cached. Any number of processes may call it at once.
  Lines on stderr tell about work that was not cached.

  Args:
    config: what to read.

  Raises:
    ValueError, FileNotFoundError: bad input; the message names the option and
      the file.
  """
  if config.corpus:
    return _load_corpora(config)
  cache_dir = cache.open_cache(config.cache_dir)
  corpus = sources.open_corpora(config)
  if count := config.maximum_documents:
    corpus = {
      split: _first_documents(part, count) for split, part in corpus.items()
    }
  train = corpus['train']
  key = cache.content_key(
    _FORMAT, train.key, config.vocabulary, tokenizers.__version__
  )
  tokenizer = load_tokenizer(
    cache_dir / f'tokenizer-{key}.json',
    functools.partial(_read, train, 'read for the tokenizer'),
    config.vocabulary,
  )

  tokens = functools.partial(_tokens, cache_dir, tokenizer)
  evaluation, not_evaluated = _sets_beside(config, tokens)
  if 'validation' in split_names(config.evaluation_sets):
    own = {'validation': tokens('validation', corpus['validation'])}
    evaluation = own | evaluation
  return TextData(
    tokenizer=tokenizer,
    train=(Source('train', tokens('train', train)),),
    evaluation=evaluation,
    not_evaluated=not_evaluated,
    fingerprint=_tokens_key(train, tokenizer),
  )


def _sets_beside(
  config: DataConfig, tokens: Callable[[str, Corpus], Tokens]
) -> tuple[dict[str, Tokens], dict[str, str]]:
  """Opens the sets to evaluate on beside 'validation'.

  Returns:
    Name -> tokens, and name -> why the set is missing.
  """
  found = {
    name: sources.EVALUATION_SETS[name]()
    for name in split_names(config.evaluation_sets)
    if name != 'validation'
  }
  missing = {name: x for name, x in found.items() if isinstance(x, str)}
  return {
    name: tokens(name, corpus)
    for name, corpus in found.items()
    if name not in missing
  }, missing


def _tokens_key(part: Corpus, tokenizer: Tokenizer) -> str:
  return cache.content_key(_FORMAT, part.key, tokenizer.to_json())


def _tokens(
  cache_dir: pathlib.Path, tokenizer: Tokenizer, name: str, part: Corpus
) -> np.ndarray:
  documents = functools.partial(_read, part, f'tokenized ({name})')
  path = cache_dir / f'tokens-{_tokens_key(part, tokenizer)}.npy'
  return load_tokens(path, documents, tokenizer)


def resolve(config: DataConfig) -> DataConfig:
  """Returns the options with the vocabulary that `corpus` decides.

  Raises:
    ValueError: a model from elsewhere has fewer tokens than the corpus.
  """
  corpus = _first_prepared(config)
  if corpus is None:
    return config
  if not config.dataset:  # The model decides: it may have more rows.
    if corpus.tokenizer.vocabulary > config.vocabulary:
      raise ValueError(
        f'{corpus.where}: was prepared with a tokenizer of '
        f'{corpus.tokenizer.vocabulary} ids, but the model has '
        f'data.vocabulary={config.vocabulary}; prepare it with its own'
      )
    return config
  return dataclasses.replace(config, vocabulary=corpus.tokenizer.vocabulary)


# The manifest of a trillion tokens takes a moment to read, and never changes.
_opened = functools.lru_cache(maxsize=16)(Prepared)


def _open_prepared(config: DataConfig, name: str) -> Prepared:
  is_first = config.mixture[name][0]
  option = 'data.corpus' if is_first else 'data.anneal_corpus'
  return _opened(name, config.wait_seconds, option)


def _first_prepared(config: DataConfig) -> Prepared | None:
  """Opens the first prepared corpus, whose tokenizer is that of all."""
  for name in config.mixture:
    if name not in sources.SOURCES:
      return _open_prepared(config, name)
  return None


def _tokenizer_of(config: DataConfig, cache_dir: pathlib.Path) -> Tokenizer:
  """Returns that of the prepared corpora; else learns one of all texts."""
  corpus = _first_prepared(config)
  if corpus is not None:
    return corpus.tokenizer
  parts = [
    sources.open_corpora(DataConfig(dataset=name))['train']
    for name in sorted(config.mixture)
  ]

  def documents() -> Iterator[str]:
    for part in parts:
      yield from _read(part, 'read for the tokenizer')

  keys = [part.key for part in parts]
  key = cache.content_key(
    _FORMAT, keys, config.vocabulary, tokenizers.__version__
  )
  path = cache_dir / f'tokenizer-{key}.json'
  return load_tokenizer(path, documents, config.vocabulary)


def _load_corpora(config: DataConfig) -> TextData:
  """Opens prepared corpora, which reads no token, and embedded ones beside."""
  cache_dir = cache.open_cache(config.cache_dir)
  tokenizer = _tokenizer_of(config, cache_dir)
  tokens = functools.partial(_tokens, cache_dir, tokenizer)
  train, evaluation, not_evaluated, keys = [], {}, {}, []
  evaluates = 'validation' in split_names(config.evaluation_sets)
  for name, weights in config.mixture.items():
    label = last_part(name)
    if name in sources.SOURCES:
      corpora = sources.open_corpora(DataConfig(dataset=name))
      splits = {split: tokens(label, part) for split, part in corpora.items()}
      keys.append(_tokens_key(corpora['train'], tokenizer))
    else:
      corpus = _open_prepared(config, name)
      corpus.check_files()
      if (
        corpus.tokenizer.to_json() != tokenizer.to_json()
        or corpus.tokenizer.end_of_document != tokenizer.end_of_document
      ):
        raise ValueError(
          f'{corpus.where}: was prepared with another tokenizer than the '
          'others; prepare it with theirs'
        )
      splits = corpus.splits
      keys.append(corpus.fingerprint)
    train.append(Source(label, splits['train'], *weights))
    one = len(config.mixture) == 1
    held_out = 'validation' if one else f'validation_{label}'
    if not evaluates:
      continue
    if len(splits['validation']) < 2:
      not_evaluated[held_out] = 'no document of it was held out'
    else:
      evaluation[held_out] = splits['validation']
  labels = [source.name for source in train]
  if len(set(labels)) < len(labels):
    raise ValueError(
      f'data.corpus={config.corpus}: two directories have the same last name, '
      'by which metrics would tell them apart; rename one'
    )
  others, missing = _sets_beside(config, tokens)
  return TextData(
    tokenizer,
    tuple(train),
    evaluation | others,
    not_evaluated | missing,
    keys[0] if len(keys) == 1 else cache.content_key('mixture', keys),
  )


def _first_documents(corpus: Corpus, count: int) -> Corpus:
  return corpus._replace(
    key=cache.content_key(corpus.key, count),
    documents=lambda: itertools.islice(corpus.documents(), count),
  )


def _read(corpus: Corpus, what: str) -> Iterator[str]:
  """Yields checked documents, and logs a line every few seconds."""
  due = time.monotonic() + _SECONDS_BETWEEN_REPORTS
  size = 0
  for number, text in enumerate(corpus.documents(), 1):
    yield text
    size += len(text)
    if time.monotonic() > due:
      cache.log(f'{what}: {number} documents, {size / 1e6:.1f} M characters')
      due = time.monotonic() + _SECONDS_BETWEEN_REPORTS
  corpus.check()


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
