"""A run from its config to its last checkpoint."""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import sys

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from moe_jax import data
from moe_jax.config import Config
from moe_jax.config import to_dict
from moe_jax.data.cache import open_cache
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import preemption
from moe_jax.parallel import processes
from moe_jax.train import evaluate as evaluation
from moe_jax.train import facts as facts_lib
from moe_jax.train import workdir as workdirs
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.checkpoint import latest_step
from moe_jax.train.optimizer import make_optimizer
from moe_jax.train.state import TrainState
from moe_jax.train.state import carry_prices
from moe_jax.train.state import make_training
from moe_jax.train.state import shards_of
from moe_jax.train.step import Batch
from moe_jax.train.step import make_train_step
from moe_jax.train.telemetry import Telemetry


class Run:
  """A training run that is ready to go; the rest can only fail by faults.

  With several processes, each makes the same run. The first one writes all
  that is not a checkpoint.

  Args:
    config: what to do.
    workdir: where to leave it, gs://... or a directory that all processes see;
      a run found there is continued.

  Raises:
    ValueError, OSError: config, text or work directory are of no use, or
      processes disagree. Nothing is compiled and nothing is written before
      that.
  """

  def __init__(self, config: Config, workdir: str | os.PathLike[str]):
    with processes.agreement() as facts:
      self.workdir = workdirs.open_workdir(workdir)
      self.mesh = meshes.make_mesh(config.mesh.data, config.mesh.expert)
      self.config = config = _with_shards(config, self.mesh)
      workdirs.check_same_config(self.workdir, config)
      self.training = make_training(config, make_optimizer(config), self.mesh)
      self.text = data.load_text(config.data)
      if config.sequence_length >= len(self.text.train_tokens):
        raise ValueError(
          f'sequence_length={config.sequence_length}: the training text has '
          f'{len(self.text.train_tokens)} tokens only'
        )
      workdirs.check_same_text(self.workdir, self.text.fingerprint)
      facts |= {
        'text': self.text.fingerprint,
        'devices of each process': jax.local_device_count(),
        **facts_lib.versions(),
        **{
          f'config.{name}': value
          for name, value in workdirs.flatten(to_dict(config)).items()
        },
      }

  def train(self) -> None:
    """Trains from the newest checkpoint, or from scratch, to the last step.

    Raises:
      FloatingPointError: a loss, gradient or logit is not finite.
      Preempted: SIGTERM came to one of the processes.
    """
    config = self.config
    _use_compilation_cache()
    step = self._open()
    if step >= config.steps:
      print(f'{self.workdir}: already at step {step}', file=sys.stderr)
      return
    train_step = make_train_step(config, self.training)
    evaluation_step = evaluation.make_evaluation_step(
      self.training, self.text.tokenizer.token_bytes_V
    )
    with contextlib.ExitStack() as stack:
      checkpoints = stack.enter_context(
        Checkpoints(self.workdir / 'checkpoints', config)
      )
      with processes.agreement() as facts:
        state, sequence = (
          self._restore(checkpoints, step) if step else self._begin()
        )
        facts['index of the next training sequence'] = sequence
        directory, upload = stack.enter_context(
          workdirs.local_log(self.workdir)
        )
        telemetry = stack.enter_context(
          Telemetry(
            directory,
            label=f'{config.method} seed {config.seed}',
            step=step,
            steps=config.steps,
            tokens_per_step=config.batch_size * config.sequence_length,
          )
        )
      preempted_after = stack.enter_context(preemption.notice())
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
        preempted = preempted_after(step)
        if last or preempted or step % config.checkpoint_every == 0:
          telemetry.flush()
          # First: a checkpoint without its metrics could not be continued.
          upload()
          checkpoints.save(step, state)
          telemetry.restart_clock()
        if preempted and not last:
          raise preemption.Preempted(
            f'saved after step {step} of {config.steps}'
          )

  def _open(self) -> int:
    """Begins to use the work directory; returns the steps done in it."""
    options = to_dict(self.config)
    with processes.agreement() as facts:
      step = latest_step(self.workdir / 'checkpoints')
      facts['checkpoint in --workdir'] = step
      if jax.process_index() == 0:
        self.workdir.mkdir(parents=True, exist_ok=True)
        workdirs.write_json(self.workdir / 'config.json', options)
    with processes.agreement():
      workdirs.check_shared(self.workdir, options)
    return step

  def _begin(self) -> tuple[TrainState, int]:
    """Makes the initial state; writes run.json: what the run was made with."""
    state = self.training.init()
    # By all processes together, as each has a part of the parameters only.
    initial = facts_lib.digest(state.params)
    if jax.process_index() == 0:
      facts = facts_lib.of_run(self.config, self.mesh, self.text, state.params)
      facts['initial_parameters_digest'] = initial
      workdirs.write_json(self.workdir / 'run.json', facts)
    return state, 0

  def _restore(
    self, checkpoints: Checkpoints, step: int
  ) -> tuple[TrainState, int]:
    """Reads a checkpoint, also one of another balancer where that may change.

    The config that it was saved with says which state its routers have.
    """
    saved = checkpoints.saved_config(step)['balancer']
    facts = workdirs.read_json(self.workdir / 'run.json')
    changes = {
      key: change
      for key, change in facts.get('balancer_changes', {}).items()
      if int(key) < step  # What came later never reached a checkpoint.
    }
    if saved != self.config.balancer:
      changes[str(step)] = {'from': saved}
    if changes != facts.get('balancer_changes', {}):
      facts['balancer_changes'] = changes
      if jax.process_index() == 0:
        workdirs.write_json(self.workdir / 'run.json', facts)
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


def to_devices(mesh: Mesh, batch: dict[str, np.ndarray]) -> Batch:
  """Splits the rows of a batch over all devices of all processes."""
  sharding = NamedSharding(mesh, meshes.BATCH)
  return Batch(
    **{
      name: jax.make_array_from_process_local_data(sharding, rows)
      for name, rows in batch.items()
    }
  )


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
