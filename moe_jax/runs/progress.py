"""How far a run is, on the screen: a bar on a terminal, else plain lines."""

import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0
_SHOWN = {
  'train/loss': 'loss {:.3f}',
  'router/max_violation': 'MaxVio {:.3f}',
  'time/tokens_per_second': '{:,.0f} tokens/s',
}


def open_progress(label: str, step: int, steps: int) -> 'Bar | Lines':
  """Returns what shows how a run goes on from `step` to `steps`."""
  console = Console(stderr=True)
  kind = Bar if console.is_terminal else Lines
  return kind(console, label, step, steps)


def _summary(record: dict[str, Any]) -> str:
  parts = [form.format(record[k]) for k, form in _SHOWN.items() if k in record]
  parts += [
    f'{name.split("/")[1]} perplexity {value:.1f}'
    for name, value in record.items()
    if name.startswith('eval/') and name.endswith('/perplexity')
  ]
  return '  '.join(parts)


class Bar:
  """A bar with loss, MaxVio, tokens/s and time left."""

  def __init__(self, console: Console, label: str, step: int, steps: int):
    self._progress = Progress(
      TextColumn('{task.description}'),
      BarColumn(),
      MofNCompleteColumn(),
      TextColumn('{task.fields[summary]}'),
      TimeRemainingColumn(),
      console=console,
    )
    self._task = self._progress.add_task(
      label, total=steps, completed=step, summary='compiling'
    )
    self._progress.start()

  def show(self, record: dict[str, Any]) -> None:
    """Shows the record of a step."""
    self._progress.update(
      self._task, completed=record['step'], summary=_summary(record)
    )

  def sync(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Leaves the bar as it is."""
    self._progress.stop()


class Lines:
  """Plain lines for logs, at most one every few seconds."""

  def __init__(self, console: Console, label: str, step: int, steps: int):
    del console
    self._label, self._first, self._steps = label, step, steps
    self._started = time.monotonic()
    self._shown = -math.inf
    self._say(step, 'compiling')

  def _say(self, step: int, what: str) -> None:
    print(
      f'{self._label}: step {step}/{self._steps}  {what}',
      file=sys.stderr,
      flush=True,
    )

  def show(self, record: dict[str, Any]) -> None:
    """Prints the record of a step, if it is time for a line."""
    now, step = time.monotonic(), record['step']
    if step < self._steps and now - self._shown < _SECONDS_BETWEEN_LINES:
      return
    self._shown = now
    done = max(1, step - self._first)
    seconds = (now - self._started) / done * (self._steps - step)
    self._say(step, f'{_summary(record)}  {seconds:.0f} s left')

  def sync(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""
