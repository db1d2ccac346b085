"""How far a run is: a bar on a terminal, else a plain line now and then."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0
_SHOWN = {
  'train/loss': 'loss {:.3f}',
  'router/max_violation': 'MaxVio {:.3f}',
  'time/tokens_per_second': '{:,.0f} tokens/s',
}


class Screen:
  """Shows loss, MaxVio, speed, evaluations and the time left.

  Args:
    label: name of the run.
    step: steps completed before.
    steps: steps in total.
  """

  def __init__(self, label: str, step: int, steps: int):
    console = Console(stderr=True)
    self._bar = Progress(
      TextColumn('{task.description}'),
      BarColumn(),
      MofNCompleteColumn(),
      TextColumn('{task.fields[summary]}'),
      TimeRemainingColumn(),
      console=console,
      disable=not console.is_terminal,
    )
    self._label, self._first, self._steps = label, step, steps
    self._started = self._shown = time.monotonic()
    self._task = self._bar.add_task(
      label, total=steps, completed=step, summary='compiling'
    )
    self._bar.start()
    self._print(step, 'compiling')

  def _print(self, step: int, what: str) -> None:
    if self._bar.disable:
      line = f'{self._label}: step {step}/{self._steps}  {what}'
      print(line, file=sys.stderr, flush=True)

  def show(self, record: dict[str, Any]) -> None:
    """Shows the record of a step."""
    step, now = record['step'], time.monotonic()
    summary = _summary(record)
    self._bar.update(self._task, completed=step, summary=summary)
    done = step - self._first
    due = done == 1 or now - self._shown >= _SECONDS_BETWEEN_LINES
    if due or step == self._steps:
      self._shown = now
      seconds = (now - self._started) / max(1, done) * (self._steps - step)
      self._print(step, f'{summary}  {seconds:.0f} s left')

  def sync(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Leaves the bar as it is."""
    self._bar.stop()


def _summary(record: dict[str, Any]) -> str:
  parts = [form.format(record[k]) for k, form in _SHOWN.items() if k in record]
  parts += [
    f'{name.split("/")[1]} perplexity {value:.1f}'
    for name, value in record.items()
    if name.startswith('eval/') and name.endswith('/perplexity')
  ]
  return '  '.join(parts)
