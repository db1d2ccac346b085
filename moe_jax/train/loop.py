"""A run from its config to its last checkpoint."""

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from moe_jax import data
from moe_jax.config import MAY_CHANGE
from moe_jax.config import Config
from moe_jax.config import to_dict
from moe_jax.data.cache import open_cache
from moe_jax.parallel import mesh as meshes
from moe_jax.train import evaluate as evaluation
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.optimizer import make_optimizer
from moe_jax.train.state import TrainState
from moe_jax.train.state import carry_prices
from moe_jax.train.state import make_training
from moe_jax.train.state import parameter_counts
from moe_jax.train.state import shards_of
from moe_jax.train.step import Batch
from moe_jax.train.step import make_train_step
from moe_jax.train.telemetry import Telemetry

_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tokenizers')


class Run:
  """A training run that is ready to go; the rest can only fail by faults.

  Args:
    config: what to do.
    workdir: where to leave it; a run found there is continued.

  Raises:
    ValueError, OSError: config, text or work directory are of no use. Nothing
      is compiled and nothing is written before that.
  """

  def __init__(self, config: Config, workdir: str | os.PathLike[str]):
    if '://' in os.fspath(workdir):
      raise ValueError(f'--workdir={workdir}: must be a local directory')
    if jax.process_count() > 1:
      raise ValueError(
        f'{jax.process_count()} processes: a run takes one, with all its '
        'devices'
      )
    self.workdir = pathlib.Path(workdir)
    self.mesh = meshes.make_mesh(config.mesh.data, config.mesh.expert)
    self.config = config = _with_shards(config, self.mesh)
    _check_same(config, self.workdir)
    self.training = make_training(config, make_optimizer(config), self.mesh)
    self.text = data.load_text(config.data)
    if config.sequence_length >= len(self.text.train_tokens):
      raise ValueError(
        f'sequence_length={config.sequence_length}: the training text has '
        f'{len(self.text.train_tokens)} tokens only'
      )
    _check_same_text(self.text.fingerprint, self.workdir)
    _check_writable(self.workdir)

  def train(self) -> None:
    """Trains from the newest checkpoint, or from scratch, to the last step."""
    config = self.config
    _use_compilation_cache()
    self.workdir.mkdir(parents=True, exist_ok=True)
    _write_json(self.workdir / 'config.json', to_dict(config))
    train_step = make_train_step(config, self.training)
    evaluation_step = evaluation.make_evaluation_step(
      self.training, self.text.tokenizer.token_bytes_V
    )
    with contextlib.ExitStack() as stack:
      checkpoints = stack.enter_context(
        Checkpoints(self.workdir / 'checkpoints', config)
      )
      step = checkpoints.latest_step() or 0
      if step >= config.steps:
        print(f'{self.workdir}: already at step {step}', file=sys.stderr)
        return
      if step:
        state, sequence = self._restore(checkpoints, step)
      else:
        state, sequence = self.training.init(), 0
        self._write_facts(state)
      telemetry = stack.enter_context(
        Telemetry(
          self.workdir,
          label=f'{config.method} seed {config.seed}',
          step=step,
          steps=config.steps,
          tokens_per_step=config.batch_size * config.sequence_length,
        )
      )
      batches = self.training_batches(sequence)
      while step < config.steps:
        state, metrics = train_step(state, next(batches))
        step += 1
        telemetry.push(step, metrics)
        last = step == config.steps
        if last or (config.eval_every and step % config.eval_every == 0):
          telemetry.wait()
          telemetry.add(self._evaluate(evaluation_step, state))
          telemetry.flush()
          telemetry.restart_clock()
        if last or step % config.checkpoint_every == 0:
          telemetry.flush()
          checkpoints.save(step, state)
          telemetry.restart_clock()

  def _restore(
    self, checkpoints: Checkpoints, step: int
  ) -> tuple[TrainState, int]:
    """Reads a checkpoint, also one of another balancer where that may change.

    The config that it was saved with says which state its routers have.
    """
    saved = checkpoints.saved_config(step)['balancer']
    facts = _read_json(self.workdir / 'run.json')
    changes = {
      key: change
      for key, change in facts.get('balancer_changes', {}).items()
      if int(key) < step  # What came later never reached a checkpoint.
    }
    if saved != self.config.balancer:
      changes[str(step)] = {'from': saved}
    if changes != facts.get('balancer_changes', {}):
      facts['balancer_changes'] = changes
      _write_json(self.workdir / 'run.json', facts)
    if saved == self.config.balancer:
      return checkpoints.restore(step, self.training.abstract)
    before = dataclasses.replace(
      self.config, method=saved['name'], balancer=saved
    )
    training = make_training(before, make_optimizer(before), self.mesh)
    state, sequence = checkpoints.restore(step, training.abstract)
    router = carry_prices(state.router, self.training.init_router())
    return state._replace(router=router), sequence

  def training_batches(self, sequence: int) -> Iterator[Batch]:
    """Yields the batches from a global sequence index on, on the devices."""
    batches = data.training_batches(
      self.text.train_tokens,
      sequence_length=self.config.sequence_length,
      batch_size=self.config.batch_size,
      seed=self.config.seed,
      start=sequence,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    for batch in batches:
      yield to_devices(self.mesh, batch)

  def evaluation_batches(self, name: str) -> Iterator[Batch]:
    """Yields all batches of an evaluation set, on the devices."""
    batches = data.evaluation_batches(
      self.text.evaluation[name],
      sequence_length=self.config.sequence_length,
      batch_size=self.config.batch_size // self.config.accumulation,
      maximum_sequences=self.config.eval_sequences,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    for batch in batches:
      yield to_devices(self.mesh, batch)

  def _evaluate(self, evaluation_step, state: TrainState) -> dict[str, float]:
    return {
      f'eval/{name}/{key}': value
      for name in self.text.evaluation
      for key, value in evaluation.evaluate(
        evaluation_step,
        state.params,
        state.router,
        self.evaluation_batches(name),
      ).items()
    }

  def _write_facts(self, state: TrainState) -> None:
    """Writes run.json: what the run was made with."""
    total, active = parameter_counts(self.config, state.params)
    facts = {
      'versions': {
        name: importlib.metadata.version(name) for name in _PACKAGES
      },
      'device_kind': jax.devices()[0].device_kind,
      'devices': jax.device_count(),
      'mesh': dict(self.mesh.shape),
      'parameters': total,
      'active_parameters': active,
      'tokens_per_step': self.config.batch_size * self.config.sequence_length,
      'train_tokens_in_corpus': len(self.text.train_tokens),
      'text_fingerprint': self.text.fingerprint,
      'evaluated_tokens': {
        name: len(self._evaluated(tokens)) - 1
        for name, tokens in self.text.evaluation.items()
      },
      'not_evaluated': self.text.not_evaluated,
      'initial_parameters_sha256': digest(state.params),
      **self._unigram_facts(),
    }
    _write_json(self.workdir / 'run.json', facts)

  def _evaluated(self, tokens_N: np.ndarray) -> np.ndarray:
    """Returns the part of a set that the model is evaluated on."""
    count = self.config.eval_sequences * self.config.sequence_length
    return tokens_N[: count + 1] if count else tokens_N

  def _unigram_facts(self) -> dict[str, float]:
    if 'validation' not in self.text.evaluation:
      return {}
    tokens = self._evaluated(self.text.evaluation['validation'])
    loss = evaluation.unigram_loss(
      self.text.train_tokens, tokens, self.config.data.vocabulary
    )
    size = int(self.text.tokenizer.token_bytes_V[tokens[1:]].sum())
    return {
      'unigram_perplexity': evaluation.perplexity(loss, len(tokens) - 1),
      'unigram_bits_per_byte': evaluation.bits_per_byte(loss, size),
    }


def to_devices(mesh: Mesh, batch: dict[str, np.ndarray]) -> Batch:
  """Splits the rows of a batch over all devices of all processes."""
  sharding = NamedSharding(mesh, meshes.BATCH)
  return Batch(
    **{
      name: jax.make_array_from_process_local_data(sharding, rows)
      for name, rows in batch.items()
    }
  )


def digest(tree: Any) -> str:
  """Hashes the bits of all arrays of a tree, in order."""
  sha256 = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    sha256.update(np.ascontiguousarray(leaf).data)
  return sha256.hexdigest()


def _with_shards(config: Config, mesh: Mesh) -> Config:
  """Writes down the number of shards where results depend on it.

  So that such a run is not continued, or compared, on another mesh unnoticed.
  """
  by_shard = config.balancer.get('scope') == 'shard'
  rounded = config.model.round_to_capacity
  if not (by_shard or rounded or config.capacity_factor):
    return config
  model = dataclasses.replace(config.model, shards=shards_of(config, mesh))
  return dataclasses.replace(config, model=model)


def _check_same(config: Config, workdir: pathlib.Path) -> None:
  """Refuses to continue a run of another config."""
  path = workdir / 'config.json'
  if not path.exists():
    if (workdir / 'checkpoints').exists():
      raise ValueError(f'--workdir={workdir}: checkpoints, but no config.json')
    return
  before, now = (
    dict(_flatten(options)) for options in (_read_json(path), to_dict(config))
  )
  differences = [
    f'{name}={now.get(name)!r} (was {before.get(name)!r})'
    for name in sorted(before.keys() | now.keys())
    if before.get(name) != now.get(name)
    and name.split('.')[0] not in MAY_CHANGE
    and name not in ('data.cache_dir', 'data.tfds_dir')
    and not (config.change_balancer and _is_of_balancer(name))
  ]
  if differences:
    raise ValueError(
      f'--workdir={workdir}: holds a run of another config: '
      f'{", ".join(differences)}; choose another work directory'
      + _change_hint(differences)
    )


def _is_of_balancer(name: str) -> bool:
  return name.split('.')[0] in ('method', 'balancer', 'change_balancer')


def _change_hint(differences: list[str]) -> str:
  if not all(_is_of_balancer(name.split('=')[0]) for name in differences):
    return ''
  return ', or go on under the other balancer by --config.change_balancer=true'


def _check_same_text(fingerprint: str, workdir: pathlib.Path) -> None:
  """Refuses to continue a run on other text."""
  path = workdir / 'run.json'
  if path.exists() and _read_json(path)['text_fingerprint'] != fingerprint:
    raise ValueError(
      f'--workdir={workdir}: this run began with other training text, or '
      'another version of the tokenizers package; choose another work directory'
    )


def _check_writable(workdir: pathlib.Path) -> None:
  """Raises OSError unless `workdir` can be made and files in it."""
  place = workdir
  while not place.exists():
    place = place.parent
  with tempfile.TemporaryFile(dir=place):
    pass


def _read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path}: damaged, not JSON ({error})') from error


def _flatten(options: dict[str, Any], prefix: str = ''):
  for name, value in options.items():
    if isinstance(value, dict):
      yield from _flatten(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value


def _write_json(path: pathlib.Path, value: Any) -> None:
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(value, indent=2) + '\n')
  os.replace(temporary, path)


def _use_compilation_cache() -> None:
  """Keeps compiled programs in the user's own cache directory.

  They are native code: the directory is readable by nobody else and never part
  of a work directory.
  """
  try:
    directory = open_cache('') / 'xla'
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
  except (OSError, ValueError):
    return  # Everything works without, only later.
  jax.config.update('jax_compilation_cache_dir', str(directory))
