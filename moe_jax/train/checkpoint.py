"""Checkpoints: separately restorable items, checked when they are read.

`params`, `optimizer` and `router` are arrays, `data` holds `next_sequence`, the
index of the next training sequence, and `meta` all else: step, counts, config,
the run's name, and a checksum of every array and of all that.
"""

from collections.abc import Callable
import contextlib
import ctypes
import hashlib
import json
import math
import re
import sys
import time
from typing import Any
from typing import NamedTuple

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from moe_jax.config import Config
from moe_jax.config import to_dict
from moe_jax.parallel import processes
from moe_jax.train import facts
from moe_jax.train import workdir
from moe_jax.train.state import TrainState

_ARRAYS = ('params', 'optimizer', 'router')

# Types of errors, and what tensorstore and buckets call theirs.
_MAY_PASS = re.compile(
  r'\b(OSError|PermissionError|TimeoutError|ConnectionError|MemoryError|HttpError'
  r'|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED'
  r'|UNAUTHENTICATED|ABORTED)\b'
)


class Position(NamedTuple):
  """How far a run has come.

  Attributes:
    step: steps completed.
    next_sequence: index of the next training sequence.
    skipped: steps so far that were skipped as they were not finite.
    skipped_in_a_row: of these, the latest without a good one after them.
  """

  step: int = 0
  next_sequence: int = 0
  skipped: int = 0
  skipped_in_a_row: int = 0


class Saved(NamedTuple):
  """What a checkpoint holds.

  Attributes:
    state: the arrays.
    position: how far the run had come.
    config: the whole config that it was saved under.
  """

  state: TrainState
  position: Position
  config: dict[str, Any]


class Checkpoints:
  """Writes the checkpoints of a work directory; a context manager.

  The newest `checkpoints_kept` stay, those of every `checkpoints_kept_every`
  steps, and the `checkpoints_kept_best` by validation loss.

  Args:
    directory: absolute or remote; it need not exist.
    config: of the run.
    run: its name, in the first process; `restore_newest` takes no other run's
      checkpoints.
    largest: bytes of the largest array that will be saved.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    config: Config,
    run: str,
    *,
    largest: int = 0,
  ):
    self._directory, self._config, self._run = directory, config, run
    self._largest = largest
    self._losses = {}
    if config.checkpoints_kept_best:
      self._losses = _saved_losses(directory)
    self._manager = self._open()

  def _open(self) -> '_Manager':
    config = self._config
    policies = [keep.LatestN(config.checkpoints_kept)]
    if config.checkpoints_kept_every:
      policies.append(keep.EveryNSteps(config.checkpoints_kept_every))
    if config.checkpoints_kept_best:
      policies.append(_Best(self._losses, config.checkpoints_kept_best))
    return _Manager(
      epath.Path(self._directory),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=keep.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        # Old checkpoints are read if they are needed: one may be damaged.
        lightweight_initialize=True,
      ),
      item_handlers={
        **{name: _array_handler(self._largest) for name in _ARRAYS},
        'data': ocp.JsonCheckpointHandler(),
        'meta': ocp.JsonCheckpointHandler(),
      },
    )

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._manager.close()

  def save(
    self,
    state: TrainState,
    position: Position,
    *,
    loss: float | None = None,
    wait: bool = False,
  ) -> None:
    """Starts writing; waits for the checkpoint before, if need be.

    A save that fails is tried again, twice; the checkpoints before stay. With
    several processes it fails at once: they would not come to it together.

    On CPU it waits for this one, too: the next step cannot reuse arrays that
    are being written, and would hold the whole state twice.

    Args:
      state: what to save.
      position: how far the run has come.
      loss: by which the best checkpoints are found; None where unknown.
      wait: whether to return only when it is written.
    """
    meta = {
      'run': self._run,
      'position': position._asdict(),
      'config': to_dict(self._config),
      'loss': loss,
      'checksums': facts.checksums(arrays_of(state)),
    }
    data = {'next_sequence': position.next_sequence}
    items = ocp.args.Composite(
      **{name: ocp.args.PyTreeSave(getattr(state, name)) for name in _ARRAYS},
      data=ocp.args.JsonSave(data),
      meta=ocp.args.JsonSave(meta | {'sha256': _sha256(meta, data)}),
    )
    if loss is not None:
      self._losses[position.step] = loss
    for pause in (*workdir.PAUSES, None):
      try:
        if not self._manager.save(position.step, args=items):
          raise OSError('there is one of this step or of a later one')
        if wait or jax.default_backend() == 'cpu':
          self._manager.wait_until_finished()
        break
      # Whatever orbax makes of a file system's errors.
      except Exception as error:
        if pause is None or jax.process_count() > 1:
          raise OSError(
            f'{self._directory}: the checkpoint of step {position.step} cannot '
            f'be written ({error}); those before are as they were'
          ) from error
        print(
          f'warning: no checkpoint of step {position.step}: {error}; tries '
          f'again in {pause:.0f} s',
          file=sys.stderr,
        )
        time.sleep(pause)
        with contextlib.suppress(Exception):  # The same error once more.
          self._manager.close()
        self._manager = self._open()
        if position.step in steps(self._directory):
          break  # It is there: what failed came after it.
    if jax.default_backend() == 'cpu':
      _return_free_memory()


class _Manager(ocp.CheckpointManager):
  def reached_preemption(self, step: int) -> bool:
    """Leaves jax's count of steps to `preemption.notice`."""
    del step
    return False


