"""Checkpoints, written: retries, and which of the old ones stay."""

import contextlib
import ctypes
import itertools
import math
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from moe_jax import storage
from moe_jax.runs import checkpoints, checksums
from moe_jax.runs.checkpoints import ITEMS


class Saver:
  """Writes the checkpoints of a work directory; a context manager.

  The newest `checkpoints_kept` stay, those of every `checkpoints_kept_every`
  steps, and the `checkpoints_kept_best` of the lowest loss.

  Args:
    directory: absolute or remote; it need not exist.
    config: options of the run; those above decide what stays.
    run: name of the run in the first process; `restore_newest` uses no other
      run's checkpoints.
    losses: step -> loss. It is asked at each save, so a loss may be added after
      the save of its own step.
    largest: bytes of the largest array to save.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    config: dict[str, Any],
    run: str,
    *,
    losses: dict[int, float],
    largest: int,
  ):
    self._directory, self._config, self._run = directory, config, run
    self._losses, self._largest = losses, largest
    self._manager = self._open()

  def _open(self) -> '_Manager':
    config = self._config
    policies = [keep.LatestN(config['checkpoints_kept'])]
    if config['checkpoints_kept_every']:
      policies.append(keep.EveryNSteps(config['checkpoints_kept_every']))
    if config['checkpoints_kept_best']:
      policies.append(_Best(self._losses, config['checkpoints_kept_best']))
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
        **{name: checkpoints.array_handler(self._largest) for name in ITEMS},
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
    items: checkpoints.Items,
    position: checkpoints.Position,
    *,
    record: dict[str, Any],
    wait: bool = False,
  ) -> None:
    """Starts to write; waits for the checkpoint before if that is under way.

    A failed save is tried twice more; earlier checkpoints stay. With several
    processes it fails at once: they would not come to the next try together.

    On CPU it always waits: the next step cannot reuse arrays that are being
    written, and would hold the whole state twice.

    Args:
      items: what to save; a model from elsewhere has no `optimizer`.
      position: how far the run has come.
      record: the metrics of its step, as JSON has them.
      wait: whether to return only when the checkpoint is written.

    Raises:
      OSError: the checkpoint cannot be written.
    """
    meta = {
      'run': self._run,
      'position': position._asdict(),
      'config': self._config,
      'record': record,
      'checksums': checksums.checksums(items),
    }
    data = {'next_sequence': position.next_sequence}
    saved = ocp.args.Composite(
      **{name: checkpoints.written(item) for name, item in items.items()},
      data=ocp.args.JsonSave(data),
      meta=ocp.args.JsonSave(
        meta | {'sha256': checkpoints.sha256_of(meta, data)}
      ),
    )
    step, on_cpu = position.step, jax.default_backend() == 'cpu'
    tries = itertools.count()

    def write() -> None:
      if next(tries):
        with contextlib.suppress(Exception):  # The same error once more.
          self._manager.close()
        self._manager = self._open()
        if step in checkpoints.steps(self._directory):
          return  # It is there: what failed came after it.
      if not self._manager.save(step, args=saved):
        raise OSError('there is one of this step or of a later one')
      if wait or on_cpu:
        self._manager.wait_until_finished()

    try:
      what = f'no checkpoint of step {step}'
      storage.patiently(write, what, lambda error: jax.process_count() == 1)
    except Exception as error:  # Whatever orbax makes of a file system's.
      raise OSError(
        f'{self._directory}: the checkpoint of step {step} cannot be written '
        f'({error}); those before are as they were'
      ) from error
    if on_cpu:
      _return_free_memory()


class _Manager(ocp.CheckpointManager):
  def reached_preemption(self, step: int) -> bool:
    """Leaves jax's count of steps to `preemption.notice`."""
    del step
    return False


class _Best(keep.PreservationPolicy):
  """Preserves the `count` checkpoints of the lowest loss."""

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


def _return_free_memory() -> None:
  """Gives freed memory back to the system where the C library is glibc.

  Each writing thread has a heap of its own, which keeps what it held: training
  paper_16e on CPU then peaked at 10.7 GB instead of 7.7.
  """
  with contextlib.suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).malloc_trim(0)
