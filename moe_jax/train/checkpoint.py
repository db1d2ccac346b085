"""Checkpoints: separately restorable items, written in the background."""

from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from moe_jax.config import Config
from moe_jax.config import to_dict
from moe_jax.train.state import TrainState

ITEMS = ('params', 'optimizer', 'router', 'data', 'meta')


class Checkpoints:
  """The checkpoints of a work directory; a context manager.

  Items: `params`, `optimizer` and `router` are arrays, `data` holds
  `next_sequence`, the index of the next training sequence, and `meta` the step
  and the whole config.
  """

  def __init__(self, directory: epath.PathLike, config: Config):
    self._config = config
    self._manager = ocp.CheckpointManager(
      epath.Path(directory).resolve(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=config.checkpoints_kept,
        enable_async_checkpointing=True,
      ),
      item_names=ITEMS,
    )

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._manager.wait_until_finished()
    self._manager.close()

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, None where there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState) -> None:
    """Starts writing; waits for the checkpoint before, if need be."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave(state.optimizer),
        router=ocp.args.StandardSave(state.router),
        data=ocp.args.JsonSave(
          {'next_sequence': step * self._config.batch_size}
        ),
        meta=ocp.args.JsonSave(
          {
            'step': step,
            'config': to_dict(self._config),
          }
        ),
      ),
    )

  def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, int]:
    """Reads a checkpoint onto the devices that `abstract` names.

    Returns:
      The state and the index of the next training sequence.
    """
    read = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(abstract.params),
        optimizer=ocp.args.StandardRestore(abstract.optimizer),
        router=ocp.args.StandardRestore(abstract.router),
        data=ocp.args.JsonRestore(),
      ),
    )
    state = TrainState(
      step=jax.device_put(_int32(step), abstract.step.sharding),
      params=read['params'],
      optimizer=read['optimizer'],
      router=read['router'],
    )
    return state, read['data']['next_sequence']


def _int32(value: int) -> Any:
  return jax.numpy.int32(value)