class _Best(keep.PreservationPolicy):
  """Preserves the `count` checkpoints of the least loss."""

  def __init__(self, losses: dict[int, float], count: int):
    self._losses, self._count = losses, count

  def should_preserve(self, checkpoints, *, context):
    del context
    known = [
      (loss, checkpoint.step)
      for checkpoint in checkpoints
      if math.isfinite(loss := self._losses.get(checkpoint.step, math.nan))
    ]
    best = {step for _, step in sorted(known)[: self._count]}
    return [checkpoint.step in best for checkpoint in checkpoints]


def _saved_losses(directory: epath.PathLike) -> dict[int, float]:
  losses = {}
  for step in steps(directory):
    path = epath.Path(directory) / str(step) / 'meta' / 'metadata'
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      losses[step] = float(json.loads(path.read_text())['loss'])
  return losses


def steps(directory: epath.PathLike) -> list[int]:
  """Returns the steps that there are checkpoints of, the newest first."""
  directory = epath.Path(directory)
  if not directory.exists():
    return []
  found = ocp.path.step.standard_name_format().find_all(directory)
  return sorted((metadata.step for metadata in found), reverse=True)


def read_meta(path: epath.PathLike) -> dict[str, Any]:
  """Reads what a checkpoint says of itself: `run`, `position`, `config`, ...

  Args:
    path: of one checkpoint.

  Raises:
    FileNotFoundError: a file of it is missing.
    ValueError: it is not as it was written.
  """
  meta, data = (
    json.loads((epath.Path(path) / item / 'metadata').read_text())
    for item in ('meta', 'data')
  )
  if meta.pop('sha256', '') != _sha256(meta, data):
    raise ValueError('the items meta and data are not as they were written')
  return meta


def read_item(path: epath.PathLike, name: str, abstract: Any = None) -> Any:
  """Reads one item of arrays of a checkpoint, unchecked.

  Args:
    path: of the checkpoint.
    name: 'params', 'optimizer' or 'router'.
    abstract: structure and shardings wanted; None gives nested dicts of NumPy
      arrays as they were saved.
  """
  handler, place = _array_handler(), epath.Path(path) / name
  if abstract is not None:
    wanted = ocp.args.PyTreeRestore(
      abstract, ocp.checkpoint_utils.construct_restore_args(abstract)
    )
    return handler.restore(place, args=wanted)
  as_numpy = jax.tree.map(
    lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
    handler.metadata(place).tree,
  )
  return handler.restore(
    place, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
  )


def check_item(meta: dict[str, Any], name: str, item: Any) -> None:
  """Raises ValueError unless arrays are those that were saved."""
  for array, checksum in facts.checksums({name: item}).items():
    if meta['checksums'].get(array) != checksum:
      raise ValueError(f'values changed since it was written: {array}')


def restore_newest(
  directory: epath.PathLike,
  run: str,
  plan: Callable[[dict[str, Any]], TrainState],
) -> Saved | None:
  """Reads the newest checkpoint that is whole and of this run.

  Newer ones that are not are moved into the directory `damaged` beside, with a
  warning that says what is wrong. All processes must call it together.

  Args:
    directory: where `Checkpoints` wrote.
    run: the run's name.
    plan: from the config that a checkpoint was saved under to the abstract
      state to restore, with shardings.

  Returns:
    What was saved; None where there is no checkpoint.

  Raises:
    Refused: there are checkpoints, but none is of use. All stay where they are.
    OSError: a checkpoint cannot be read now.
  """
  directory = epath.Path(directory)
  damaged = {}
  for step in steps(directory):
    try:
      saved = _read(directory / str(step), step, run, plan)
      break
    except _Damaged as error:
      damaged[step] = str(error)
  else:
    if damaged:
      reasons = '; '.join(f'{step}: {why}' for step, why in damaged.items())
      raise processes.Refused(
        f'{directory}: no checkpoint is of use ({reasons}); mend one of them, '
        'or choose another --workdir to begin anew'
      )
    return None
  for step, why in damaged.items():
    if jax.process_index() == 0:
      aside = _move_aside(directory / str(step), directory.parent / 'damaged')
      print(
        f'warning: {directory / str(step)}: {why}; it was moved to {aside}, '
        f'step {saved.position.step} is used',
        file=sys.stderr,
      )
  if damaged:
    with processes.agreement() as seen:  # Some file systems are slow to tell.
      seen['checkpoints in --workdir'] = str(steps(directory))
  return saved


