"""The work directory of a run: whether it may be used, and what is in it.

It may be remote (gs://bucket/...). What is written at once goes there directly;
what grows is written locally and uploaded with each checkpoint.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
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
import jax

from moe_jax.config import CHANGEABLE
from moe_jax.config import MAY_CHANGE
from moe_jax.config import Config
from moe_jax.config import flatten
from moe_jax.config import is_among
from moe_jax.config import to_dict
from moe_jax.data.cache import open_cache
from moe_jax.parallel import processes

# Seconds before what a file system refused is tried again.
PAUSES = (5.0, 20.0)

_REMOTE = 'gs://'
_SECONDS_UNTIL_SEEN = 90.0  # File systems over a network cache what they saw.


def open_workdir(path: str | os.PathLike[str]) -> epath.Path:
  """Returns the path of a local or remote directory that can be written to.

  It need not exist, and is not made. A local path becomes absolute.

  Raises:
    ValueError: the scheme is unknown, or its package is not installed.
    OSError: no files can be made there.
  """
  if '://' in os.fspath(path):
    if not os.fspath(path).startswith(_REMOTE):
      raise ValueError(
        f'--workdir={path}: must be a local directory or {_REMOTE}BUCKET/...'
      )
    try:
      import fsspec

      fsspec.get_filesystem_class('gs')
    except ImportError as error:
      raise ValueError(
        f'--workdir={path}: needs a package that is not installed; '
        'pip install gcsfs'
      ) from error
    return epath.Path(path)
  # Not epath's absolute(), which makes gs://... a local path.
  place = workdir = epath.Path(os.path.abspath(path))
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


def check_same_config(
  workdir: epath.Path, config: Config, allowed: Sequence[str] = ()
) -> None:
  """Raises ValueError if `workdir` holds a run of another config.

  Args:
    workdir: the work directory.
    config: what is wanted now.
    allowed: options that may differ, as --allow_config_change names them.
  """
  flat = flatten(to_dict(config))
  for name in allowed:
    if not any(is_among(option, [name]) for option in flat):
      raise ValueError(f'--allow_config_change={name}: no such option')
    if not is_among(name, CHANGEABLE):
      raise ValueError(
        f'--allow_config_change={name}: cannot change in a run; what can is '
        f'{", ".join(CHANGEABLE)}'
      )
  path = workdir / 'config.json'
  if not path.exists():
    if (workdir / 'checkpoints').exists():
      raise ValueError(f'--workdir={workdir}: checkpoints, but no config.json')
    return
  changes = {
    name: change
    for name, change in differences(read_json(path), to_dict(config)).items()
    if not is_among(name, allowed)
  }
  if not changes:
    return
  hint = ''
  if all(is_among(name, CHANGEABLE) for name in changes):
    hint = (
      f', or go on with the change by --allow_config_change={",".join(changes)}'
    )
  raise ValueError(
    f'--workdir={workdir}: holds a run of another config: '
    + ', '.join(
      f'{name}={now!r} (was {before!r})'
      for name, (before, now) in changes.items()
    )
    + f'; choose another work directory{hint}'
  )


def differences(
  before: dict[str, Any], now: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
  """Returns options that differ, but for those that change no result."""
  before, now = flatten(before), flatten(now)
  return {
    name: (before.get(name), now.get(name))
    for name in sorted(before.keys() | now.keys())
    if before.get(name) != now.get(name)
    and not is_among(name, (*MAY_CHANGE, 'data.cache_dir', 'data.tfds_dir'))
  }


def check_same_text(workdir: epath.Path, fingerprint: str) -> None:
  """Raises ValueError if `workdir` holds a run on other text."""
  path = workdir / 'run.json'
  if path.exists() and read_json(path)['text_fingerprint'] != fingerprint:
    raise ValueError(
      f'--workdir={workdir}: this run began with other training text, or '
      'another version of the tokenizers package; choose another work directory'
    )


def check_space(workdir: epath.Path, size: int, count: int) -> None:
  """Raises ValueError unless so many checkpoints fit, of so many bytes each."""
  if os.fspath(workdir).startswith(_REMOTE):
    return
  free = shutil.disk_usage(workdir).free
  if free < size * count:
    raise ValueError(
      f'--workdir={workdir}: {free / 1e9:.1f} GB are free, but {count} more '
      f'checkpoints of {size / 1e9:.1f} GB are to be written; make room, or '
      'lower checkpoints_kept'
    )


def check_nothing_is_lost(workdir: epath.Path, most: int) -> None:
  """Raises ValueError if there are more steps than a run has unsaved."""
  path = workdir / 'metrics.jsonl'
  count = path.read_bytes().count(b'\n') if path.exists() else 0
  if count > most:
    raise ValueError(
      f'{path}: has {count} steps, but there is no checkpoint beside it; bring '
      'the checkpoints back, or choose another --workdir to begin anew'
    )


def check_shared(workdir: epath.Path, options: dict[str, Any]) -> None:
  """Raises Disagreement unless this process sees what the first one wrote.

  Args:
    workdir: the work directory.
    options: what the first process just wrote into config.json.
  """
  path = workdir / 'config.json'
  deadline = time.monotonic() + _SECONDS_UNTIL_SEEN
  while not path.exists() or read_json(path) != options:
    if time.monotonic() > deadline:
      raise processes.Disagreement(
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

  A local `workdir` is that directory itself. For a remote one it is a passing
  one in the user's cache, with the metrics so far; a process that is killed
  loses what was not uploaded, which a continued run computes again. All but the
  first process have nothing to write: None.

  Args:
    workdir: the work directory.
    still_ours: raises where another run has taken it over: nothing is uploaded.
  """
  if jax.process_index() > 0:
    yield None, lambda: None
    return
  if not os.fspath(workdir).startswith(_REMOTE):
    yield pathlib.Path(workdir), lambda: None
    return
  with tempfile.TemporaryDirectory(
    dir=open_cache(''), prefix='workdir-'
  ) as scratch:
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
        patiently(upload, f'{workdir}: upload')
      except Exception as error:  # How the run itself ended says more.
        print(f'warning: {workdir}: not uploaded: {error}', file=sys.stderr)


def patiently(write: Callable[[], None], what: str) -> None:
  """Calls `write`; where the file system fails, again, twice at most."""
  for pause in PAUSES:
    try:
      return write()
    except Exception as error:  # Buckets have errors of their own.
      print(
        f'warning: {what}: {error}; tries again in {pause:.0f} s',
        file=sys.stderr,
      )
      time.sleep(pause)
  return write()


def read_json(path: epath.Path) -> Any:
  """Reads a JSON file; raises ValueError where it is damaged."""
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path}: damaged, not JSON ({error})') from error


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a JSON file whole or not at all."""
  temporary = path.with_suffix('.tmp')
  with temporary.open('w') as file:
    file.write(json.dumps(value, indent=2) + '\n')
    file.flush()
    with contextlib.suppress(AttributeError, OSError):  # A bucket has no disk.
      os.fsync(file.fileno())
  temporary.replace(path)
