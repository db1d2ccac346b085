"""A text that can be read more than once, and is known by a key."""

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Corpus(NamedTuple):
  """Text that is read only when asked for.

  Attributes:
    key: hash that changes when the text does.
    documents: returns the documents, in a fixed order, anew on each call.
    check: raises ValueError if the text is no longer that of `key`. It is
      called after reading and before anything is stored under that key.
  """

  key: str
  documents: Callable[[], Iterator[str]]
  check: Callable[[], None] = lambda: None