class _Damaged(Exception):
  """A checkpoint is not as it was written, or not of this run."""


def _read(path: epath.Path, step: int, run: str, plan) -> Saved:
  """Reads a checkpoint; raises _Damaged in all processes or in none.

  Raises:
    OSError: it cannot be read now, which does not mean that it is damaged.
  """
  meta = _agreed(lambda: _read_meta(path, step, run))
  abstract = plan(meta['config'])
  read = _agreed(lambda: _read_arrays(path, abstract))
  # Together: one process waits for the others in these.
  state = abstract._replace(
    **read, step=jax.device_put(np.int32(step), abstract.step.sharding)
  )
  now = facts.checksums(arrays_of(state))
  if now != meta['checksums']:
    wrong = [name for name in now if now[name] != meta['checksums'].get(name)]
    raise _Damaged(f'values changed since it was written: {", ".join(wrong)}')
  return Saved(state, Position(**meta['position']), meta['config'])


def _read_meta(path: epath.Path, step: int, run: str) -> dict[str, Any]:
  meta = read_meta(path)
  saved = meta['position']['step']
  if meta['run'] != run or saved != step:
    raise ValueError(f'it is of step {saved} of another run')
  return meta


def _read_arrays(path: epath.Path, abstract: TrainState) -> dict[str, Any]:
  return {
    name: read_item(path, name, item)
    for name, item in arrays_of(abstract).items()
  }


def _agreed(read: Callable[[], Any]) -> Any:
  """Reads in every process; what one of them cannot read, none has read."""
  failure = result = None
  for pause in (*workdir.PAUSES, None):
    try:
      failure, result = None, read()
      break
    except Exception as error:  # What damage leads to is not foreseeable.
      failure = _root(error)
      if pause is None or not may_pass(failure):
        break
      time.sleep(pause)
  if why := processes.first_error(failure):
    raise (OSError if _may_pass(why) else _Damaged)(why) from failure
  return result


def may_pass(error: BaseException) -> bool:
  """Whether what was raised in reading may not be raised another time."""
  return _may_pass(_named(_root(error)))


def _root(error: BaseException) -> BaseException:
  """Returns what orbax wraps into an `Exception` of its own."""
  while type(error) is Exception and (cause := error.__cause__):
    error = cause
  return error


def _named(error: BaseException) -> str:
  return f'{type(error).__name__}: {error}'


def _may_pass(why: str) -> bool:
  """Whether an error tells of the disk, network or memory, not of the data."""
  return bool(_MAY_PASS.search(why))


def arrays_of(state: TrainState) -> dict[str, Any]:
  """Returns the items of a checkpoint that are arrays."""
  return {name: getattr(state, name) for name in _ARRAYS}


def _sha256(meta: dict[str, Any], data: dict[str, Any]) -> str:
  text = json.dumps([meta, data], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _move_aside(path: epath.Path, directory: epath.Path) -> epath.Path:
  directory.mkdir(parents=True, exist_ok=True)
  aside, number = directory / path.name, 1
  while aside.exists():
    number += 1
    aside = directory / f'{path.name}_{number}'
  return path.rename(aside)


def _array_handler(largest: int = 0) -> ocp.PyTreeCheckpointHandler:
  limit = None
  if jax.default_backend() == 'cpu':
    # What is being written takes memory that the step needs. An array above the
    # limit could not be written at all.
    limit = max(1, math.ceil(largest / 1e9))
  return ocp.PyTreeCheckpointHandler(
    save_concurrent_gb=limit, save_device_host_concurrent_gb=limit
  )


def _return_free_memory() -> None:
  """Gives freed memory back to the system where the C library is glibc.

  Each writing thread has a heap of its own, which keeps what it held: training
  paper_16e on CPU then peaked at 10.7 GB instead of 7.7.
  """
  with contextlib.suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).malloc_trim(0)
