"""A scheduler that takes a machine away says SIGTERM first: time to save.

SIGTERM and SIGINT (Ctrl-C) mean: finish the step, save, end with exit code 75.
A second one ends the process at once, unsaved, with 128 + the signal's number.
(With several processes jax watches SIGTERM, and ignores a second one until all
have come to the step after which they save.)
"""

from collections.abc import Callable, Iterator
import contextlib
import itertools
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
def notice() -> Iterator[Callable[[], bool]]:
  """Takes the first SIGTERM or SIGINT for a notice, not for the end.

  Yields:
    A function that all processes call equally often: after every step. It says
    whether to save and end now: in the same call in all of them, once any was
    told.
  """
  several = jax.distributed.is_initialized()
  told, reached = threading.Event(), threading.Event()
  # Not the run's steps: jax counts from 0, and would wait for ever for step 1
  # if the notice came before the first call of a run that goes on.
  calls = itertools.count()

  def preempted() -> bool:
    if not several:
      return told.is_set()
    if multihost_utils.reached_preemption_sync_point(next(calls)):
      reached.set()
      if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return reached.is_set()

  def tell() -> None:
    told.set()
    if several and not reached.is_set():
      os.kill(os.getpid(), signal.SIGTERM)

  if threading.current_thread() is not threading.main_thread():
    yield preempted  # Python leaves signals to the main thread.
    return
  # jax took SIGTERM over when the processes met, so that one tells all.
  with _watch((signal.SIGINT,) if several else _SIGNALS, tell):
    yield preempted


def never() -> bool:
  """Where signals mean what they mean to Python, as in a notebook."""
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
    while number := os.read(reader, 1)[0]:
      if number not in signals:
        continue
      name = signal.Signals(number).name
      if came:
        print(f'{name} again: ends now, unsaved', file=sys.stderr, flush=True)
        os._exit(128 + number)
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
    os.write(writer, b'\0')  # Ends the thread. A child may hold the pipe open.
    thread.join()
    os.close(writer)
    os.close(reader)
