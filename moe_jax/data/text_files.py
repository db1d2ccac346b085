"""The user's own files: .txt (one document a file), .jsonl (one a line), .gz.

Without validation files, the first distinct document and every 20th after it
are held out; a copy of a document falls on the same side as the first one.
"""

from collections.abc import Iterable, Iterator
import hashlib

from moe_jax.data import cache, documents
from moe_jax.data.config import DataConfig

_HELD_OUT = 20  # Without validation files, one document in so many.


def open_corpora(config: DataConfig) -> dict[str, documents.Corpus]:
  """Returns the corpora 'train' and 'validation'.

  Raises:
    ValueError, FileNotFoundError: a file is missing, cannot be read, or is
      named for both.
  """
  field = config.text_field
  files = documents.find_files('data.files', config.files, field)
  others = documents.find_files(
    'data.validation_files', config.validation_files, field
  )
  if both := set(files.paths) & set(others.paths):
    raise ValueError(
      f'data.validation_files={min(both)}: this file is also in data.files; '
      'name it in one of them'
    )
  if others.paths:
    train, validation = _corpus(files, 'whole'), _corpus(others, 'whole')
  else:
    train, validation = _corpus(files, 'rest'), _corpus(files, 'held out')
  return {'train': train, 'validation': validation}


def _corpus(files: documents.Files, part: str) -> documents.Corpus:
  def read() -> Iterator[str]:
    texts = files.documents()
    if part != 'whole':
      texts = _divide(texts, part == 'held out')
    # A second byte order mark was always dropped here; caches rest on it.
    return (text.removeprefix('\ufeff') for text in texts)

  named = 'text_files', documents.FORMAT, files.text_field
  key = cache.content_key(*named, (part, files.contents))
  return documents.Corpus(key, read, files.check)


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
