"""Follows a run that is being trained, reading only what is new."""

from collections import deque
import json
import math
import os
import pathlib
import statistics
from typing import Any

from moe_jax.analysis.run import Run

_STEPS = 1000  # so many of the last steps are kept
_BYTES = 1 << 24  # of a file that is long already, so much of its end is read
_LAYER = 'router/max_violation/'
# Between two steps there may be an evaluation or a checkpoint.
_SECONDS_OF_SILENCE = 60.0
_STEPS_OF_SILENCE = 20


class Followed:
  """What is known of a run so far.

  Attributes:
    workdir: the work directory; it need not exist yet.
    name: what it is called on the screen.
    steps: records of the last steps, without lists; NaN is what was not finite.
    evaluations: of each set, the step and perplexity (q frozen) of the last.
    total: steps in all; 0 if that is not known yet.
    written: when the last step was, in seconds since the epoch.

  Raises:
    ValueError: the work directory is remote.
  """

  def __init__(self, workdir: str | os.PathLike[str], name: str):
    if '://' in os.fspath(workdir):
      raise ValueError(
        f'{workdir}: a run there uploads its metrics with each checkpoint '
        'only; watch a copy'
      )
    self.workdir = pathlib.Path(workdir)
    self.name = name
    self.total = 0
    self.written = math.nan
    self._forget(inode=0, size=0)

  def _forget(self, inode: int, size: int) -> None:
    self.steps: deque[dict[str, Any]] = deque(maxlen=_STEPS)
    self.evaluations: dict[str, tuple[int, float]] = {}
    self._inode, self._offset = inode, max(0, size - _BYTES)
    self._inside_line = self._offset > 0

  def look(self) -> None:
    """Reads what was written since the last look.

    Raises:
      ValueError: a line is damaged.
      OSError: the files cannot be read.
    """
    path = self.workdir / 'metrics.jsonl'
    try:
      with path.open('rb') as file:
        status = os.fstat(file.fileno())
        # A run that goes on from a checkpoint writes the file anew.
        if status.st_ino != self._inode or status.st_size < self._offset:
          self._forget(status.st_ino, status.st_size)
        file.seek(self._offset)
        lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
      return self._forget(inode=0, size=0)
    self.written = status.st_mtime
    if lines and not lines[-1].endswith(b'\n'):
      lines.pop()  # It is being written.
    if lines:
      self.total = Run(self.workdir).config['steps']
      self._offset += sum(map(len, lines))
      try:
        records = [_parse(path, x) for x in lines[self._inside_line :]]
        if self.steps and records[0]['step'] != self.step + 1:
          raise ValueError(f'{path}: step {self.step + 1} is missing')
      except ValueError:
        if not self.steps:
          raise
        self._forget(inode=0, size=0)
        return self.look()  # It was written anew, in place.
      self._inside_line = False
      for record in records:
        self._add(record)

  def _add(self, record: dict[str, Any]) -> None:
    self.steps.append(
      {
        key: math.nan if value is None else value
        for key, value in record.items()
        if not isinstance(value, list)
      }
    )
    for key, value in self.last.items():
      if key.startswith('eval/') and key.endswith('/perplexity'):
        self.evaluations[key.split('/')[1]] = (self.step, value)

  @property
  def last(self) -> dict[str, Any]:
    """The record of the last step."""
    return self.steps[-1]

  @property
  def step(self) -> int:
    """The last step; 0 before the first."""
    return self.last['step'] if self.steps else 0

  @property
  def layers(self) -> dict[str, list[float]]:
    """MaxVio of each layer over the steps that are kept."""
    if not self.steps:
      return {}
    return {
      key.removeprefix(_LAYER): [step[key] for step in self.steps]
      for key in sorted(self.last)
      if key.startswith(_LAYER)
    }

  @property
  def finished(self) -> bool:
    """Whether the last of the configured steps was completed."""
    return self.step == self.total > 0

  @property
  def step_seconds(self) -> float:
    """Median time of the last hundred steps; NaN before the first."""
    times = [step['time/step_seconds'] for step in list(self.steps)[-100:]]
    return statistics.median(times) if times else math.nan

  @property
  def seconds_left(self) -> float:
    """Time for the steps that are left, without evaluations and saves."""
    return (self.total - self.step) * self.step_seconds

  def state(self, now: float) -> str:
    """Returns waiting, running, silent, gave up, or finished.

    Args:
      now: seconds since the epoch.
    """
    if not self.steps:
      return 'waiting'
    if self.finished:
      return 'finished'
    dump = f'not_finite_step_{self.step:08d}.json'
    if (self.workdir / dump).exists():
      return 'gave up'
    patience = max(_SECONDS_OF_SILENCE, _STEPS_OF_SILENCE * self.step_seconds)
    return 'silent' if now - self.written > patience else 'running'


def _parse(path: pathlib.Path, line: bytes) -> dict[str, Any]:
  try:
    record = json.loads(line)
    record['step']
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'{path}: no record of a step: {line[:60]}') from error
  return record
