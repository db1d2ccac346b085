"""A scheduler that takes a machine away says SIGTERM first: time to save."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
  """The run was saved and is to be continued by the same command."""


@contextlib.contextmanager
def notice() -> Iterator[Callable[[int], bool]]:
  """Takes SIGTERM for a notice, not for the end.

  Yields:
    A function that all processes call after every step, with its number. It
    says whether to save and end now: after the same step in all of them, once
    any was told.
  """
  if jax.distributed.is_initialized():
    # jax took the signal over when the processes met.
    yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False  # Python leaves signals to the main thread.
    return
  told = threading.Event()
  before = signal.signal(signal.SIGTERM, lambda *_: told.set())
  try:
    yield lambda step: told.is_set()
  finally:
    signal.signal(signal.SIGTERM, before)
