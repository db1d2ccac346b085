"""Documents of .txt (one a file) and .jsonl (one a line), also with .gz."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import glob
import gzip
import hashlib
import itertools
import json
import pathlib
import sys
from typing import BinaryIO, NamedTuple
import zlib

from moe_jax.data import cache
from moe_jax.data.config import split_names
from moe_jax.options import shown

FORMAT = 1  # Part of every key: raise it when these files read differently.
SUFFIXES = ('.txt', '.jsonl', '.txt.gz', '.jsonl.gz')
# A document, or a line of a .jsonl file, has at most so many bytes.
LARGEST_DOCUMENT = 1 << 30
# A .gz file has at most its own size times the one plus the other inside. Text
# shrinks 3 to 10 times; nothing shrinks more than 1032 times.
LARGEST_EXPANSION = 100
SMALL_EXPANSION = 1 << 28
# RuntimeError is of `~somebody` and of a loop of links.
_EXPECTED = (ValueError, OSError, RuntimeError, EOFError, zlib.error)


class Corpus(NamedTuple):
  """Text that is read only when asked for.

  Attributes:
    key: hash that changes when the text does.
    documents: returns the documents, in a fixed order, anew on each call.
    check: raises ValueError if the text is no longer that of `key`. It is
      called after reading and before anything is stored under that key.
  """

  key: str
  documents: Callable[[], Iterator[str]]
  check: Callable[[], None] = lambda: None


def find_files(option: str, patterns: str, text_field: str) -> 'Files':
  """Returns the files that comma-separated paths and globs name.

  Args:
    option: what errors name.
    patterns: a glob's files come sorted; a file named twice comes once.
    text_field: name of the text in a .jsonl line.

  Raises:
    FileNotFoundError: a path or glob names nothing.
    ValueError: a name is a directory's, or does not end in one of `SUFFIXES`.
  """
  found = {}
  for pattern in split_names(patterns):
    with reading(f'{option}={pattern}'):
      path = pathlib.Path(pattern).expanduser()
      # A path that exists may hold characters that mean something in a glob.
      names = [path] if path.exists() else sorted(glob.glob(str(path)))
      names = [pathlib.Path(name).resolve() for name in names]
    if not names:
      raise FileNotFoundError(f'{option}={pattern}: no such file')
    for name in names:
      if name.is_dir():
        raise ValueError(
          f'{option}={name}: not a file; '
          f'to read a directory write {name / ("*" + SUFFIXES[0])}'
        )
      if not name.is_file():
        raise ValueError(f'{option}={name}: not a regular file')
      if not name.name.endswith(SUFFIXES):
        raise ValueError(
          f'{option}={name}: the name must end in {", ".join(SUFFIXES)}'
        )
      found[name] = None
  return Files(option, tuple(found), text_field)


@dataclasses.dataclass(eq=False)
class Files:
  """Text files, which are known by their content, not by their place.

  Attributes:
    option: what errors name beside the file.
    paths: files that end in one of `SUFFIXES`.
    text_field: name of the text in a .jsonl line.
    contents: whether each file is .jsonl and .gz, and its SHA-256.

  Raises:
    ValueError: a file cannot be read.
  """

  option: str
  paths: Sequence[pathlib.Path]
  text_field: str = 'text'

  def __post_init__(self):
    self.contents = self._contents()

  def _contents(self) -> list[tuple[bool, bool, str]]:
    found = []
    for path in self.paths:
      with reading(f'{self.option}={path}'), path.open('rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
      by_line = path.name.endswith(('.jsonl', '.jsonl.gz'))
      found.append((by_line, path.name.endswith('.gz'), digest))
    return found

  def check(self) -> None:
    """Raises ValueError if the files are no longer what they were."""
    if self._contents() != self.contents:
      raise ValueError(f'{self.option}: changed while being read; start again')

  def documents(self) -> Iterator[str]:
    """Yields the documents; empty ones and nulls are skipped.

    Raises:
      ValueError: a file is damaged, or holds no text; the message has the file,
        and the line or byte.
    """
    for path, (by_line, packed, _) in zip(
      self.paths, self.contents, strict=True
    ):
      room = sys.maxsize
      with reading(f'{self.option}={path}'):
        if packed:
          room = SMALL_EXPANSION + path.stat().st_size * LARGEST_EXPANSION
        with (gzip.open if packed else open)(path, 'rb') as file:
          texts = read_lines(file, room, self.text_field)
          if not by_line:
            texts = [read_whole(file, room)]
          empty = True
          for text in filter(None, texts):
            empty = False
            yield text
        if empty:
          raise ValueError('no text in this file')

  def corpus(self, kind: str) -> Corpus:
    """Returns the corpus of all documents; `kind` is part of its key."""
    key = cache.content_key(kind, FORMAT, self.contents)
    return Corpus(key, self.documents, self.check)


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
  """Raises what is wrong with a text as a ValueError that begins with `where`.

  The contexts of a file and of a line in it can be nested.
  """
  try:
    yield
  except _EXPECTED as error:
    raise ValueError(f'{where}: {_problem(error)}') from error


@contextlib.contextmanager
def reading_with_any_library(where: str) -> Iterator[None]:
  """As `reading`; clients of buckets and native code raise what they like."""
  with reading(where):
    try:
      yield
    except _EXPECTED:
      raise
    except Exception as error:
      raise ValueError(f'{type(error).__name__}: {error}') from error


def _problem(error: Exception) -> str:
  match error:
    case UnicodeDecodeError():
      return f'byte {error.start} is not valid UTF-8; convert it to UTF-8'
    case UnicodeEncodeError():
      return f'half a surrogate pair at character {error.start} of the text'
    case gzip.BadGzipFile() | EOFError() | zlib.error():
      return f'damaged gzip file: {error}'
    case OSError():
      return f'cannot be read: {error.strerror or error}'
  return str(error)


def decode(data: bytes) -> str:
  """Decodes UTF-8 without its byte order mark."""
  return data.decode().removeprefix('\ufeff')


def read_whole(file: BinaryIO, room: int = sys.maxsize) -> str:
  """Reads a file, a MiB at a time and no more than `room` bytes of it."""
  chunks, left = [], min(LARGEST_DOCUMENT, room) + 1
  while left > 0 and (chunk := file.read(min(left, 1 << 20))):
    chunks.append(chunk)
    left -= len(chunk)
  data = b''.join(chunks)
  check_size(len(data), room)
  return decode(data)


def read_lines(
  file: BinaryIO, room: int, text_field: str
) -> Iterator[str | None]:
  """Yields the texts of a .jsonl file of no more than `room` bytes."""
  for number in itertools.count(1):
    line = file.readline(min(LARGEST_DOCUMENT, room) + 1)
    if not line:
      return
    with reading(f'line {number}'):
      check_size(len(line), room)
      if line.strip():
        yield parse_line(line, text_field)
    room -= len(line)


def check_size(size: int, room: int = sys.maxsize) -> None:
  """Raises ValueError for a document, or a file inside, that is too large."""
  if size > room:
    raise ValueError(
      f'the file expands to more than {LARGEST_EXPANSION} times its size plus '
      f'{SMALL_EXPANSION} bytes, which is no text; if it is, unpack it'
    )
  if size > LARGEST_DOCUMENT:
    raise ValueError(
      f'longer than {LARGEST_DOCUMENT} bytes, the most that a document may '
      'have; divide it'
    )


def parse_line(line: bytes, text_field: str) -> str | None:
  """Returns the text of one line of a .jsonl file; None where it is null.

  Raises:
    ValueError: it is no object with such a text, or no UTF-8.
  """
  text = decode(line)
  try:
    record = json.loads(text)
  # ValueError also for integers of more digits than Python likes.
  except (ValueError, RecursionError) as error:
    raise ValueError(f'invalid JSON: {error}') from error
  if not isinstance(record, dict):
    raise ValueError(f'expected a JSON object, found {shown(record)}')
  if text_field not in record:
    raise ValueError(
      f'no field --text_field or data.text_field={text_field}; '
      f'this line has {shown(", ".join(sorted(record)))}'
    )
  text = record[text_field]
  if text is None:
    return None
  if not isinstance(text, str):
    raise ValueError(f'{text_field} must be a string, not {shown(text)}')
  text.encode()  # Half a surrogate pair has no UTF-8.
  return text
