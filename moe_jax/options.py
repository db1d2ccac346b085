"""Which values the options may have."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple
import unicodedata


class Range(NamedTuple):
  """The values that a number may have.

  Attributes:
    least: smallest value.
    most: greatest value. It is there to catch a slip of the hand before jax,
      numpy or the machine's memory do, not to say what is wise.
    above: whether the value must be greater than `least`.
  """

  least: float
  most: float
  above: bool = False


def check_ranges(
  values: Any, ranges: Mapping[str, Range], prefix: str = ''
) -> None:
  """Raises ValueError for the first number that is out of its range.

  Args:
    values: what has the numbers as attributes.
    ranges: name -> what is allowed.
    prefix: of the names in messages, such as 'model.'.
  """
  for name, allowed in ranges.items():
    check_range(f'{prefix}{name}', getattr(values, name), allowed)


def check_range(name: str, value: float, allowed: Range) -> None:
  """Raises ValueError, which has the name, if a number is out of its range."""
  least, most, above = allowed
  # The comparisons are such that NaN is refused.
  if not (value > least if above else value >= least):
    wanted = f'greater than {least}' if above else f'{least} or more'
  elif not value <= most:
    wanted = f'{most} or less'
  else:
    return
  raise ValueError(f'{name}={shown(value)}: must be {wanted}')


def shown(value: Any) -> str:
  """Returns `repr(value)` on one line, cut where it is long."""
  text = one_line(value, repr)
  return text if len(text) <= 60 else f'{text[:57]}...'


def one_line(value: Any, to_text: Callable[[Any], str] = str) -> str:
  """Returns the text of a value; escapes what would break the line."""
  try:
    text = to_text(value)
  except Exception:  # Of somebody's class, or a number of too many digits.
    text = type(value).__name__
  return ''.join(c if is_plain(c) else ascii(c)[1:-1] for c in text)


def is_plain(text: str) -> bool:
  """Tells whether text is one line without control characters.

  Half surrogate pairs, which stand for bytes of an argument or a path that are
  not UTF-8, are not plain either: they cannot be written to any file.
  """
  return not any(
    unicodedata.category(c) in ('Cc', 'Cs', 'Zl', 'Zp') for c in text
  )
