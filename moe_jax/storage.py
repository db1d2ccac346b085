"""Disks and buckets: which is which, and what to do when they fail."""

from collections.abc import Callable
import os
import re
import sys
import time
from typing import TypeVar

import fsspec

T = TypeVar('T')

# Seconds before what failed is tried again.
PAUSES = (5.0, 20.0)

# Errors of disk, network or memory: tensorstore tells them in a ValueError (2,
# ENOENT, is a missing file), and libraries have their own.
_MAY_PASS = re.compile(
  r'\b(PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED'
  r'|UNAUTHENTICATED|ABORTED|CANCELLED|OS error (?!2\b))'
)
_OF_NETWORKS = ('aiohttp', 'gcsfs', 'google', 'requests', 'urllib3')
_OF_DAMAGE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Tells whether a path names a bucket rather than a directory."""
  return '://' in os.fspath(path)


def ask_buckets_anew() -> None:
  """Lets no listing of a bucket be kept, as other processes write to it.

  For file systems that are opened from now on; by default they keep what they
  saw for ever.
  """
  fsspec.config.conf.setdefault('gs', {})['use_listings_cache'] = False


def may_pass(error: BaseException) -> bool:
  """Whether an error tells of disk, network or memory, not of the data."""
  if isinstance(error, OSError | MemoryError):
    return not isinstance(error, _OF_DAMAGE)
  library = type(error).__module__.partition('.')[0]
  return library in _OF_NETWORKS or bool(_MAY_PASS.search(str(error)))


def patiently(
  call: Callable[[], T],
  what: str,
  again: Callable[[Exception], bool] = lambda error: True,
) -> T:
  """Calls a function; where the file system fails, again, twice at most.

  Args:
    call: the function.
    what: of the warning that it is called again.
    again: whether an error may not come another time; another ends the tries.
  """
  for pause in PAUSES:
    try:
      return call()
    except Exception as error:  # Buckets have errors of their own.
      if not again(error):
        raise
      print(
        f'warning: {what}: {error}; tries again in {pause:.0f} s',
        file=sys.stderr,
      )
      time.sleep(pause)
  return call()
