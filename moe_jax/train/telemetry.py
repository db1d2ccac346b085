"""What a run says: metrics.jsonl, TensorBoard events, a progress bar.

Metrics stay on the device until the next step is under way: a step never waits
for the host.
"""

import json
import math
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn
import tensorboardX

# Counts, per layer, that must be 0; not written.
INFINITE = 'router/infinite'

_PER_LAYER = '/layer'
_SECONDS_BETWEEN_LINES = 10.0


def read_steps(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a metrics file; a half-written last line is left out."""
  if not path.exists():
    return []
  lines = path.read_bytes().split(b'\n')[:-1]
  return [json.loads(line) for line in lines]


class Telemetry:
  """Writes one record a step; a context manager.

  Args:
    directory: where `metrics.jsonl` and TensorBoard's events go; None where
      another process writes them, and this one only looks for what is not
      finite.
    label: the run's name on screen.
    step: steps completed before; records of later steps, left by a run that
      got further than its last checkpoint, are removed.
    steps: steps in all.
    tokens_per_step: over all devices.
    quiet: whether to leave out the progress bar.
  """

  def __init__(
    self,
    directory: pathlib.Path | None,
    *,
    label: str,
    step: int,
    steps: int,
    tokens_per_step: int,
    quiet: bool = False,
  ):
    self._tokens_per_step = tokens_per_step
    self._outputs = []
    if directory is not None:
      self._outputs += [
        _JsonLines(directory / 'metrics.jsonl', step),
        _Events(directory, step),
      ]
      if not quiet:
        self._outputs.append(_progress(label, step, steps))
    self._pending: tuple[int, dict[str, Any], dict[str, float]] | None = None
    self.restart_clock()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.flush()
    for output in self._outputs:
      output.close()

  def restart_clock(self) -> None:
    """Leaves the time since the last record out of the next step's."""
    self._clock = time.perf_counter()

  def push(self, step: int, metrics: dict[str, Any]) -> None:
    """Records a step just dispatched; reads the one before it."""
    self.flush()
    self._pending = (step, metrics, {})

  def add(self, metrics: dict[str, float]) -> None:
    """Adds host values, such as an evaluation, to the last step pushed."""
    self._pending[2].update(metrics)

  def wait(self) -> None:
    """Waits for the last step pushed and takes its time."""
    step, metrics, extra = self._pending
    if 'time/step_seconds' in extra:
      return
    metrics = {name: np.asarray(value) for name, value in metrics.items()}
    now = time.perf_counter()
    extra['time/step_seconds'] = now - self._clock
    extra['time/tokens_per_second'] = self._tokens_per_step / (
      now - self._clock
    )
    self._clock = now
    self._pending = (step, metrics, extra)

  def flush(self) -> None:
    """Writes the last step pushed, so that nothing is pending.

    Raises:
      FloatingPointError: loss, gradient or a router's logits are not finite.
    """
    if self._pending is None:
      return
    self.wait()
    step, metrics, extra = self._pending
    self._pending = None
    infinite_L = metrics.pop(INFINITE, np.zeros(0))
    record = {'step': step}
    for name, value in metrics.items():
      if name.endswith(_PER_LAYER):
        for layer, row in enumerate(value.tolist()):
          record[f'{name}_{layer:02d}'] = row
      else:
        record[name] = value.item()
    record.update(extra)
    for output in self._outputs:
      output.show(record)
    _check_finite(record, infinite_L)


def _check_finite(record: dict[str, Any], infinite_L: np.ndarray) -> None:
  if infinite_L.any():
    layers = ', '.join(f'{i:02d}' for i in infinite_L.nonzero()[0])
    what = f'logits of the router of MoE layer {layers}'
  elif not math.isfinite(record.get('train/loss', 0.0)):
    what = 'train/loss'
  elif not math.isfinite(record.get('train/gradient_norm', 0.0)):
    what = 'train/gradient_norm'
  else:
    return
  raise FloatingPointError(
    f'step {record["step"]}: {what} NaN or infinite; no checkpoint was written '
    'since, so that the run can go on from the last one'
  )


def _line(record: dict[str, Any]) -> str:
  # JSON has no NaN or infinity.
  finite = {
    name: None if isinstance(x, float) and not math.isfinite(x) else x
    for name, x in record.items()
  }
  return json.dumps(finite, allow_nan=False) + '\n'


def _summary(record: dict[str, Any]) -> str:
  text = (
    f'loss {record["train/loss"]:.3f}  '
    f'MaxVio {record["router/max_violation"]:.3f}  '
    f'{record["time/tokens_per_second"]:,.0f} tokens/s'
  )
  perplexities = [
    f'{name.split("/")[1]} perplexity {value:.1f}'
    for name, value in record.items()
    if name.startswith('eval/') and name.endswith('/perplexity')
  ]
  return '  '.join([text, *perplexities])


class _JsonLines:
  """One object a step; flushed, so that a reader sees whole lines."""

  def __init__(self, path: pathlib.Path, step: int):
    kept = [record for record in read_steps(path) if record['step'] <= step]
    if [record['step'] for record in kept] != list(range(1, step + 1)):
      raise ValueError(
        f'{path}: must have every step up to the checkpoint of step {step}'
      )
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(_line(record) for record in kept))
    os.replace(temporary, path)
    self._file = path.open('a')

  def show(self, record):
    self._file.write(_line(record))
    self._file.flush()

  def close(self):
    self._file.close()


class _Events:
  """TensorBoard's; it has no use for lists and what is not finite."""

  def __init__(self, directory: pathlib.Path, step: int):
    self._writer = tensorboardX.SummaryWriter(
      str(directory), purge_step=step + 1
    )

  def show(self, record):
    for name, value in record.items():
      if isinstance(value, list) or not math.isfinite(value):
        continue
      if name != 'step':
        self._writer.add_scalar(name, value, record['step'])

  def close(self):
    self._writer.close()


def _progress(label, step, steps):
  console = Console(stderr=True)
  if console.is_terminal:
    return _Bar(console, label, step, steps)
  return _Lines(label, step, steps)


class _Bar:
  """A bar with loss, MaxVio, tokens/s and time left, on a terminal."""

  def __init__(self, console, label, step, steps):
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

  def show(self, record):
    self._progress.update(
      self._task, completed=record['step'], summary=_summary(record)
    )

  def close(self):
    self._progress.stop()


class _Lines:
  """Plain lines, at most one every few seconds, for logs."""

  def __init__(self, label, step, steps):
    self._label, self._first, self._steps = label, step, steps
    self._started = time.monotonic()
    self._shown = -math.inf
    print(f'{label}: step {step}/{steps}, compiling', file=sys.stderr)

  def show(self, record):
    now = time.monotonic()
    last = record['step'] == self._steps
    if not last and now - self._shown < _SECONDS_BETWEEN_LINES:
      return
    self._shown = now
    done, left = record['step'] - self._first, self._steps - record['step']
    seconds = (now - self._started) / done * left
    print(
      f'{self._label}: step {record["step"]}/{self._steps}  '
      f'{_summary(record)}  {seconds:.0f} s left',
      file=sys.stderr,
      flush=True,
    )

  def close(self):
    pass
