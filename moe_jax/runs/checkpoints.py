"""Checkpoints, read: separately restorable items, checked when they are read.

`params`, `optimizer` and `router` are arrays, `data` holds `next_sequence`, the
index of the next training sequence, and `meta` all else: step, counts, config,
the step's metrics, the run's name, and a checksum of every array and of all
that.
"""

from collections.abc import Callable, Mapping
import hashlib
import json
import sys
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax import storage
from moe_jax.options import Refused
from moe_jax.runs import checksums, processes

ITEMS = ('params', 'optimizer', 'router', 'average')
# What older versions did not save: zeros between steps, when they saved.
_LATER = ('so_far',)
Items = dict[str, Any]  # a pytree of arrays for each of these, or some


def items_of(state: Any) -> Items:
  """Returns the items of a state that has them as attributes, or None."""
  items = {name: getattr(state, name) for name in ITEMS}
  return {name: item for name, item in items.items() if item is not None}


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
    items: the arrays.
    position: how far the run had come.
    config: the options that it was saved under.
    record: the metrics of its step; empty where an older version saved it.
  """

  items: Items
  position: Position
  config: dict[str, Any]
  record: dict[str, Any]


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
  if meta.pop('sha256', '') != sha256_of(meta, data):
    raise ValueError('the items meta and data are not as they were written')
  return meta


def read_item(path: epath.PathLike, name: str, abstract: Any = None) -> Any:
  """Reads one item of arrays of a checkpoint, unchecked.

  Args:
    path: of the checkpoint.
    name: one of `ITEMS`.
    abstract: structure and shardings wanted; None gives nested dicts of NumPy
      arrays as they were saved.
  """
  handler, place = array_handler(), epath.Path(path) / name
  if abstract is None:
    kind = ocp.RestoreArgs(restore_type=np.ndarray)
    wanted = jax.tree.map(lambda _: kind, handler.metadata(place).tree)
    return handler.restore(place, args=ocp.args.PyTreeRestore(None, wanted))
  saved = _saved_part(abstract, handler.metadata(place).tree)
  wanted = ocp.checkpoint_utils.construct_restore_args(saved)
  restored = handler.restore(place, args=ocp.args.PyTreeRestore(saved, wanted))
  return _with_zeros(restored, abstract)


def read_shapes(path: epath.PathLike, name: str) -> Any:
  """Returns an item with what has a `shape` in place of arrays."""
  return array_handler().metadata(epath.Path(path) / name).tree


def _saved_part(abstract: Any, saved: Any) -> Any:
  """Drops what an older version did not save."""
  if not isinstance(abstract, Mapping):
    return abstract
  return {
    name: _saved_part(part, saved.get(name, {}))
    for name, part in abstract.items()
    if name in saved or name not in _LATER
  }


def _with_zeros(restored: Any, abstract: Any) -> Any:
  """Adds zeros for what `_saved_part` dropped."""
  if not isinstance(abstract, Mapping):
    return restored
  return {
    name: _with_zeros(restored[name], part)
    if name in restored
    else jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), part
    )
    for name, part in abstract.items()
  }


class Damaged(ValueError):
  """A checkpoint is not as it was written, or not of this run."""


def check(meta: dict[str, Any], items: Items) -> None:
  """Raises Damaged unless the arrays of some items are those that were saved.

  Args:
    meta: what `read_meta` returned.
    items: what `read_item` returned, by name.
  """
  now = checksums.checksums(items)
  before = {
    name: checksum
    for name, checksum in meta['checksums'].items()
    if name.partition('.')[0] in items
  }
  for name in set(now) - set(before):
    if set(name.split('.')) & set(_LATER):
      del now[name]
  wrong = [name for name in before | now if before.get(name) != now.get(name)]
  if wrong:
    raise Damaged(f'values changed since it was written: {", ".join(wrong)}')


def restore_newest(
  directory: epath.PathLike,
  run: str,
  plan: Callable[[dict[str, Any]], Items],
) -> Saved | None:
  """Reads the newest checkpoint that is whole and of this run.

  Newer ones that are not are moved into the directory `damaged` beside, with a
  warning that says what is wrong. All processes must call it together.

  Args:
    directory: where `Checkpoints` wrote.
    run: the run's name.
    plan: from the options that a checkpoint was saved under to the abstract
      items to restore, with shardings.

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
      saved = read(directory / str(step), step, run, plan)
      break
    except Damaged as error:
      damaged[step] = str(error)
  else:
    if damaged:
      reasons = '; '.join(f'{step}: {why}' for step, why in damaged.items())
      raise Refused(
        f'{directory}: no checkpoint is of use ({reasons}); mend one of them, '
        'or choose another --workdir to begin anew'
      )
    return None
  if damaged:
    with processes.agreement():
      if jax.process_index() == 0:
        for at, why in damaged.items():
          path = directory / str(at)
          aside = _move_aside(path, directory.parent / 'damaged', why)
          print(
            f'warning: {path}: {why}; it was moved to {aside}, step {step} is '
            'used',
            file=sys.stderr,
          )
    with processes.agreement() as seen:  # Some file systems are slow to tell.
      seen['checkpoints in --workdir'] = str(steps(directory))
  return saved


