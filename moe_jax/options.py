"""What is said of an option in one place, and how values are checked by it.

An option is a field of a dataclass, declared by `option` with its default, its
range and whether it may change; the string below the field says its meaning.
Refusals, the reference in the docs and the check of a continued run all read
that.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import difflib
import math
from typing import Any, Literal, NamedTuple
import unicodedata

Change = Literal['no', 'named', 'yes']


class Option(NamedTuple):
  """What is known of an option beside its name, type, default and meaning.

  Attributes:
    least: smallest number.
    above: number that the value must exceed.
    most: greatest number. It is there to catch a slip of the hand before jax,
      numpy or the machine's memory do, not to say what is wise.
    among: all strings that it may be.
    change: whether it may change when a run is continued, and differ between
      runs that are compared. 'yes': it changes nothing that is computed;
      'named': only where --allow_config_change names it; 'no': another value is
      another run.
  """

  least: float | None = None
  above: float | None = None
  most: float | None = None
  among: tuple[str, ...] = ()
  change: Change = 'no'

  def check(self, name: str, value: Any) -> None:
    """Raises ValueError, which has the name, if the value is impossible."""
    # The comparisons are such that NaN is refused.
    for holds, wanted in (
      (self.above is None or value > self.above, f'greater than {self.above}'),
      (self.least is None or value >= self.least, f'{self.least} or more'),
      (self.most is None or value <= self.most, f'{self.most} or less'),
      (not self.among or value in self.among, f'one of {self.among}'),
    ):
      if not holds:
        raise ValueError(f'{name}={shown(value)}: must be {wanted}')


def option(default: Any, **known: Any) -> Any:
  """Declares a field of a dataclass as an option.

  Args:
    default: its value where none is given.
    **known: what is known of it, see `Option`.
  """
  metadata = {Option: Option(**known)}
  return dataclasses.field(default=default, metadata=metadata)


def options_of(kind: type, prefix: str = '') -> dict[str, dataclasses.Field]:
  """Returns the options of a dataclass and of its sections, by full name."""
  found = {}
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(field.type):
      found |= options_of(field.type, f'{prefix}{field.name}.')
    elif Option in field.metadata:
      found[prefix + field.name] = field
  return found


def check_options(section: Any, prefix: str = '') -> None:
  """Raises ValueError for the first option of a dataclass that is impossible.

  Args:
    section: an instance.
    prefix: of the names in messages, such as 'model.'.
  """
  for field in dataclasses.fields(section):
    if Option in field.metadata:
      value = getattr(section, field.name)
      field.metadata[Option].check(prefix + field.name, value)


def build(kind: type, options: Mapping[str, Any], prefix: str = '') -> Any:
  """Builds a dataclass and its sections; checks all names and types."""
  fields = {field.name: field.type for field in dataclasses.fields(kind)}
  checked = {}
  for name, value in options.items():
    full_name = f'{prefix}{one_line(name)}'
    if name not in fields:
      raise ValueError(f'{full_name}: {expected(name, fields)}')
    wanted = fields[name]
    if dataclasses.is_dataclass(wanted):
      value = build(wanted, group(full_name, value), f'{full_name}.')
    elif wanted in (bool, int, float, str):
      value = typed(full_name, value, wanted)
    checked[name] = value
  return kind(**checked)


def group(name: str, value: Any) -> Mapping[str, Any]:
  """Returns the value, or raises ValueError where it is no group of options."""
  if not isinstance(value, Mapping):
    raise ValueError(f'{name}={shown(value)}: must be a group of options')
  return value


def typed(name: str, value: Any, wanted: type) -> Any:
  """Returns a value of the type `wanted`, or raises ValueError with the name.

  A whole number does for a float.
  """
  if wanted is float and type(value) is int and abs(value) < 2**1000:
    return float(value)
  if type(value) is not wanted:
    raise ValueError(
      f'{name}={shown(value)}: must be of type {wanted.__name__}'
    )
  if wanted is float and not math.isfinite(value):
    raise ValueError(f'{name}={value}: must be finite')
  if wanted is str and not is_plain(value):
    raise ValueError(
      f'{name}={shown(value)}: must be one line without control characters'
    )
  return value


def expected(name: Any, known: Iterable[str]) -> str:
  """Says of an unknown name which are known and which was meant perhaps."""
  known = sorted(known)
  close = difflib.get_close_matches(str(name), known, n=1)
  hint = f'did you mean {close[0]}? ' if close else ''
  return f'unknown; {hint}known are {", ".join(known) or "none"}'


class Refused(ValueError):
  """What was asked for cannot be done; the message says why, in one line."""


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
