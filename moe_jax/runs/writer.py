"""A work directory, written: the one object by which a run leaves anything.

Metrics stay on the device until the next step is under way: a step never waits
for the host. The first process writes all that is not a checkpoint.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import math
import re
import sys
import time
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from moe_jax import storage
from moe_jax.runs import (
  checkpoints,
  events,
  files,
  lock,
  processes,
  records,
  tracker,
)
from moe_jax.runs import routes as routes_lib
from moe_jax.runs.progress import Screen
from moe_jax.runs.reader import Reader
from moe_jax.runs.saver import Saver

# Its mean decides which checkpoints are best; of a mixture there are several.
_LOSS = re.compile(r'eval/validation(_.*)?/bits_per_byte')
_PER_LAYER = '/layer'


@contextlib.contextmanager
def open_writer(
  workdir: epath.Path,
  config: dict[str, Any],
  label: str,
  check: Callable[[], None],
) -> Iterator['Writer']:
  """Holds a work directory for one run, until the end of the `with` block.

  Args:
    workdir: from `files.open_workdir`.
    config: the nested options of the run.
    label: its name on the screen.
    check: raises ValueError if the directory holds another run.

  Raises:
    Refused: another run holds the directory, or `check` says no.
  """
  with contextlib.ExitStack() as stack:
    with processes.agreement():
      if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
      still_ours = stack.enter_context(lock.hold(workdir))
      check()  # Another run may have come first.
    yield Writer(workdir, config, label, still_ours, stack)


class Writer:
  """Writes config, facts, metrics, events, checkpoints; see `open_writer`.

  First `restore`, `begin` and `open`, then `record` for each step, with `save`
  and `add` after those that are saved and evaluated.

  Attributes:
    facts: what `run.json` says; empty where there is no checkpoint.
    evaluated: whether the step that the run resumes from was evaluated.
    saved_step: that of the newest checkpoint; 0 where there is none.
  """

  def __init__(self, workdir, config, label, still_ours, stack):
    self._workdir, self._config, self._label = workdir, config, label
    self._still_ours, self._stack = still_ours, stack
    self.facts: dict[str, Any] = {}
    self._largest = 0  # bytes of the largest array
    self._outputs: list[Any] = []
    # Of the last step, on the device: its number, metrics and diagnostics.
    self._pending: tuple[int, dict[str, Any], dict[str, Any]] | None = None
    self._record: records.Record = {}  # Known, but not yet written.
    self._waited = 0.0  # Seconds, for the batch of the step under way.

  def restore(
    self, plan: Callable[[dict[str, Any]], checkpoints.Items]
  ) -> checkpoints.Saved | None:
    """Reads the newest checkpoint that is whole; None where there is none.

    Args:
      plan: from the options that a checkpoint was saved under to the abstract
        items to restore, with shardings.

    Raises:
      Refused: no checkpoint is of use, steps would be lost, or too little room
        is left for checkpoints.
      OSError: a checkpoint cannot be read now.
    """
    directory = self._workdir / 'checkpoints'
    leaves = jax.tree.leaves(plan(self._config))
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    self._largest = max(sizes)
    with processes.agreement() as agreed:
      found = checkpoints.steps(directory)
      agreed['checkpoints in --workdir'] = str(found)
      if found:
        self.facts = Reader(self._workdir).facts
      if jax.process_index() == 0:
        missing = self._config['checkpoints_kept'] + 1 - len(found)
        files.check_space(self._workdir, sum(sizes), max(1, missing))
        if not found:
          self._check_nothing_is_lost()
    run = self.facts.get('run', '')
    return checkpoints.restore_newest(directory, run, plan) if found else None

  def _check_nothing_is_lost(self) -> None:
    """Raises ValueError if there are more steps than a run has unsaved."""
    path = self._workdir / records.NAME
    count = path.read_bytes().count(b'\n') if path.exists() else 0
    every = self._config['checkpoint_every']
    if (self._workdir / 'config.json').exists():  # Those steps' own.
      every = max(every, Reader(self._workdir).config['checkpoint_every'])
    if count > 2 * every:
      raise ValueError(
        f'{path}: has {count} steps, but there is no checkpoint beside it; '
        'bring the checkpoints back, or choose another --workdir to begin anew'
      )

  def begin(
    self,
    saved: checkpoints.Saved | None,
    facts: dict[str, Any],
    tokenizer: dict[str, Any],
  ) -> None:
    """Writes what the run is; its metrics go on from its checkpoint.

    Args:
      saved: what the run resumes from.
      facts: for run.json.
      tokenizer: for tokenizer.json: who has the work directory can read and
        write the model's tokens.
    """
    self._position = saved.position if saved else checkpoints.Position()
    self.saved_step = self._position.step
    self.facts, self._last, evaluations = facts, {}, {}
    with processes.agreement():
      self._directory, self._upload = self._stack.enter_context(
        files.local_log(self._workdir, self._still_ours)
      )
      self._stack.callback(self._close)
      if self._directory is not None:
        # Before config.json, whose checkpoint_every the steps so far are under.
        path, record = self._directory / records.NAME, saved and saved.record
        metrics = records.Writer(path, self.saved_step, record)
        self._outputs = [metrics]
        self._last, evaluations = metrics.last, metrics.evaluations
        files.write_json(self._workdir / 'config.json', self._config)
        files.write_json(self._workdir / 'tokenizer.json', tokenizer)
        files.write_json(self._workdir / 'run.json', facts)
        routes_lib.remove_after(self._workdir, self.saved_step)
    with processes.agreement():
      files.check_shared(self._workdir, self._config)
    self._losses = {step: _loss(values) for step, values in evaluations.items()}
    # The first process alone has read that.
    evaluated = np.int32(self.saved_step in evaluations)
    self.evaluated = bool(multihost_utils.broadcast_one_to_all(evaluated))

  def open(self, seconds_at_peak: float | None = None) -> None:
    """Opens what the coming steps need: checkpoints, events, progress bar.

    Args:
      seconds_at_peak: of a step, if its devices did nothing but its useful
        FLOPs; None where that is not known.
    """
    self._seconds_at_peak = seconds_at_peak
    step, steps = self._position.step, self._config['steps']
    with processes.agreement():
      self._saver = self._stack.enter_context(
        Saver(
          self._workdir / 'checkpoints',
          self._config,
          self.facts.get('run', ''),
          losses=self._losses,
          largest=self._largest,
        )
      )
      if self._directory is not None:
        board = events.Events(
          self._directory,
          step=max(0, step - 1),
          steps=steps,
          text=events.describe(self._label, self._config, self.facts),
        )
        if self._last:  # It may be known from the checkpoint alone.
          board.show(self._last)
        self._outputs.append(board)
        if self._config['tracker']:
          self._outputs.append(self._open_tracker(step, steps))
        self._outputs.append(Screen(self._label, step, steps))
    self._clock = time.perf_counter()

  def _open_tracker(self, step: int, steps: int) -> tracker.Tracker:
    # What is uploaded of a remote work directory is files, no folders.
    remote = storage.is_remote(self._workdir)
    return tracker.Tracker(
      None if remote else self._directory,
      project=self._config['tracker_project'],
      label=self._label,
      options=self._config,
      facts=self.facts,
      step=step,
      steps=steps,
    )

  def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
    """Yields batches, and takes the time that a step waits for its own."""
    batches, start = iter(batches), time.perf_counter()
    for batch in batches:
      self._waited = time.perf_counter() - start
      yield batch
      start = time.perf_counter()

  def record(
    self, step: int, metrics: dict[str, Any], diagnostics: dict[str, Any]
  ) -> None:
    """Records a step just dispatched; reads and writes the one before it.

    Args:
      step: its number.
      metrics: scalars; of names that end in '/layer', an array [L, ...] that is
        recorded layer by layer.
      diagnostics: `infinite`, counts [L] that must be 0; `squares`, sums of
        squares for when the step is not finite; `routes` to record, or None.

    Raises:
      FloatingPointError: too many steps in a row were not finite.
    """
    self._read()
    self._write()
    metrics = metrics | {'time/data_seconds': self._waited}
    self._pending = step, metrics, diagnostics
    sequence = self._position.next_sequence + self._config['batch_size']
    self._position = self._position._replace(step=step, next_sequence=sequence)

  def save(self, state: Any, *, wait: bool) -> None:
    """Saves the last step recorded, unless that was done.

    Args:
      state: has the items of a checkpoint as attributes.
      wait: whether to return only when it is written.
    """
    step = self._position.step
    if step == self.saved_step:
      return
    self._read()
    start = time.perf_counter()
    self._still_ours()
    for output in self._outputs:
      output.sync()
    # First: a checkpoint without the metrics before it could not be continued.
    storage.patiently(self._upload, f'{self._workdir}: upload')
    self._saver.save(
      checkpoints.items_of(state),
      self._position,
      record=records.finite(self._record),
      wait=wait,
    )
    self.saved_step = step
    self._clock = time.perf_counter()
    if self._record:
      self._record['time/save_seconds'] = self._clock - start

  def add(
    self, evaluate: Callable[..., dict[str, float] | None], *arguments: Any
  ) -> bool:
    """Adds an evaluation to the record of the last step.

    Args:
      evaluate: returns values by the names of their metrics, or None if it was
        stopped. It is called when the step is finished and its time taken.
      *arguments: those of `evaluate`.

    Returns:
      Whether it was finished.
    """
    self._read()
    values = evaluate(*arguments)
    if values is None:
      return False
    step = self._position.step
    self._record = (self._record or {'step': step}) | values
    self._losses[step] = _loss(values)
    self._write()
    self._clock = time.perf_counter()
    return True

  def _read(self) -> None:
    """Waits for the last step recorded and checks that it is finite."""
    if self._pending is None:
      return
    (step, metrics, diagnostics), self._pending = self._pending, None
    infinite_L = np.asarray(diagnostics['infinite'])
    record = {'step': step}
    for name, value in metrics.items():
      if name.endswith(_PER_LAYER):
        for layer, row in enumerate(np.asarray(value).tolist()):
          record[f'{name}_{layer:02d}'] = row
      else:
        record[name] = np.asarray(value).item()
    now = time.perf_counter()
    seconds, self._clock = now - self._clock, now
    tokens = self._config['batch_size'] * self._config['sequence_length']
    record['time/step_seconds'] = seconds
    record['time/tokens_per_second'] = tokens / seconds
    if self._seconds_at_peak is not None:
      record['time/mfu'] = self._seconds_at_peak / seconds
    memory = jax.local_devices()[0].memory_stats() or {}  # None on CPU.
    if 'peak_bytes_in_use' in memory:
      record['memory/peak_bytes'] = memory['peak_bytes_in_use']
    cause = _not_finite(record, infinite_L)
    position = self._position
    in_a_row = position.skipped_in_a_row + 1 if cause else 0
    self._position = position._replace(
      skipped=position.skipped + bool(cause), skipped_in_a_row=in_a_row
    )
    record['train/skipped_steps'] = self._position.skipped
    self._record = record
    if step % self._config['experts_every']:
      self._record = {
        k: v for k, v in record.items() if not isinstance(v, list)
      }
    routes_BxLxSxK = diagnostics.get('routes')
    if routes_BxLxSxK is not None:
      routes_lib.write(self._workdir, step, routes_BxLxSxK)
    if cause:
      self._warn(cause, record, diagnostics['squares'])

  def _write(self) -> None:
    record, self._record = self._record, {}
    if record:
      for output in self._outputs:
        output.show(record)

  def _warn(self, cause: str, record: records.Record, squares: Any) -> None:
    """Warns of a skipped step; ends the run if there were too many in a row."""
    step, in_a_row = record['step'], self._position.skipped_in_a_row
    allowed = self._config['skipped_steps']
    what = f'step {step}: {cause} NaN or infinite'
    count = f'{in_a_row} in a row, {allowed} end the run'
    if in_a_row < allowed:
      if self._outputs:
        print(f'warning: {what}; skipped ({count})', file=sys.stderr)
      return
    self._write()
    end = self._position.next_sequence
    name = f'not_finite_step_{step:08d}.json'
    if self._directory is not None:
      norms = jax.tree.map(lambda x: np.sqrt(np.asarray(x)).tolist(), squares)
      dump = {
        'step': step,
        'cause': cause,
        'skipped_in_a_row': in_a_row,
        'sequences': list(range(end - self._config['batch_size'], end)),
        'record': record,
        'norms': norms,
      }
      files.write_json(self._directory / name, records.finite(dump))
    raise FloatingPointError(
      f'{what} ({count}); parameters and router are as they were, see {name}; '
      'the same command resumes from the last checkpoint'
    )

  def _close(self) -> None:
    with contextlib.ExitStack() as stack:
      for output in self._outputs:
        stack.callback(output.close)
      self._read()
      self._write()


def _loss(values: dict[str, float]) -> float:
  """Returns the mean loss of the validation sets, NaN where there is none."""
  found = [loss for name, loss in values.items() if _LOSS.fullmatch(name)]
  return sum(found) / len(found) if found else math.nan


def _not_finite(record: records.Record, infinite_L: np.ndarray) -> str:
  """Returns what of a step is not finite; '' if all is well."""
  if infinite_L.any():
    layers = ', '.join(f'{i:02d}' for i in infinite_L.nonzero()[0])
    return f'logits of the router of MoE layer {layers}'
  for name in ('train/loss', 'train/aux_loss', 'train/gradient_norm'):
    if not math.isfinite(record.get(name, 0.0)):
      return name
  return ''
