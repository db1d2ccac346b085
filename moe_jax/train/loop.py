"""A run from its config to its last checkpoint."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import os
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from moe_jax import data
from moe_jax import nn
from moe_jax.config import Config
from moe_jax.config import flatten
from moe_jax.config import freeze
from moe_jax.config import method_of
from moe_jax.config import to_dict
from moe_jax.config import upgrade
from moe_jax.data.cache import open_cache
from moe_jax.parallel import exchange
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import preemption
from moe_jax.parallel import processes
from moe_jax.train import evaluate as evaluation
from moe_jax.train import facts as facts_lib
from moe_jax.train import lock
from moe_jax.train import workdir as workdirs
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.checkpoint import Position
from moe_jax.train.checkpoint import restore_newest
from moe_jax.train.checkpoint import steps
from moe_jax.train.events import describe
from moe_jax.train.optimizer import make_optimizer
from moe_jax.train.state import Training
from moe_jax.train.state import TrainState
from moe_jax.train.state import check_memory
from moe_jax.train.state import make_training
from moe_jax.train.state import shards_of
from moe_jax.train.step import Batch
from moe_jax.train.step import make_train_step
from moe_jax.train.step import to_devices
from moe_jax.train.telemetry import Telemetry


class Run:
  """A training run that is ready to go; the rest can only fail by faults.

  With several processes, each makes the same run. The first one writes all
  that is not a checkpoint.

  Args:
    config: what to do.
    workdir: where to leave it, gs://... or a directory that all processes see;
      a run found there is continued.
    allow_config_change: options that may differ from that run's.

  Raises:
    ValueError, OSError: config, text or work directory are of no use, or
      processes disagree. Nothing is compiled and nothing is written before
      that.
  """

  def __init__(
    self,
    config: Config,
    workdir: str | os.PathLike[str],
    allow_config_change: Sequence[str] = (),
  ):
    with processes.agreement() as facts:
      self.workdir = workdirs.open_workdir(workdir)
      self.mesh = meshes.make_mesh(config.mesh.data, config.mesh.expert)
      self.config = config = _with_shards(config, self.mesh)
      self._allowed = allow_config_change
      workdirs.check_same_config(self.workdir, config, allow_config_change)
      self.training = make_training(config, make_optimizer(config), self.mesh)
      check_memory(self.training.abstract)
      self.text = data.load_text(config.data)
      if config.sequence_length >= len(self.text.train_tokens):
        raise ValueError(
          f'sequence_length={config.sequence_length}: the training text has '
          f'{len(self.text.train_tokens)} tokens only'
        )
      self._check_workdir()
      facts |= {
        'text': self.text.fingerprint,
        'devices of each process': jax.local_device_count(),
        **facts_lib.versions(),
        **{
          f'config.{name}': value
          for name, value in flatten(to_dict(config)).items()
        },
      }

  def _check_workdir(self) -> None:
    """Raises ValueError if the work directory is that of another run."""
    workdirs.check_same_config(self.workdir, self.config, self._allowed)
    workdirs.check_same_text(self.workdir, self.text.fingerprint)

  def train(self, preempted: Callable[[], bool] = preemption.never) -> None:
    """Trains from the newest checkpoint, or from scratch, to the last step.

    Args:
      preempted: asked after each step whether to save and end now; see
        `preemption.notice`.

    Raises:
      Refused: the work directory cannot be used after all, or no checkpoint in
        it.
      FloatingPointError: too many steps in a row were not finite.
      Preempted: `preempted` said so.
    """
    _use_compilation_cache()
    with contextlib.ExitStack() as stack:
      with processes.agreement():
        if jax.process_index() == 0:
          self.workdir.mkdir(parents=True, exist_ok=True)
        still_ours = stack.enter_context(lock.hold(self.workdir))
        self._check_workdir()  # Another run may have come first.
      state, position = self._open()
      if position.step >= self.config.steps:
        print(
          f'{self.workdir}: already at step {position.step}', file=sys.stderr
        )
        return
      with processes.agreement():
        checkpoints = stack.enter_context(self._checkpoints())
        directory, upload = stack.enter_context(
          workdirs.local_log(self.workdir, still_ours)
        )
        telemetry = stack.enter_context(
          Telemetry(
            directory,
            label=f'{method_of(self.config.balancer)} seed {self.config.seed}',
            step=position.step,
            steps=self.config.steps,
            tokens_per_step=self.config.batch_size
            * self.config.sequence_length,
            skipped=(position.skipped, position.skipped_in_a_row),
            allowed=self.config.skipped_steps,
            experts_every=self.config.experts_every,
            text=self._description() if directory else '',
          )
        )

      def save(
        state: TrainState, position: Position, loss: float | None, wait: bool
      ) -> None:
        still_ours()
        telemetry.flush(sync=True)
        # First: a checkpoint without its metrics could not be continued.
        workdirs.patiently(upload, f'{self.workdir}: upload')
        position = position._replace(
          skipped=telemetry.skipped,
          skipped_in_a_row=telemetry.skipped_in_a_row,
        )
        checkpoints.save(state, position, loss=loss, wait=wait)
        telemetry.restart_clock()

      with exchange.refusal_explained():
        self._steps(state, position, telemetry, save, preempted)

  def _steps(
    self,
    state: TrainState,
    position: Position,
    telemetry: Telemetry,
    save: Callable[..., None],
    preempted: Callable[[], bool],
  ) -> None:
    """Trains from `position` to the last step, evaluates and saves."""
    config, step = self.config, position.step
    if preempted():  # While text or checkpoint were read.
      raise preemption.Preempted(f'before step {step + 1} of {config.steps}')
    train_step = make_train_step(config, self.training)
    evaluation_step = evaluation.make_evaluation_step(
      self.training, self.text.tokenizer.token_bytes_V
    )
    sequence = position.next_sequence
    batches = self.training_batches(sequence)
    while step < config.steps:
      state, metrics, diagnostics = train_step(state, next(batches))
      step += 1
      first, sequence = sequence, sequence + config.batch_size
      telemetry.push(step, metrics, diagnostics, range(first, sequence))
      last = step == config.steps
      loss = None
      if last or (config.eval_every and step % config.eval_every == 0):
        telemetry.wait()
        evaluated = self._evaluate(evaluation_step, state)
        loss = evaluated.get('eval/validation/bits_per_byte')
        telemetry.add(evaluated)
        telemetry.flush()
        telemetry.restart_clock()
      ends = preempted() or last
      if ends or step % config.checkpoint_every == 0:
        save(state, Position(step, sequence), loss, ends)
      if ends and not last:
        raise preemption.Preempted(f'saved after step {step} of {config.steps}')

  def _description(self) -> str:
    facts = workdirs.read_json(self.workdir / 'run.json')
    return describe(to_dict(self.config), facts)

  def _checkpoints(self) -> Checkpoints:
    run = ''
    if jax.process_index() == 0:  # Who writes all that is no array.
      run = workdirs.read_json(self.workdir / 'run.json')['run']
    arrays = jax.tree.leaves(self.training.abstract)
    return Checkpoints(
      self.workdir / 'checkpoints',
      self.config,
      run,
      largest=max(x.size * x.dtype.itemsize for x in arrays),
    )

  def _open(self) -> tuple[TrainState, Position]:
    """Reads the state of the run that the work directory holds, or makes one.

    Only then the config that is wanted now is written down.
    """
    size = sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(self.training.abstract)
    )
    with processes.agreement() as facts:
      found = steps(self.workdir / 'checkpoints')
      facts['checkpoints in --workdir'] = str(found)
      if jax.process_index() == 0:
        missing = self.config.checkpoints_kept + 1 - len(found)
        workdirs.check_space(self.workdir, size, max(1, missing))
        if not found:
          workdirs.check_nothing_is_lost(
            self.workdir, 2 * self.config.checkpoint_every
          )
    saved = self._restore() if found else None
    options = to_dict(self.config)
    with processes.agreement():
      if jax.process_index() == 0:
        workdirs.write_json(self.workdir / 'config.json', options)
        # Who has the work directory can read and write the model's tokens.
        tokenizer = json.loads(self.text.tokenizer.to_json())
        workdirs.write_json(self.workdir / 'tokenizer.json', tokenizer)
    with processes.agreement():
      workdirs.check_shared(self.workdir, options)
    return saved or self._begin()

  def _begin(self) -> tuple[TrainState, Position]:
    """Makes the initial state; writes run.json: what the run was made with."""
    state = self.training.init()
    # By all processes together, as each has a part of the parameters only.
    initial = facts_lib.digest(state.params)
    with processes.agreement():
      if jax.process_index() == 0:
        facts = facts_lib.of_run(
          self.config, self.mesh, self.text, state.params
        )
        facts['initial_parameters_digest'] = initial
        workdirs.write_json(self.workdir / 'run.json', facts)
    return state, Position()

  def _restore(self) -> tuple[TrainState, Position]:
    """Reads the newest checkpoint of use, also one of another balancer.

    The config that it was saved with says which state its routers have.
    """
    with processes.agreement():
      facts = workdirs.read_json(self.workdir / 'run.json')

    def training_under(config: dict[str, Any]) -> Training:
      if config['balancer'] == self.config.balancer:
        return self.training
      # All of the old options: they agree with each other.
      mesh = dataclasses.asdict(self.config.mesh)
      before = freeze(upgrade(config) | {'mesh': mesh})
      return make_training(before, make_optimizer(before), self.mesh)

    state, position, config = restore_newest(
      self.workdir / 'checkpoints',
      facts.get('run', ''),
      lambda config: training_under(config).abstract,
    )
    changes = {
      step: change
      for step, change in facts.get('config_changes', {}).items()
      if int(step) < position.step  # What came later reached no checkpoint.
    }
    now = workdirs.differences(config, to_dict(self.config))
    if now:
      changes[str(position.step)] = {
        name: {'from': before, 'to': after}
        for name, (before, after) in now.items()
      }
    if changes != facts.get('config_changes', {}):
      with processes.agreement():
        if jax.process_index() == 0:
          workdirs.write_json(
            self.workdir / 'run.json', facts | {'config_changes': changes}
          )
    if config['balancer'] != self.config.balancer:
      router = nn.carry_prices(state.router, self.training.init_router())
      state = state._replace(router=router)
    return state, position

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


def _with_shards(config: Config, mesh: Mesh) -> Config:
  """Writes down the number of shards where results depend on it.

  So that such a run is not continued, or compared, on another mesh unnoticed.
  """
  by_shard = config.balancer_rule.per_shard
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
