"""TensorBoard's events: scalars, histograms over experts, and what a run is."""

from collections.abc import Mapping
import json
import math
import pathlib
import sys
import textwrap
import time
from typing import Any

import numpy as np
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

_SECONDS_BETWEEN_FLUSHES = 30.0
# So many a run, however long: TensorBoard keeps 500 of a name and draws 51.
# For 61 layers of 256 experts, about 24 MB; 100k steps of scalars, 240 MB.
_HISTOGRAMS = 200
_BUCKETS = 30  # TensorBoard's own number
_OVER_MEAN = ('router/load/', 'router/gates/')


class Shown:
  """Picks what is shown of records: all scalars, and lists now and then.

  Lists are over experts: loads and gates in units of their mean (a peak at 1 is
  balance), all else as it is. What is not finite is skipped.

  Args:
    step: steps completed before.
    steps: steps in total.
  """

  def __init__(self, *, step: int, steps: int):
    self._between = math.ceil(steps / _HISTOGRAMS)
    self._next = step + 1

  def of(
    self, record: Mapping[str, Any]
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns the scalars of a record and, if they are due, its lists."""
    lists = {k: x for k, x in record.items() if isinstance(x, list)}
    scalars = {
      k: x
      for k, x in record.items()
      if k != 'step' and k not in lists and math.isfinite(x)
    }
    if not lists or record['step'] < self._next:
      return scalars, {}
    self._next = record['step'] + self._between
    found = {k: _over_experts(k, values) for k, values in lists.items()}
    return scalars, {
      k: x_E for k, x_E in found.items() if np.isfinite(x_E).all()
    }


class Events:
  """Writes a file of events: scalars, and histograms over experts, see `Shown`.

  Written by this thread: tensorboardX's own would leave the run waiting for
  ever if the disk were full.

  Args:
    directory: where the file goes.
    step: steps completed before; TensorBoard forgets what it has of later ones.
    steps: steps in all.
    text: what the run is, Markdown.
  """

  def __init__(
    self, directory: pathlib.Path, *, step: int, steps: int, text: str = ''
  ):
    self._writer = event_file_writer.EventsWriter(str(directory / 'events'))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(event_pb2.Event(step=step + 1, session_log=start))
    if text:
      described = summary.text('run', text)
      self._write(event_pb2.Event(step=step + 1, summary=described))
    self._shown = Shown(step=step, steps=steps)
    self._due = time.monotonic()

  def show(self, record: Mapping[str, Any]) -> None:
    """Writes the metrics of a step."""
    event = event_pb2.Event(step=record['step'])
    scalars, lists = self._shown.of(record)
    for name, value in scalars.items():
      event.summary.MergeFrom(summary.scalar(name, value))
    for name, values_E in lists.items():
      event.summary.MergeFrom(summary.histogram(name, values_E, bins=_BUCKETS))
    self._write(event)
    if time.monotonic() >= self._due:
      self.sync()
      self._due = time.monotonic() + _SECONDS_BETWEEN_FLUSHES

  def sync(self) -> None:
    """Writes to the disk what is in the buffer."""
    self._try(lambda: self._writer.flush())

  def close(self) -> None:
    """Writes what is left."""
    self._try(lambda: self._writer.close())

  def _write(self, event):
    event.wall_time = time.time()
    self._try(lambda: self._writer.write_event(event))

  def _try(self, write):
    """Gives up on a disk error: the metrics are in the other file, too."""
    try:
      if self._writer is not None:
        write()
    except OSError as error:
      print(f'warning: no more TensorBoard events: {error}', file=sys.stderr)
      self._writer = None


def describe(
  label: str, options: Mapping[str, Any], facts: Mapping[str, Any]
) -> str:
  """Returns what a run is as Markdown.

  Args:
    label: its name.
    options: its config.
    facts: its `run.json`.
  """
  parts = [
    f'# {label}',
    'Histograms are over the experts of a layer. `router/load` and '
    "`router/gates` are each expert's load and gates over their mean: a peak "
    'at 1 is balance.',
  ]
  for title, values in (('Options', options), ('Facts', facts)):
    # A block of code: what is in it means itself.
    code = textwrap.indent(json.dumps(values, indent=2), '    ')
    parts += [f'## {title}', code]
  return '\n\n'.join(parts)


def _over_experts(name: str, values: list[float]) -> np.ndarray:
  """Returns a list's histogram values; NaN where their mean is no unit."""
  values_E = np.array(values, np.float64)
  if name.startswith(_OVER_MEAN):
    values_E /= values_E.mean() or math.nan  # No token, no load.
  return values_E
