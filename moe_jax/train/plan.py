"""A run that is ready to go: all that can be refused was, nothing was done."""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any, NamedTuple

from etils import epath
import jax
from jax.sharding import Mesh

from moe_jax import config as config_lib
from moe_jax import data, storage
from moe_jax.config import Config
from moe_jax.runs import checkpoints, files, processes, routes, tracker
from moe_jax.runs.reader import Reader
from moe_jax.train import facts, state, warm_start


class Plan(NamedTuple):
  """What a run is made of.

  Attributes:
    config: what to do.
    mesh: the devices.
    training: the model on them.
    text: to train and evaluate on.
    workdir: where the run leaves what it finds.
    allowed: options that may differ from those of the run in `workdir`.
    start: the checkpoint of another run to begin with; None where there is none
      or the run resumes.
  """

  config: Config
  mesh: Mesh
  training: state.Training
  text: data.TextData
  workdir: epath.Path
  allowed: Sequence[str]
  start: warm_start.Start | None = None

  @property
  def options(self) -> dict[str, Any]:
    """The config as nested dicts."""
    return config_lib.to_dict(self.config)

  @property
  def label(self) -> str:
    """The name of the run on screens."""
    method = config_lib.method_of(
      self.config.balancer, dataclasses.asdict(self.config.losses)
    )
    return f'{method} seed {self.config.seed}'

  def evaluates_after(self, step: int) -> bool:
    """Tells whether the model is evaluated after a step."""
    every = self.config.eval_every
    due = step == self.config.steps or (every and step and step % every == 0)
    return bool(due and self.text.evaluation)

  def check_workdir(self) -> None:
    """Raises ValueError unless the work directory is free or has this run."""
    _check_config(self.workdir, self.config, self.allowed)
    if not (self.workdir / 'run.json').exists():
      return
    before = Reader(self.workdir).facts
    if before['text_fingerprint'] != self.text.fingerprint:
      raise ValueError(
        f'--workdir={self.workdir}: this run began with other training text, '
        'or another version of the tokenizers package; choose another work '
        'directory'
      )
    shards = facts.shards_that_matter(self.config, self.mesh)
    began = before.get('shards', shards)
    if began != shards and 'model.shards' not in self.allowed:
      raise ValueError(
        f'model.shards={self.config.model.shards}: on this mesh it makes '
        f'{shards} shards, but this run began with {began}, on which its '
        f'results depend; set --config.model.shards={began}, or continue with '
        'the change by --allow_config_change=model.shards'
      )


def sharding(config: Config) -> str:
  """Lists where each array of a run would be, and its bytes on each device."""
  config = dataclasses.replace(config, data=data.resolve(config.data))
  mesh = state.make_mesh(config)
  return state.sharding_table(state.make_training(config, mesh).abstract)


def plan(
  config: Config,
  workdir: str | os.PathLike[str],
  allow_config_change: Sequence[str] = (),
) -> Plan:
  """Plans a run. With several processes, each makes the same plan.

  Args:
    config: what to do.
    workdir: where to leave it, gs://... or a directory that all processes see;
      a run found there is continued.
    allow_config_change: options that may differ from that run's.

  Raises:
    ValueError, OSError: config, text or work directory are of no use, or
      processes disagree. Nothing is compiled and nothing is written before.
  """
  with processes.agreement() as agreed:
    directory = files.open_workdir(workdir)
    tracker.check(config.tracker)
    if config.profile and storage.is_remote(directory):
      raise ValueError(
        f'profile={config.profile}: writes to a local --workdir only, not to '
        f'{workdir}'
      )
    config = dataclasses.replace(config, data=data.resolve(config.data))
    mesh = state.make_mesh(config)
    training = state.make_training(config, mesh)
    state.check_memory(training.abstract)
    _check_config(directory, config, allow_config_change)  # Text takes longer.
    _check_annealing(config, directory)
    recorded = _routes_to_replay(config, directory)
    start = warm_start.find(config, directory)
    if start:
      start.check_model(config, training.abstract.params)
    text = data.load_text(config.data)
    if recorded:
      recorded.check_text(text.fingerprint)
    if start:
      start.check_tokenizer(text.tokenizer)
    for source in text.train:
      if config.sequence_length >= len(source.tokens):
        raise ValueError(
          f'sequence_length={config.sequence_length}: the training text '
          f'{source.name} has {len(source.tokens)} tokens only'
        )
    planned = Plan(
      config, mesh, training, text, directory, tuple(allow_config_change), start
    )
    planned.check_workdir()
    agreed |= {
      'text': text.fingerprint,
      **{f'tokens of {name}': len(x) for name, x in text.evaluation.items()},
      'devices of each process': jax.local_device_count(),
      **facts.versions(),
      'checkpoint of init_from': str(start and start.facts),
      **config_lib.flatten({'config': planned.options}),
    }
  return planned


def _routes_to_replay(
  config: Config, workdir: epath.Path
) -> routes.Reader | None:
  """Returns the routes to be replayed, if any.

  Raises:
    ValueError: they are not there, or not of such a run.
  """
  source = config.replay_routes
  if not source:
    return None
  if files.absolute(source) == workdir:
    raise ValueError(
      f'replay_routes={source}: is --workdir itself; choose another work '
      'directory for the run that replays'
    )
  files.check_place('replay_routes', source)
  done = max(checkpoints.steps(workdir / 'checkpoints'), default=0)
  if done >= config.steps:
    return None
  recorded = routes.Reader(source)
  recorded.check(config_lib.to_dict(config), first=done + 1)
  return recorded


def _check_annealing(config: Config, workdir: epath.Path) -> None:
  """Raises ValueError if a new run would never come to its other mixture."""
  tokens = config.steps * config.batch_size * config.sequence_length
  begins = not checkpoints.steps(workdir / 'checkpoints')
  if begins and config.data.anneal_from >= tokens:
    raise ValueError(
      f'data.anneal_from={config.data.anneal_from}: the run ends before, after '
      f'{tokens} tokens; they are steps * batch_size * sequence_length'
    )


def _check_config(
  workdir: epath.Path, config: Config, allowed: Sequence[str]
) -> None:
  """Raises ValueError if the work directory has a run of another config."""
  where = f'--workdir={workdir}'
  is_run = (workdir / 'config.json').exists()
  if not is_run and (workdir / 'checkpoints').exists():
    raise ValueError(f'{where}: checkpoints, but no config.json')
  before = config_lib.upgrade(Reader(workdir).config) if is_run else None
  now = config_lib.to_dict(config)
  config_lib.check_changes(before, now, allowed, where=where)
