"""A scheduler that takes a machine away says SIGTERM first: time to save.

SIGTERM and SIGINT (Ctrl-C) mean: finish the step, save, end with exit code 75.
A second one ends the process at once, unsaved, with 128 + the signal's number.
(With several processes jax watches SIGTERM, and ignores a second one until all
have come to the step after which they save.)
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
  """The run was saved and is to be continued by the same command."""


@contextlib.contextmanager
def notice() -> Iterator[Callable[[int], bool]]:
  """Takes the first SIGTERM or SIGINT for a notice, not for the end.

  Yields:
    A function that all processes call after every step, with its number. It
    says whether to save and end now: after the same step in all of them, once
    any was told.
  """
  several = jax.distributed.is_initialized()
  if threading.current_thread() is not threading.main_thread():
    # Python leaves signals to the main thread.
    yield multihost_utils.reached_preemption_sync_point if several else never
    return
  # jax took SIGTERM over when the processes met, so that one tells all.
  signals = (signal.SIGINT,) if several else _SIGNALS
  told = threading.Event()

  def tell() -> None:
    told.set()
    if several:
      os.kill(os.getpid(), signal.SIGTERM)

  def after(step: int) -> bool:
    if not several:
      return told.is_set()
    reached = multihost_utils.reached_preemption_sync_point(step)
    if reached:
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return reached

  with _watch(signals, tell):
    yield after


def never(step: int) -> bool:
  """Where signals mean what they mean to Python, as in a notebook."""
  del step
  return False


@contextlib.contextmanager
def _watch(signals, tell: Callable[[], None]) -> Iterator[None]:
  """Calls `tell` at the first of some signals; the second one is the end.

  From a thread that Python wakes up at once: signal handlers would wait for the
  main thread, which may be compiling.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)

  def watch() -> None:
    came = False
    while number := os.read(reader, 1):
      if number[0] not in signals:
        continue
      name = signal.Signals(number[0]).name
      if came:
        print(f'{name} again: ends now, unsaved', file=sys.stderr, flush=True)
        os._exit(128 + number[0])
      came = True
      tell()
      print(
        f'{name}: saves after this step and ends; once more: ends at once',
        file=sys.stderr,
        flush=True,
      )

  before = {s: signal.signal(s, lambda *_: None) for s in signals}
  wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(wakeup)
    for s, handler in before.items():
      signal.signal(s, handler)
    os.close(writer)  # Ends the thread.
    thread.join()
    os.close(reader)
