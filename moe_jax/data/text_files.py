"""The user's own files: .txt (one document a file), .jsonl (one a line), .gz.

Without validation files, the first distinct document and every 20th after it
are held out; a copy of a document falls on the same side as the first one.
"""

from collections.abc import Iterable
from collections.abc import Iterator
import hashlib

from moe_jax.data import cache
from moe_jax.data import documents
from moe_jax.data.config import DataConfig
from moe_jax.data.corpus import Corpus

_HELD_OUT = 20  # Without validation files, one document in so many.


def open_corpora(config: DataConfig) -> dict[str, Corpus]:
  """Returns the corpora 'train' and 'validation'.

  Raises:
    ValueError, FileNotFoundError: a file is missing, cannot be read, or is
      named for both.
  """
  paths, others = (
    documents.find_files(f'data.{option}', getattr(config, option))
    for option in ('files', 'validation_files')
  )
  if both := set(paths) & set(others):
    raise ValueError(
      f'data.validation_files={min(both)}: this file is also in data.files; '
      'name it in one of them'
    )
  field = config.text_field
  train = documents.Files('data.files', paths, field)
  if not others:
    return {
      'train': _corpus(train, field, 'rest'),
      'validation': _corpus(train, field, 'held out'),
    }
  validation = documents.Files('data.validation_files', others, field)
  return {
    'train': _corpus(train, field, 'whole'),
    'validation': _corpus(validation, field, 'whole'),
  }


def _corpus(files: documents.Files, text_field: str, part: str) -> Corpus:
  def read() -> Iterator[str]:
    texts = files.documents()
    if part != 'whole':
      texts = _divide(texts, part == 'held out')
    # A second byte order mark was always dropped here; caches rest on it.
    return (text.removeprefix('\ufeff') for text in texts)

  key = cache.content_key(
    'text_files', documents.FORMAT, text_field, (part, files.contents)
  )
  return Corpus(key, read, files.check)


def _divide(texts: Iterable[str], held_out: bool) -> Iterator[str]:
  """Yields the documents that are held out, or the others."""
  numbers = {}
  for text in texts:
    digest = hashlib.sha256(text.encode()).digest()[:16]
    number = numbers.setdefault(digest, len(numbers))
    if (number % _HELD_OUT == 0) == held_out:
      yield text
  if len(numbers) < 2:
    raise ValueError(
      'data.files: holds a single document, so none can be held out; add '
      'documents or set data.validation_files'
    )
