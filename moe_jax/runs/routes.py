"""Recorded routes: the experts of every token, a file a step and process.

`DIR/routes/step_00000012_rows_8_16.npy` has rows 8 to 15 of the batch of step
12, int16 [rows, L, S, K]; -1 is a slot that is not used. The names say all that
a reader needs, whatever the number of processes that wrote them.

Shape letters: B batch, L MoE layers, S sequence, K experts of a token.
"""

from collections.abc import Iterator, Mapping
import io
import os
import re
from typing import Any

from etils import epath
import jax
import numpy as np

from moe_jax import storage
from moe_jax.options import Refused
from moe_jax.runs import files
from moe_jax.runs import reader as reader_lib

_DIRECTORY = 'routes'
_NAME = re.compile(r'step_(\d+)_rows_(\d+)_(\d+)\.npy')

# Options without which a batch, or its routes, would have another meaning.
_SAME = (
  *('batch_size', 'sequence_length', 'seed'),
  *('data.corpus', 'data.anneal_corpus', 'data.anneal_from'),
  *('model.layers', 'model.dense_layers', 'model.experts'),
)


def write(workdir: epath.Path, step: int, routes_BxLxSxK: jax.Array) -> None:
  """Writes the rows of a step that this process has; waits until it is done.

  Args:
    workdir: of the run.
    step: its number.
    routes_BxLxSxK: int16, split over its rows at most.
  """
  rows = {  # Devices need not be in the order of their rows.
    shard.index[0].start or 0: np.asarray(shard.data)
    for shard in routes_BxLxSxK.addressable_shards
  }
  # A process has consecutive rows of the text, wherever its devices are.
  own_RxLxSxK = np.concatenate([rows[first] for first in sorted(rows)])
  count = len(own_RxLxSxK)
  first = jax.process_index() * count
  content = io.BytesIO()
  np.save(content, own_RxLxSxK, allow_pickle=False)
  directory = workdir / _DIRECTORY
  path = directory / f'step_{step:08d}_rows_{first}_{first + count}.npy'

  def try_to_write():
    directory.mkdir(parents=True, exist_ok=True)
    files.write(path, content.getvalue())

  storage.patiently(try_to_write, str(path))


def remove_after(workdir: epath.Path, step: int) -> None:
  """Removes routes of later steps, which are to be computed again."""
  for later, _, _, path in _list(workdir):
    if later > step:
      path.unlink(missing_ok=True)


def _list(workdir: epath.Path) -> Iterator[tuple[int, int, int, epath.Path]]:
  """Yields step, first row, end of rows and path of every file."""
  directory = workdir / _DIRECTORY
  for path in directory.iterdir() if directory.exists() else ():
    if match := _NAME.fullmatch(path.name):
      yield *map(int, match.groups()), path


class Reader:
  """The routes that a run recorded, as far as it had come when this was made.

  Args:
    workdir: of that run.
  """

  def __init__(self, workdir: str | os.PathLike[str]):
    self._where = f'replay_routes={workdir}'
    self._run = reader_lib.Reader(workdir)
    # Step -> first row, end of rows and path of its files.
    self._parts: dict[int, list[tuple[int, int, epath.Path]]] = {}
    for step, *part in sorted(_list(self._run.workdir)):
      self._parts.setdefault(step, []).append(tuple(part))

  @property
  def steps(self) -> list[int]:
    """Steps whose routes are there, of all rows, ascending."""
    return [step for step in self._parts if self._is_whole(step)]

  def _is_whole(self, step: int) -> bool:
    end = 0
    for first, last, _ in self._parts.get(step, ()):
      if first != end:
        return False
      end = last
    return end == self._run.config['batch_size']

  def check(self, options: Mapping[str, Any], first: int) -> None:
    """Raises ValueError unless a run can take these routes.

    Args:
      options: of the run, nested.
      first: the first step that it is going to compute, not after its last.
    """
    if not self._parts:
      raise ValueError(
        f'{self._where}: has no routes; a run records them with '
        '--config.record_routes=true'
      )
    try:
      recorded, facts = self._run.config, self._run.facts
    except (OSError, ValueError) as error:
      raise ValueError(f'{self._where}: {error}') from error
    for name in _SAME:
      before, now = (_value(of, name) for of in (recorded, options))
      if before != now:
        raise ValueError(
          f'{self._where}: its routes are of {name}={before}, but here it is '
          f'{now}; set --config.{name}={before}'
        )
    for at, changes in facts.get('config_changes', {}).items():
      if changes.keys() & {'batch_size', 'sequence_length'}:
        raise ValueError(
          f'{self._where}: its steps have other rows, as batch_size or '
          f'sequence_length changed after step {at}; choose another run'
        )
    last, steps = options['steps'], set(self.steps)
    missing = [step for step in range(first, last + 1) if step not in steps]
    if missing:
      raise ValueError(
        f'{self._where}: has no routes of step {missing[0]}, one of '
        f'{len(missing)} that are missing of steps {first} to {last}; '
        f'{self._hint(first)}'
      )
    self.read(first, range(1))

  def check_text(self, fingerprint: str) -> None:
    """Raises ValueError unless these are routes of the same training text."""
    if self._run.facts['text_fingerprint'] != fingerprint:
      raise ValueError(
        f'{self._where}: its routes are of other training text, or of another '
        'version of the tokenizers package; choose the same data'
      )

  def _hint(self, first: int) -> str:
    """Says up to where a replay from a step would work."""
    end = first
    while self._is_whole(end):
      end += 1
    if end == first:
      return 'choose a run that recorded them'
    return f'--config.steps={end - 1} would do'

  def read(self, step: int, rows: range | None = None) -> np.ndarray:
    """Reads the routes of a step.

    Args:
      step: its number.
      rows: of the batch, consecutive; None is all of them.

    Returns:
      int16 [rows, L, S, K], -1 for slots that are not used.

    Raises:
      Refused: they are missing or damaged.
      OSError: they cannot be read.
    """
    if not self._is_whole(step):
      raise Refused(f'{self._where}: has no routes of step {step}')
    rows = range(self._run.config['batch_size']) if rows is None else rows
    return np.concatenate(
      [
        self._read(path, last - first)[
          max(rows.start - first, 0) : rows.stop - first
        ]
        for first, last, path in self._parts[step]
        if first < rows.stop and rows.start < last
      ]
    )

  def _read(self, path: epath.Path, count: int) -> np.ndarray:
    options = self._run.config
    model = options['model']
    layers = model['layers'] - model['dense_layers']
    shape = count, layers, options['sequence_length']
    content = io.BytesIO(files.read(path))
    try:
      found = np.lib.format.read_array(content, allow_pickle=False)
    except (ValueError, EOFError) as error:
      raise Refused(f'{self._where}: {path.name}: damaged, {error}') from error
    experts = model['experts']
    if (
      (found.dtype, found.shape[:-1]) != (np.int16, shape)
      or found.min(initial=0) < -1
      or found.max(initial=0) >= experts
    ):
      raise Refused(
        f'{self._where}: {path.name}: damaged, {found.dtype}'
        f'{list(found.shape)}; must be int16{[*shape, "K"]} of -1 to '
        f'{experts - 1}'
      )
    return found


def _value(options: Mapping[str, Any], name: str) -> Any:
  for key in name.split('.'):
    options = options[key]
  return options
