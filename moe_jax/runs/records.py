"""metrics.jsonl: one JSON object a step. All reading and writing of it is here.

A line without its end is being written, or was when the process was killed; it
counts as not there.
"""

from collections.abc import Iterable, Iterator
import json
import math
import os
import pathlib
import sys
from typing import Any

from moe_jax import storage
from moe_jax.runs import files

NAME = 'metrics.jsonl'

Record = dict[str, Any]


def read(path: pathlib.Path) -> list[Record]:
  """Reads all records; NaN is what was not finite.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is damaged, or steps do not increase.
  """
  return list(_parse(path, files.read(path).splitlines(keepends=True)))


def _parse(path: pathlib.Path, lines: Iterable[bytes]) -> Iterator[Record]:
  before = 0
  for number, line in enumerate(lines, start=1):
    if not line.endswith(b'\n'):
      return
    try:
      record = json.loads(line)
      step = record['step']
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f'{path}: line {number} is damaged, no record of a step: {line[:60]}'
      ) from error
    if step <= before:
      raise ValueError(f'{path}: line {number}: step {step} after {before}')
    before = step
    yield {k: math.nan if v is None else v for k, v in record.items()}


def _kept(path: pathlib.Path, step: int, record: Record | None) -> Iterator:
  """Yields the lines up to a step, and that of its record if only it lacks."""
  count = 0
  if path.exists():
    with path.open('rb') as file:
      for line in file:
        if count == step:
          print(
            f'{path}: what was recorded after step {step}, the last one saved, '
            'is computed again',
            file=sys.stderr,
          )
          break
        if not line.endswith(b'\n'):
          break
        count += 1
        yield line
  if count == step - 1 and record:
    yield _line(record)


class Writer:
  """Appends records, so that a reader sees whole lines.

  Args:
    path: of the file.
    step: of the checkpoint that the run resumes from; later records, left by a
      run that got further, are removed.
    record: of that very step, which the file may lack.

  Attributes:
    last: the last record; empty before the first one.
    evaluations: step -> metrics, of the steps before this start.

  Raises:
    ValueError: the file lacks a step before.
  """

  def __init__(
    self, path: pathlib.Path, step: int, record: Record | None = None
  ):
    steps, self.last, self.evaluations, self._last_size = [], {}, {}, 0
    temporary = path.with_suffix('.tmp')
    with temporary.open('wb') as file:

      def copied() -> Iterator[bytes]:
        for line in _kept(path, step, record):
          self._last_size = file.write(line)
          yield line

      for found in _parse(path, copied()):  # They can be gigabytes.
        steps.append(found['step'])
        self.last = found
        if values := {k: x for k, x in found.items() if k.startswith('eval/')}:
          self.evaluations[found['step']] = values
      if steps != list(range(1, step + 1)):
        raise ValueError(
          f'{path}: must have every step up to the checkpoint of step {step}'
        )
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
    # A record fits: what the disk has no room for can wait in the buffer.
    self._path, self._file = path, path.open('r+b', buffering=1 << 22)
    self._file.seek(0, os.SEEK_END)

  def show(self, record: Record) -> None:
    """Appends the record of a step, or of the last one again with more in it.

    The longer line takes the place of the last one in a single write: at any
    time the file has every step.
    """
    if record['step'] == self.last.get('step'):
      record = self.last | record
      self._file.seek(-self._last_size, os.SEEK_CUR)
    line = _line(record)
    self.last, self._last_size = record, len(line)
    self._file.write(line)
    storage.patiently(self._file.flush, str(self._path))
    self._file.truncate()  # Should the line before have been longer.

  def sync(self) -> None:
    """Waits until all is on the disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Writes what is in the buffer."""
    self._file.close()


def finite(value: Any) -> Any:
  """Puts None for what is not finite: JSON has no NaN or infinity."""
  if isinstance(value, dict):
    return {name: finite(x) for name, x in value.items()}
  if isinstance(value, list):
    return [finite(x) for x in value]
  infinite = isinstance(value, float) and not math.isfinite(value)
  return None if infinite else value


def _line(record: Record) -> bytes:
  return (json.dumps(finite(record), allow_nan=False) + '\n').encode()
