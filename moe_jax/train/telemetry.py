"""What a run says: metrics.jsonl, TensorBoard events, a progress bar.

Metrics stay on the device until the next step is under way: a step never waits
for the host.
"""

import contextlib
import dataclasses
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

from moe_jax.train import workdir
from moe_jax.train.events import Events

_PER_LAYER = '/layer'
_SECONDS_BETWEEN_LINES = 10.0


def read_steps(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a metrics file; a half-written last line is left out.

  Raises:
    ValueError: another line is no JSON object; the message has its number.
  """
  return [_parse(path, i, line) for i, line in enumerate(_lines_of(path))]


def _lines_of(path: pathlib.Path) -> list[bytes]:
  return path.read_bytes().split(b'\n')[:-1] if path.exists() else []


def _parse(path: pathlib.Path, index: int, line: bytes) -> dict[str, Any]:
  try:
    record = json.loads(line)
    record['step']
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f'{path}: line {index + 1} is damaged, no record of a step'
    ) from error
  return record


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
    skipped: steps before that were not finite: how many, and how many of them
      came last, in a row.
    allowed: so many in a row end the run.
    experts_every: steps between records of what is known of every expert.
    text: what the run is, Markdown, for TensorBoard.
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
    skipped: tuple[int, int] = (0, 0),
    allowed: int = 1,
    experts_every: int = 1,
    text: str = '',
    quiet: bool = False,
  ):
    self._directory = directory
    self._tokens_per_step = tokens_per_step
    self.skipped, self.skipped_in_a_row = skipped
    self._allowed, self._experts_every = allowed, experts_every
    self._outputs = []
    if directory is not None:
      self._outputs += [
        _JsonLines(directory / 'metrics.jsonl', step),
        Events(directory, step=step, steps=steps, text=text),
      ]
      if not quiet:
        self._outputs.append(_progress(label, step, steps))
    self._pending: _Step | None = None
    self.restart_clock()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    with contextlib.ExitStack() as stack:
      for output in self._outputs:
        stack.callback(output.close)
      self.flush()

  def restart_clock(self) -> None:
    """Leaves the time since the last record out of the next step's."""
    self._clock = time.perf_counter()

  def push(
    self,
    step: int,
    metrics: dict[str, Any],
    diagnostics: dict[str, Any],
    sequences: range = range(0),
  ) -> None:
    """Records a step just dispatched; reads the one before it.

    Args:
      step: its number.
      metrics: on the device.
      diagnostics: on the device, for the report of a step that was skipped:
        `infinite`, per MoE layer, and sums of `squares`.
      sequences: indices of its training sequences.
    """
    self.flush()
    self._pending = _Step(step, metrics, diagnostics, sequences)

  def add(self, metrics: dict[str, float]) -> None:
    """Adds host values, such as an evaluation, to the last step pushed."""
    self._pending.extra.update(metrics)

  def wait(self) -> None:
    """Waits for the last step pushed and takes its time."""
    pending = self._pending
    if 'time/step_seconds' in pending.extra:
      return
    pending.metrics = {
      name: np.asarray(value) for name, value in pending.metrics.items()
    }
    now = time.perf_counter()
    seconds, self._clock = now - self._clock, now
    pending.extra['time/step_seconds'] = seconds
    pending.extra['time/tokens_per_second'] = self._tokens_per_step / seconds

  def flush(self, *, sync: bool = False) -> None:
    """Writes the last step pushed, so that nothing is pending.

    Args:
      sync: whether to wait until it is on the disk.

    Raises:
      FloatingPointError: too many steps in a row were not finite.
    """
    if self._pending is not None:
      self.wait()
      pending, self._pending = self._pending, None
      self._write(pending)
    if sync:
      for output in self._outputs:
        output.sync()

  def _write(self, pending: '_Step') -> None:
    record = {'step': pending.step}
    for name, value in pending.metrics.items():
      if name.endswith(_PER_LAYER):
        for layer, row in enumerate(value.tolist()):
          record[f'{name}_{layer:02d}'] = row
      else:
        record[name] = value.item()
    record.update(pending.extra)
    cause = _not_finite(record, pending.diagnostics.get('infinite', ()))
    self.skipped += bool(cause)
    self.skipped_in_a_row = self.skipped_in_a_row + 1 if cause else 0
    record['train/skipped_steps'] = self.skipped
    shown = record
    if pending.step % self._experts_every:
      shown = {k: v for k, v in record.items() if not isinstance(v, list)}
    for output in self._outputs:
      output.show(shown)
    if cause:
      self._report(cause, record, pending)

  def _report(self, cause: str, record: dict[str, Any], pending: '_Step'):
    """Warns of a skipped step; ends the run if there were too many in a row."""
    what = f'step {pending.step}: {cause} NaN or infinite'
    count = f'{self.skipped_in_a_row} in a row, {self._allowed} end the run'
    if self.skipped_in_a_row < self._allowed:
      if self._outputs:
        print(f'warning: {what}; skipped ({count})', file=sys.stderr)
      return
    name = f'not_finite_step_{pending.step:08d}.json'
    if self._directory is not None:
      workdir.write_json(
        self._directory / name,
        {
          'step': pending.step,
          'cause': cause,
          'skipped_in_a_row': self.skipped_in_a_row,
          'sequences': list(pending.sequences),
          'record': _finite(record),
          'norms': {
            kind: {
              name: _finite(np.sqrt(np.asarray(x)).tolist())
              for name, x in squares.items()
            }
            for kind, squares in pending.diagnostics['squares'].items()
          },
        },
      )
    raise FloatingPointError(
      f'{what} ({count}); parameters and router are as they were, see {name}; '
      'the run can go on from its last checkpoint'
    )


@dataclasses.dataclass
class _Step:
  """A step that was dispatched; `extra` is known on the host."""

  step: int
  metrics: dict[str, Any]
  diagnostics: dict[str, Any]
  sequences: range
  extra: dict[str, float] = dataclasses.field(default_factory=dict)


def _not_finite(record: dict[str, Any], infinite_L: Any) -> str:
  """Returns what of a step is not finite; '' if all is well."""
  infinite_L = np.asarray(infinite_L)
  if infinite_L.any():
    layers = ', '.join(f'{i:02d}' for i in infinite_L.nonzero()[0])
    return f'logits of the router of MoE layer {layers}'
  for name in ('train/loss', 'train/aux_loss', 'train/gradient_norm'):
    if not math.isfinite(record.get(name, 0.0)):
      return name
  return ''


def _finite(value: Any) -> Any:
  """Puts None for what is not finite: JSON has no NaN or infinity."""
  if isinstance(value, dict):
    return {name: _finite(x) for name, x in value.items()}
  if isinstance(value, list):
    return [_finite(x) for x in value]
  infinite = isinstance(value, float) and not math.isfinite(value)
  return None if infinite else value


def _line(record: dict[str, Any]) -> bytes:
  return (json.dumps(_finite(record), allow_nan=False) + '\n').encode()


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
    lines = _lines_of(path)
    if len(lines) > step:
      print(
        f'{path}: what was recorded after step {step}, the last one saved, is '
        f'computed again',
        file=sys.stderr,
      )
    lines = lines[:step]
    numbers = [_parse(path, i, line)['step'] for i, line in enumerate(lines)]
    if numbers != list(range(1, step + 1)):
      raise ValueError(
        f'{path}: must have every step up to the checkpoint of step {step}'
      )
    temporary = path.with_suffix('.tmp')
    with temporary.open('wb') as file:
      file.writelines(line + b'\n' for line in lines)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
    # A record fits: what the disk has no room for can wait in the buffer.
    self._path, self._file = path, path.open('ab', buffering=1 << 22)

  def show(self, record):
    self._file.write(_line(record))
    workdir.patiently(self._file.flush, str(self._path))

  def sync(self):
    os.fsync(self._file.fileno())

  def close(self):
    self._file.close()


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

  def sync(self):
    pass

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

  def sync(self):
    pass

  def close(self):
    pass
