"""Files of a work directory, on a disk or in a bucket.

What is written at once goes to a bucket (gs://...) directly; what grows is
written locally and uploaded with each checkpoint.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from typing import Any

from etils import epath
import fsspec
import jax

from moe_jax import storage
from moe_jax.options import Refused

_REMOTE = 'gs://'
_SECONDS_UNTIL_SEEN = 90.0  # File systems over a network cache what they saw.


def absolute(path: str | os.PathLike[str]) -> epath.Path:
  """Returns a path that does not depend on the current directory."""
  # Not epath's absolute(), which makes gs://... a local path.
  if not storage.is_remote(path):
    return epath.Path(os.path.abspath(path))
  storage.ask_buckets_anew()
  return epath.Path(path)


def check_place(name: str, path: str | os.PathLike[str]) -> None:
  """Raises ValueError, which has the name, if a bucket cannot be opened."""
  if not storage.is_remote(path):
    return
  if not os.fspath(path).startswith(_REMOTE):
    raise ValueError(
      f'{name}={path}: must be a local directory or {_REMOTE}BUCKET/...'
    )
  try:
    fsspec.get_filesystem_class('gs')
  except ImportError as error:
    raise ValueError(
      f'{name}={path}: needs a package that is not installed; pip install gcsfs'
    ) from error


def open_workdir(path: str | os.PathLike[str]) -> epath.Path:
  """Returns the path of a local or remote directory that can be written to.

  It need not exist, and is not made. A local path becomes absolute.

  Raises:
    ValueError: the scheme is unknown, or its package is not installed.
    OSError: no files can be made there.
  """
  check_place('--workdir', path)
  place = workdir = absolute(path)
  if storage.is_remote(path):
    return workdir
  while not place.exists():
    place = place.parent
  try:
    with tempfile.TemporaryFile(dir=place):
      pass
  except OSError as error:
    raise ValueError(
      f'--workdir={path}: no file can be made in {place} ({error.strerror}); '
      'choose a directory that you may write to'
    ) from error
  return workdir


def check_space(workdir: epath.Path, size: int, count: int) -> None:
  """Raises ValueError unless so many checkpoints fit, of so many bytes each."""
  if storage.is_remote(workdir):
    return
  free = shutil.disk_usage(workdir).free
  if free < size * count:
    raise ValueError(
      f'--workdir={workdir}: {free / 1e9:.1f} GB are free, but {count} more '
      f'checkpoints of {size / 1e9:.1f} GB are to be written; make room, or '
      'lower checkpoints_kept'
    )


def check_shared(workdir: epath.Path, options: dict[str, Any]) -> None:
  """Raises Refused unless this process sees what the first one wrote.

  Args:
    workdir: the work directory.
    options: what the first process just wrote into config.json.
  """
  path = workdir / 'config.json'
  deadline = time.monotonic() + _SECONDS_UNTIL_SEEN
  while not path.exists() or read_json(path) != options:
    if time.monotonic() > deadline:
      raise Refused(
        f'--workdir={workdir}: process {jax.process_index()} does not see the '
        'config.json that process 0 wrote there; choose a directory that all '
        'machines share'
      )
    time.sleep(1)


@contextlib.contextmanager
def local_log(
  workdir: epath.Path, still_ours: Callable[[], None]
) -> Iterator[tuple[pathlib.Path | None, Callable[[], None]]]:
  """Yields a local directory for files that grow, and how to upload them.

  A local `workdir` is that directory itself. For a remote one it is a temporary
  one with the metrics so far: what a killed process did not upload is lost, and
  a continued run computes it again. Only the first process writes: the others
  get None.

  Args:
    workdir: the work directory.
    still_ours: raises if another run took it over; then nothing is uploaded.
  """
  if jax.process_index() > 0:
    yield None, lambda: None
    return
  if not storage.is_remote(workdir):
    yield pathlib.Path(workdir), lambda: None
    return
  with tempfile.TemporaryDirectory(prefix='moe_jax-') as scratch:
    scratch = epath.Path(scratch)

    def upload() -> None:
      for file in scratch.iterdir():
        file.copy(workdir / file.name, overwrite=True)

    metrics = workdir / 'metrics.jsonl'
    if metrics.exists():
      metrics.copy(scratch / metrics.name)
    try:
      yield pathlib.Path(scratch), upload
    finally:
      try:
        still_ours()
        storage.patiently(upload, f'{workdir}: upload')
      except Exception as error:  # How the run itself ended says more.
        print(f'warning: {workdir}: not uploaded: {error}', file=sys.stderr)


def read(path: epath.Path | pathlib.Path) -> bytes:
  """Reads a file of a work directory.

  Raises:
    FileNotFoundError: it is missing.
  """
  try:
    return path.read_bytes()
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f'{path} is missing: not a run, or not yet begun'
    ) from error


def read_json(path: epath.Path) -> Any:
  """Reads a JSON file of a work directory.

  Raises:
    FileNotFoundError: it is missing.
    ValueError: it is damaged.
  """
  try:
    return json.loads(read(path))
  except ValueError as error:
    raise ValueError(f'{path}: damaged, not JSON ({error})') from error


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a JSON file whole or not at all."""
  write(path, (json.dumps(value, indent=2) + '\n').encode())


def write(path: epath.Path | pathlib.Path, content: bytes) -> None:
  """Writes a file whole or not at all."""
  if storage.is_remote(path):  # An object is there once all of it is sent.
    path.write_bytes(content)
    return
  temporary = path.with_suffix('.tmp')
  try:
    with temporary.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
