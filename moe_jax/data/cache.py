"""Files made once and found again by the hash of what they were made from.

Everything is written beside its place and then renamed into it, so a reader
never sees half a file: not when two processes make the same one at once, and
not when one of them is killed. Where files can be locked, the second waits for
the first, up to an hour, and says so. Each ends in the SHA-256 of what was
written: damage that comes later is found out, and the file is made again.
"""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from typing import BinaryIO, TypeVar

_DIGEST = 64  # Hex digits of SHA-256, at the end of a sealed file.
_INCOMPLETE = '.incomplete-'
_SECONDS_UNTIL_ABANDONED = 7 * 24 * 3600.0
_SECONDS_TO_WAIT = 3600.0
_SECONDS_BETWEEN_TRIES = 0.2
T = TypeVar('T')


def open_cache(cache_dir: str) -> pathlib.Path:
  """Makes the cache directory, readable by its owner alone, and returns it.

  Args:
    cache_dir: a path; empty for `moe_jax` under $XDG_CACHE_HOME or ~/.cache.

  Raises:
    ValueError: the directory is remote, or cannot be made.
  """
  if '://' in cache_dir:
    raise ValueError(
      f'data.cache_dir={cache_dir}: not a local directory; token files are '
      'mapped into memory, so give a path on a disk of this machine'
    )
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


def log(message: str) -> None:
  """Prints a line about work that was not cached to stderr."""
  print(f'data: {message}', file=sys.stderr, flush=True)


def _sweep(cache_dir: pathlib.Path) -> None:
  """Removes what processes that were killed had not completed."""
  for path in cache_dir.glob(f'{_INCOMPLETE}*'):
    with contextlib.suppress(OSError):  # Another process may sweep as well.
      if time.time() - path.stat().st_mtime > _SECONDS_UNTIL_ABANDONED:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def content_key(*parts: object) -> str:
  """Returns a hash (32 hex digits) of JSON values; their order counts."""
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def load_or_make(
  path: pathlib.Path,
  load: Callable[[pathlib.Path, int], T],
  make: Callable[[BinaryIO], None],
) -> T:
  """Loads a sealed file, which is made where there is none or it is damaged.

  Args:
    path: of the file.
    load: reads it, given its path and how many bytes `make` wrote; raises
      ValueError if they are not what they should be.
    make: writes it.

  Raises:
    ValueError: the file cannot be written.
  """

  def found() -> T | None:
    try:
      return load(path, check_file(path))
    except FileNotFoundError:
      pass
    except (OSError, ValueError):
      log(f'{path} is damaged; making it again')
    return None

  before = _version(path)
  if (value := found()) is not None:
    return value
  with _turn(path):
    # Another process may have made it meanwhile.
    if _version(path) != before and (value := found()) is not None:
      return value
    with atomic_file(path) as file:
      make(file)
  return load(path, check_file(path))


def _version(path: pathlib.Path) -> tuple[int, int] | None:
  """Returns what differs between files that took the same place."""
  try:
    status = path.stat()
  except OSError:
    return None
  return status.st_ino, status.st_mtime_ns


@contextlib.contextmanager
def _turn(path: pathlib.Path) -> Iterator[None]:
  """Waits while another process makes a file, if it can be known.

  It saves work only: `atomic_file` is right without.
  """
  lock = path.with_name(f'{_INCOMPLETE}{path.name}.lock')
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):  # A disk without locks, or read-only.
      file = stack.enter_context(lock.open('wb'))
      stack.callback(lock.unlink, missing_ok=True)
      _wait_for(file, path)
    yield


def _wait_for(lock: BinaryIO, path: pathlib.Path) -> None:
  import fcntl  # Of Unix.

  deadline = time.monotonic() + _SECONDS_TO_WAIT
  told = False
  while True:
    try:
      return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      if time.monotonic() > deadline:
        return log(f'waited in vain for {path}; making it here')
      if not told:
        log(
          f'another process makes {path}; waiting for it, '
          f'{_SECONDS_TO_WAIT:.0f} s at most'
        )
      told = True
      time.sleep(_SECONDS_BETWEEN_TRIES)


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Yields a binary file that takes the place of `path` if all goes well.

  It is sealed: its last 64 bytes are the digest of all before.

  Raises:
    ValueError: the file cannot be written.
  """
  file = None
  try:
    with tempfile.NamedTemporaryFile(
      'w+b', dir=path.parent, prefix=_INCOMPLETE, delete=False
    ) as file:
      yield file
      file.seek(0)
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
      file.write(digest.encode())
    os.replace(file.name, path)
  except OSError as error:
    raise ValueError(
      f'data.cache_dir={path.parent}: cannot write {path.name} '
      f'({error.strerror or error}); make room there, or choose a directory '
      'with room that you may write to'
    ) from error
  finally:
    if file:
      pathlib.Path(file.name).unlink(missing_ok=True)


def check_file(path: pathlib.Path) -> int:
  """Checks a file that `atomic_file` wrote.

  Returns:
    How many bytes were written to it; the digest follows them.

  Raises:
    OSError: there is none, or it cannot be read.
    ValueError: it is not as it was written.
  """
  digest = hashlib.sha256()
  with path.open('rb') as file:
    size = left = file.seek(0, os.SEEK_END) - _DIGEST
    file.seek(0)
    while left > 0 and (block := file.read(min(left, 1 << 20))):
      digest.update(block)
      left -= len(block)
    if file.read() != digest.hexdigest().encode():
      raise ValueError(f'{path}: its checksum differs')
  return size
