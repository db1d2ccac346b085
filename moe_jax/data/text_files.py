"""Documents of .txt (one a file) and .jsonl (one a line), also with .gz."""

from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import glob
import gzip
import itertools
import json
import pathlib
import sys
import zlib

from moe_jax.data import cache
from moe_jax.options import shown

SUFFIXES = ('.txt', '.jsonl', '.txt.gz', '.jsonl.gz')
# A document, or a line of a .jsonl file, has at most so many bytes.
LARGEST_DOCUMENT = 1 << 30
# A .gz file has at most its own size times the one plus the other inside. Text
# shrinks 3 to 10 times; nothing shrinks more than 1032 times.
LARGEST_EXPANSION = 100
SMALL_EXPANSION = 1 << 28


def find_files(option: str, patterns: str) -> tuple[pathlib.Path, ...]:
  """Returns the files that comma-separated paths and globs name.

  Args:
    option: what errors name.
    patterns: a glob's files come sorted; a file named twice comes once.

  Raises:
    FileNotFoundError: a path or glob names nothing.
    ValueError: a name is a directory's, or does not end in one of `SUFFIXES`.
  """
  found = {}
  for pattern in filter(None, map(str.strip, patterns.split(','))):
    try:
      path = pathlib.Path(pattern).expanduser()
      # A path that exists may hold characters that mean something in a glob.
      names = [path] if path.exists() else sorted(glob.glob(str(path)))
      names = [pathlib.Path(name).resolve() for name in names]
    except (OSError, RuntimeError) as error:  # Such as a loop of links.
      raise ValueError(f'{option}={pattern}: {error}') from error
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
  return tuple(found)


def contents(
  paths: Iterable[pathlib.Path], option: str
) -> list[tuple[bool, bool, str]]:
  """Returns what determines the documents of files: content, not place.

  Raises:
    ValueError: a file cannot be read; the message has `option`.
  """
  found = []
  for path in paths:
    with _reading(f'{option}={path}'):
      digest = cache.file_digest(path)
    found.append(('.jsonl' in path.suffixes, path.suffix == '.gz', digest))
  return found


def read_documents(
  paths: Iterable[pathlib.Path], text_field: str, option: str
) -> Iterator[str]:
  """Yields the documents of text files; empty ones are left out.

  Args:
    paths: files that end in one of `SUFFIXES`.
    text_field: name of the text in a .jsonl line.
    option: what errors name beside the file.

  Raises:
    ValueError: a file is damaged, or holds no text; the message has the file,
      and the line or byte.
  """
  for path in paths:
    where = f'{option}={path}'
    empty = True
    for text in _read_file(path, text_field, where):
      if text:
        empty = False
        yield text
    if empty:
      raise ValueError(f'{where}: no text in this file')


def _read_file(path, text_field, where) -> Iterator[str]:
  by_line = '.jsonl' in path.suffixes
  with _reading(where):
    is_packed = path.suffix == '.gz'
    with (gzip.open if is_packed else open)(path, 'rb') as file:
      room = sys.maxsize
      if is_packed:
        room = SMALL_EXPANSION + path.stat().st_size * LARGEST_EXPANSION
      for place, piece in _pieces(file, by_line, room, where):
        if not by_line:
          yield decode(piece, place)
        elif piece.strip():
          yield _parse(piece, text_field, place)


def _pieces(file, by_line, room, where) -> Iterator[tuple[str, bytes]]:
  """Yields the lines of a file, or all of it at once, and where they are.

  Never holds more than LARGEST_DOCUMENT bytes, nor reads more than `room`.
  """
  for number in itertools.count(1):
    place = f'{where}: line {number}' if by_line else where
    most = min(LARGEST_DOCUMENT, room) + 1
    piece = file.readline(most) if by_line else _read_up_to(file, most)
    if len(piece) > room:
      raise ValueError(
        f'{place}: the file expands to more than {LARGEST_EXPANSION} times its '
        f'size plus {SMALL_EXPANSION} bytes, which is no text; if it is, '
        'unpack it'
      )
    if len(piece) > LARGEST_DOCUMENT:
      raise ValueError(
        f'{place}: longer than {LARGEST_DOCUMENT} bytes, the most that a '
        'document may have; divide it'
      )
    if piece:
      yield place, piece
    if not by_line or not piece:
      return
    room -= len(piece)


def _read_up_to(file, most: int) -> bytes:
  """Reads at most so many bytes, without asking for their memory at once."""
  chunks = []
  while most > 0 and (chunk := file.read(min(most, 1 << 20))):
    chunks.append(chunk)
    most -= len(chunk)
  return b''.join(chunks)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
  """Turns what the system says into ValueErrors that begin with `where`."""
  try:
    yield
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(f'{where}: damaged gzip file: {error}') from error
  except OSError as error:
    raise ValueError(
      f'{where}: cannot be read: {error.strerror or error}'
    ) from error


def decode(data: bytes, where: str) -> str:
  """Decodes UTF-8; raises ValueError with `where` and the byte otherwise."""
  try:
    return data.decode().removeprefix('\ufeff')  # A byte order mark.
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{where}: byte {error.start} is not valid UTF-8; convert it to UTF-8'
    ) from error


def _parse(line: bytes, text_field: str, where: str) -> str:
  """Returns the text of one line of a .jsonl file."""
  text = decode(line, where)
  try:
    record = json.loads(text)
  # ValueError also for integers of more digits than Python likes.
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where}: invalid JSON: {error}') from error
  if not isinstance(record, dict):
    raise ValueError(f'{where}: expected a JSON object, found {shown(record)}')
  if text_field not in record:
    raise ValueError(
      f'{where}: no field data.text_field={text_field}; '
      f'this line has {shown(", ".join(sorted(record)))}'
    )
  text = record[text_field]
  if not isinstance(text, str):
    raise ValueError(
      f'{where}: {text_field} must be a string, not {shown(text)}'
    )
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f'{where}: {text_field} has half a surrogate pair at character '
      f'{error.start}, which is no Unicode text'
    ) from error
  return text