def read(
  path: epath.Path,
  step: int,
  run: str,
  plan: Callable[[dict[str, Any]], Items],
) -> Saved:
  """Reads a checkpoint. All processes must call it together.

  Args:
    path: where it is.
    step: that it must be of.
    run: name of the run that it must be of.
    plan: from the options that it was saved under to the abstract items to
      read, with shardings; those that it does not name are not read.

  Raises:
    Damaged: it is not as it was written, in all processes or in none.
    OSError: it cannot be read now, which does not mean that it is damaged.
  """

  def read_own_meta():
    meta = read_meta(path)
    saved = meta['position']['step']
    if meta['run'] != run or saved != step:
      raise ValueError(f'it is of step {saved} of another run')
    return meta

  meta = _agreed(read_own_meta, path)
  abstract = plan(meta['config'])
  items = _agreed(
    lambda: {name: read_item(path, name, of) for name, of in abstract.items()},
    path,
  )
  # Together: one process waits for the others in these.
  check(meta, items)
  position, record = Position(**meta['position']), meta.get('record', {})
  return Saved(items, position, meta['config'], record)


def _agreed(read: Callable[[], Any], path: epath.Path) -> Any:
  """Reads in every process; what one of them cannot read, none has read."""
  failure = result = None
  try:
    result = storage.patiently(read, str(path), may_pass)
  except Exception as error:  # What damage leads to is not foreseeable.
    failure = _root(error)
  passing = failure is not None and may_pass(failure)
  why, passing = processes.first_error(failure, passing)
  if why:
    raise (OSError if passing else Damaged)(why) from failure
  return result


def may_pass(error: BaseException) -> bool:
  """As `storage.may_pass`, also of what orbax wraps."""
  return storage.may_pass(_root(error))


def _root(error: BaseException) -> BaseException:
  """Returns what orbax wraps into an `Exception` of its own."""
  while type(error) is Exception and error.__cause__:
    error = error.__cause__
  return error


def sha256_of(meta: dict[str, Any], data: dict[str, Any]) -> str:
  """Hashes all of a checkpoint but its arrays, which have checksums in it."""
  text = json.dumps([meta, data], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _move_aside(
  path: epath.Path, directory: epath.Path, why: str
) -> epath.Path:
  directory.mkdir(parents=True, exist_ok=True)
  aside, number = directory / path.name, 1
  while aside.exists():
    number += 1
    aside = directory / f'{path.name}_{number}'
  # Without a file in it, a bucket has no such directory to move to.
  (directory / f'{aside.name}.txt').write_text(f'{why}\n')
  return path.rename(aside)


def array_handler(largest: int = 0) -> ocp.PyTreeCheckpointHandler:
  """Returns what reads and writes an item of arrays.

  Args:
    largest: bytes of the largest array to write.
  """
  limit = None
  if jax.default_backend() == 'cpu':
    # What is being written takes memory that the step needs. An array above the
    # limit could not be written at all.
    limit = max(0.2, 1.01 * largest / 1e9)
  return ocp.PyTreeCheckpointHandler(
    save_concurrent_gb=limit, save_device_host_concurrent_gb=limit
  )


def written(item: Any) -> ocp.args.PyTreeSave:
  """Returns an item of arrays with how it is written.

  On CPU in chunks of 4 MB and files of 16 MB: whole ones are kept in memory
  first, and by default a chunk is a device's part, a file 2 GB.
  """
  if jax.default_backend() != 'cpu':
    return ocp.args.PyTreeSave(item)
  chunks = ocp.SaveArgs(chunk_byte_size=1 << 22)
  return ocp.args.PyTreeSave(
    item,
    save_args=jax.tree.map(lambda _: chunks, item),
    ocdbt_target_data_file_size=1 << 24,
  )
