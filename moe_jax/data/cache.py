"""Files made once and found again by the hash of what they were made from.

Everything is written beside its place and then renamed into it, so a reader
never sees half a file: not when two processes make the same one at once, and
not when one of them is killed.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import BinaryIO


def open_cache(cache_dir: str) -> pathlib.Path:
  """Makes the cache directory, readable by its owner alone, and returns it.

  Args:
    cache_dir: a path; empty for `moe_jax` under $XDG_CACHE_HOME or ~/.cache.

  Raises:
    ValueError: the directory cannot be made.
  """
  if cache_dir:
    path = pathlib.Path(cache_dir).expanduser().absolute()
  else:
    home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    path = pathlib.Path(home).expanduser().absolute() / 'moe_jax'
  try:
    # mkdir(parents=True) would give the parents the default mode.
    for part in (*reversed(path.parents), path):
      if not part.is_dir():
        part.mkdir(mode=0o700, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f'data.cache_dir={cache_dir}: cannot make {path} ({error.strerror}); '
      'give a directory that you may write to'
    ) from error
  return path


def content_key(*parts: object) -> str:
  """Returns a hash (32 hex digits) of JSON values; their order counts."""
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def file_digest(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file's bytes as hex digits."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Yields a binary file that takes the place of `path` if all goes well."""
  file = tempfile.NamedTemporaryFile(
    dir=path.parent, prefix='.incomplete-', delete=False
  )
  try:
    with file:
      yield file
    os.replace(file.name, path)
  finally:
    pathlib.Path(file.name).unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields an empty directory that becomes `path` if all goes well.

  Where another process was faster, its directory stays and ours is removed:
  a name is the hash of the content, so the two are the same.
  """
  made = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix='.incomplete-'))
  try:
    yield made
    try:
      made.rename(path)
    except OSError:
      if not path.is_dir():
        raise
  finally:
    shutil.rmtree(made, ignore_errors=True)
