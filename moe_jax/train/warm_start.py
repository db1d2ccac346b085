"""New runs that begin with the parameters of another one."""

from collections.abc import Mapping
import json
import os
import sys
from typing import Any, NamedTuple

from etils import epath
import jax

from moe_jax import config as config_lib
from moe_jax.config import Config
from moe_jax.data import Tokenizer
from moe_jax.options import Refused
from moe_jax.runs import checkpoints, files
from moe_jax.runs.reader import Reader


class Start(NamedTuple):
  """The checkpoint that a run begins with.

  Attributes:
    option: as messages name it.
    run: that it is of.
    step: after which it was saved.
    name: of the run.
    options: that it was saved under.
  """

  option: str
  run: Reader
  step: int
  name: str
  options: dict[str, Any]

  @property
  def path(self) -> epath.Path:
    """Where it is."""
    return self.run.workdir / 'checkpoints' / str(self.step)

  @property
  def facts(self) -> dict[str, Any]:
    """What the run that begins says of it."""
    workdir = os.fspath(self.run.workdir)
    return {'workdir': workdir, 'step': self.step, 'run': self.name}

  def check_model(self, config: Config, params: Any) -> None:
    """Raises ValueError unless its parameters are of these shapes.

    Says which options make another function of the same parameters.
    """
    changed = ', '.join(
      f'{name}={now} (there {before})'
      for name, (before, now) in _model_changes(self.options, config).items()
    )
    there = _shapes(checkpoints.read_shapes(self.path, 'params'))
    here = _shapes(params)
    for name in there | here:
      if there.get(name) != here.get(name):
        raise ValueError(
          f'{self.option}: its parameters are of another model, the first is '
          f'{name}: {there.get(name, "none")} there, {here.get(name, "none")} '
          f'here; different are {changed or "versions"}'
        )
    if changed and jax.process_index() == 0:
      print(f'note: {self.option}: {changed}', file=sys.stderr)

  def check_tokenizer(self, tokenizer: Tokenizer) -> None:
    """Raises ValueError if its tokens are others."""
    path = self.run.workdir / 'tokenizer.json'
    if path.exists() and self.run.tokenizer != json.loads(tokenizer.to_json()):
      raise ValueError(
        f'{self.option}: its tokenizer is another one; prepare the text with '
        f'python -m moe_jax.data.prepare --tokenizer={path}'
      )

  def read(self, wanted: checkpoints.Items) -> checkpoints.Items:
    """Reads some items. All processes must call it together.

    Args:
      wanted: the items, abstract, with shardings.

    Raises:
      Refused: it is damaged.
      OSError: it cannot be read now.
    """
    try:
      read = checkpoints.read(self.path, self.step, self.name, lambda _: wanted)
    except checkpoints.Damaged as error:
      raise Refused(f'{self.option}: {error}') from error
    return read.items


def find(config: Config, workdir: epath.Path) -> Start | None:
  """Finds what `init_from` names; None where there is nothing to take.

  A run that has a checkpoint of its own needs no other.

  Raises:
    ValueError: it is not there, or cannot be read.
  """
  option = f'init_from={config.init_from}'
  if not config.init_from or checkpoints.steps(workdir / 'checkpoints'):
    return None
  directory, _, wanted = config.init_from.rpartition('@')
  if not (directory and wanted.isdecimal()):
    directory, wanted = config.init_from, ''
  files.check_place('init_from', directory)
  run = Reader(directory)
  if run.workdir == workdir:
    raise ValueError(
      f'{option}: is --workdir itself; choose another work directory for the '
      'run that begins with it'
    )
  steps = run.checkpoints
  if not steps:
    raise ValueError(f'{option}: has no checkpoint; choose a run that has one')
  found = [step for step in steps if str(step) == wanted or not wanted]
  if not found:
    raise ValueError(
      f'{option}: has no checkpoint of step {wanted}, but of '
      f'{", ".join(map(str, steps))}'
    )
  try:
    meta = checkpoints.read_meta(run.workdir / 'checkpoints' / str(found[-1]))
  except (OSError, ValueError) as error:
    raise ValueError(f'{option}: step {found[-1]}: {error}') from error
  options = config_lib.upgrade(meta['config'])
  return Start(option, run, found[-1], meta['run'], options)


def _model_changes(
  before: Mapping[str, Any], now: Config
) -> dict[str, tuple[Any, Any]]:
  """Returns the options that another model would have otherwise."""

  def of_model(options):
    vocabulary = options['data']['vocabulary']
    return {'model': options['model'], 'data': {'vocabulary': vocabulary}}

  found = config_lib.differences(
    of_model(before), of_model(config_lib.to_dict(now))
  )
  return {
    name: values
    for name, values in found.items()
    if config_lib.may_change(name) == 'no'
  }


def _shapes(tree: Any) -> dict[str, list[int]]:
  """Returns the shape of each array, by its name."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): list(leaf.shape)
    for path, leaf in jax.tree.leaves_with_path(tree)
  }
