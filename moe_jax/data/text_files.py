"""Documents of .txt (one a file) and .jsonl (one a line), also with .gz."""

from collections.abc import Iterable
from collections.abc import Iterator
import glob
import gzip
import json
import pathlib
import zlib

from moe_jax.data import cache

SUFFIXES = ('.txt', '.jsonl', '.txt.gz', '.jsonl.gz')


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
    path = pathlib.Path(pattern).expanduser()
    # A path that exists may hold characters that mean something in a glob.
    names = [path] if path.exists() else sorted(glob.glob(str(path)))
    if not names:
      raise FileNotFoundError(f'{option}={pattern}: no such file')
    for name in names:
      name = pathlib.Path(name).resolve()
      if not name.is_file():
        raise ValueError(
          f'{option}={name}: not a file; '
          f'to read a directory write {name / ("*" + SUFFIXES[0])}'
        )
      if not name.name.endswith(SUFFIXES):
        raise ValueError(
          f'{option}={name}: the name must end in {", ".join(SUFFIXES)}'
        )
      found[name] = None
  return tuple(found)


def contents(paths: Iterable[pathlib.Path]) -> list[tuple[bool, bool, str]]:
  """Returns what determines the documents of files: content, not place."""
  return [
    ('.jsonl' in path.suffixes, path.suffix == '.gz', cache.file_digest(path))
    for path in paths
  ]


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
  opener = gzip.open if path.suffix == '.gz' else open
  try:
    with opener(path, 'rb') as file:
      if '.jsonl' not in path.suffixes:
        yield decode(file.read(), where)
        return
      for number, line in enumerate(file, 1):
        if line.strip():
          yield _parse(line, text_field, f'{where}: line {number}')
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(f'{where}: damaged gzip file: {error}') from error


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
  try:
    record = json.loads(decode(line, where))
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f'{where}: invalid JSON: {error}') from error
  if not isinstance(record, dict):
    raise ValueError(f'{where}: expected a JSON object, found {record!r:.40}')
  if text_field not in record:
    raise ValueError(
      f'{where}: no field data.text_field={text_field}; '
      f'this line has {", ".join(sorted(record))}'
    )
  text = record[text_field]
  if not isinstance(text, str):
    raise ValueError(
      f'{where}: {text_field} must be a string, not {text!r:.40}'
    )
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f'{where}: {text_field} has half a surrogate pair at character '
      f'{error.start}, which is no Unicode text'
    ) from error
  return text
