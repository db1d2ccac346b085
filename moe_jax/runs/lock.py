"""One run at a time in a work directory."""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid

from etils import epath
import fsspec
import jax

from moe_jax import storage
from moe_jax.options import Refused

# A bucket has no locks that end with their process: the owner says that it is
# alive by writing every so often, and a newcomer waits whether it does.
_SECONDS_BETWEEN_BEATS = 20.0
_SECONDS_UNTIL_DEAD = 70.0


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[Callable[[], None]]:
  """Keeps other runs out of a work directory, by `workdir / 'lock'`.

  On a local or shared disk it is an advisory lock, which ends with the process
  however that ends. In a bucket it is an object that only one can create; one
  that nobody writes to for over a minute, by this machine's clock, is taken
  over. The first process locks for all.

  Yields:
    A function that raises RuntimeError if somebody took the directory over.

  Raises:
    Refused: another run holds it.
  """
  if jax.process_index() > 0:
    yield lambda: None
    return
  kind = _object if storage.is_remote(workdir) else _file
  with kind(workdir / 'lock') as check:
    yield check


def _owner() -> dict[str, str | int]:
  return {
    'host': socket.gethostname(),
    'process': os.getpid(),
    'since': time.strftime('%Y-%m-%d %H:%M:%S %Z'),
  }


def _in_use(path: epath.Path, owner: str) -> Refused:
  return Refused(
    f'--workdir={path.parent}: in use by another run ({owner or "unknown"}); '
    'wait for it, stop it, or choose another work directory'
  )


@contextlib.contextmanager
def _file(path: epath.Path) -> Iterator[Callable[[], None]]:
  import fcntl  # Not on every system that can read this package.

  with open(path, 'a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise _in_use(path, file.read().strip()) from error
    except OSError as error:
      # Some network file systems have no locks: better a run than none.
      print(f'warning: {path}: no lock ({error.strerror})', file=sys.stderr)
    file.truncate(0)
    file.write(json.dumps(_owner()) + '\n')
    file.flush()
    # The file stays: to remove it could remove a successor's.
    yield lambda: None


@contextlib.contextmanager
def _object(path: epath.Path) -> Iterator[Callable[[], None]]:
  owner = _owner() | {'token': uuid.uuid4().hex, 'beat': 0}

  def create() -> bool:
    try:
      with fsspec.open(os.fspath(path), 'xb') as file:
        file.write(json.dumps(owner).encode())
    except FileExistsError:
      return False
    return True

  def read() -> str:
    try:
      return path.read_text()
    except FileNotFoundError:
      return ''

  if not create():
    seen = read()
    print(
      f'{path}: waits {_SECONDS_UNTIL_DEAD:.0f} s whether its run is alive',
      file=sys.stderr,
    )
    time.sleep(_SECONDS_UNTIL_DEAD)
    if read() not in ('', seen):
      raise _in_use(path, seen)
    path.unlink(missing_ok=True)
    mine = create()
    # Who came at the same time may just have removed what was created here.
    time.sleep(_SECONDS_BETWEEN_BEATS)
    if not mine or owner['token'] not in read():
      raise _in_use(path, read())

  ended, lost = threading.Event(), threading.Event()
  alive = time.monotonic()

  def beat() -> None:
    nonlocal alive
    while not ended.wait(_SECONDS_BETWEEN_BEATS):
      with contextlib.suppress(Exception):  # The network comes back, or not.
        began = time.monotonic()
        if owner['token'] not in read():
          lost.set()
          return
        owner['beat'] += 1
        path.write_text(json.dumps(owner))
        alive = began

  def check() -> None:
    # Who was not heard of for so long may be taken for dead by now.
    silent = time.monotonic() - alive
    if lost.is_set() or silent > _SECONDS_UNTIL_DEAD - _SECONDS_BETWEEN_BEATS:
      raise RuntimeError(f'{path}: another run took this work directory over')

  thread = threading.Thread(target=beat, daemon=True)
  thread.start()
  try:
    yield check
  finally:
    ended.set()
    thread.join()
    with contextlib.suppress(Exception):  # A newcomer waits a minute, then.
      if owner['token'] in read():
        path.unlink(missing_ok=True)
