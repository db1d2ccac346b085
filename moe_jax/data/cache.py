"""Files made once and found again by the hash of what they were made from.

Everything is written beside its place and then renamed into it, so a reader
never sees half a file: not when two processes make the same one at once, and
not when one of them is killed. Each ends in, or has beside it, the SHA-256 of
what was written: what is damaged later is found out, too, and made again.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from typing import BinaryIO

_DIGEST = 64  # Hex digits of SHA-256, at the end of a sealed file.
_INCOMPLETE = '.incomplete-'
_SECONDS_UNTIL_ABANDONED = 7 * 24 * 3600.0
_MANIFEST = 'sha256.json'  # In a sealed directory: file name -> digest.


class DamagedError(ValueError):
  """A cached file or directory is not what was written."""


def open_cache(cache_dir: str) -> pathlib.Path:
  """Makes the cache directory, readable by its owner alone, and returns it.

  Args:
    cache_dir: a path; empty for `moe_jax` under $XDG_CACHE_HOME or ~/.cache.

  Raises:
    ValueError: the directory cannot be made.
  """
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  path = pathlib.Path(cache_dir or f'{home}/moe_jax')
  try:
    path = path.expanduser().absolute()
    # mkdir(parents=True) would give the parents the default mode.
    for part in (*reversed(path.parents), path):
      if not part.is_dir():
        part.mkdir(mode=0o700, exist_ok=True)
  except (OSError, RuntimeError) as error:  # The latter of ~somebody.
    raise ValueError(
      f'data.cache_dir={cache_dir}: cannot make {path} '
      f'({getattr(error, "strerror", error)}); '
      'give a directory that you may write to'
    ) from error
  _sweep(path)
  return path


def _sweep(cache_dir: pathlib.Path) -> None:
  """Removes what processes that were killed had not completed."""
  for path in cache_dir.glob(f'{_INCOMPLETE}*'):
    with contextlib.suppress(OSError):  # Another process sweeps, too.
      if time.time() - path.stat().st_mtime > _SECONDS_UNTIL_ABANDONED:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def content_key(*parts: object) -> str:
  """Returns a hash (32 hex digits) of JSON values; their order counts."""
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def file_digest(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file's bytes as hex digits."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Yields a binary file that takes the place of `path` if all goes well.

  It is sealed: its last 64 bytes are the digest of all before.

  Raises:
    ValueError: the file cannot be written.
  """
  with _writing(path):
    file = tempfile.NamedTemporaryFile(
      'w+b', dir=path.parent, prefix=_INCOMPLETE, delete=False
    )
    try:
      with file:
        yield file
        file.seek(0)
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
        file.write(digest.encode())
      os.replace(file.name, path)
    finally:
      pathlib.Path(file.name).unlink(missing_ok=True)


def check_file(path: pathlib.Path) -> int:
  """Checks a file that `atomic_file` wrote.

  Returns:
    How many bytes were written to it; the digest follows them.

  Raises:
    FileNotFoundError: there is none.
    DamagedError: it is not as it was written.
  """
  try:
    size = path.stat().st_size - _DIGEST
    digest = hashlib.sha256()
    with path.open('rb') as file:
      left = size
      while left > 0 and (block := file.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
      sealed = file.read()
  except FileNotFoundError:
    raise
  except OSError as error:
    raise DamagedError(f'{path}: {error.strerror}') from error
  if sealed != digest.hexdigest().encode():
    raise DamagedError(f'{path}: its checksum differs')
  return size


@contextlib.contextmanager
def atomic_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields an empty directory that becomes `path` if all goes well.

  Where another process was faster, its directory stays and ours is removed:
  a name is the hash of the content, so the two are the same. It is sealed: a
  file in it has the digests of all others.

  Raises:
    ValueError: the directory cannot be written.
  """
  with _writing(path):
    made = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=_INCOMPLETE))
    try:
      yield made
      (made / _MANIFEST).write_text(json.dumps(_digests(made)))
      try:
        made.rename(path)
      except OSError:
        if not path.is_dir():
          raise
    finally:
      shutil.rmtree(made, ignore_errors=True)


def check_directory(path: pathlib.Path) -> None:
  """Checks a directory that `atomic_directory` wrote.

  Raises:
    FileNotFoundError: there is none.
    DamagedError: it is not as it was written.
  """
  if not path.is_dir():
    raise FileNotFoundError(path)
  try:
    sealed = json.loads((path / _MANIFEST).read_bytes())
    whole = sealed == _digests(path)
  except (OSError, ValueError) as error:
    raise DamagedError(f'{path}: {error}') from error
  if not whole:
    raise DamagedError(f'{path}: a checksum differs')


def remove_damaged(path: pathlib.Path) -> None:
  """Removes a directory that is not as it was written.

  Where another process was faster, and has made it again, it stays.
  """
  with (
    _writing(path),
    tempfile.TemporaryDirectory(dir=path.parent, prefix=_INCOMPLETE) as made,
  ):
    aside = pathlib.Path(made) / 'damaged'
    with contextlib.suppress(FileNotFoundError):
      path.rename(aside)
    try:
      check_directory(aside)
      aside.rename(path)
    except (FileNotFoundError, DamagedError):
      pass


def _digests(folder: pathlib.Path) -> dict[str, str]:
  return {
    str(path.relative_to(folder)): file_digest(path)
    for path in sorted(folder.rglob('*'))
    if path.is_file() and path != folder / _MANIFEST
  }


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise ValueError(
      f'data.cache_dir={path.parent}: cannot write {path.name} '
      f'({error.strerror or error}); make room there, or choose a directory '
      'with room that you may write to'
    ) from error
