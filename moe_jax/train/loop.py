"""A run from its plan to its last checkpoint."""

from collections.abc import Callable
import dataclasses
import json
import math
import sys
from typing import Any

import jax
import numpy as np

from moe_jax import config as config_lib
from moe_jax import nn
from moe_jax.data.cache import open_cache
from moe_jax.parallel import exchange
from moe_jax.runs import checksums
from moe_jax.runs import events
from moe_jax.runs import preemption
from moe_jax.runs.checkpoints import ITEMS
from moe_jax.runs.checkpoints import Position
from moe_jax.runs.checkpoints import Saved
from moe_jax.runs.reader import Reader
from moe_jax.runs.writer import Writer
from moe_jax.runs.writer import open_writer
from moe_jax.train import facts as facts_lib
from moe_jax.train.batches import training_batches
from moe_jax.train.evaluate import make_evaluation
from moe_jax.train.optimizer import make_schedule
from moe_jax.train.plan import Plan
from moe_jax.train.state import Training
from moe_jax.train.state import TrainState
from moe_jax.train.state import make_training
from moe_jax.train.step import make_train_step


def train(plan: Plan, preempted: Callable[[], bool] = preemption.never) -> None:
  """Trains from the newest checkpoint, or from scratch, to the last step.

  Args:
    plan: of `plan.plan`.
    preempted: asked after each step, and within evaluations, whether to save
      and end now; see `preemption.notice`.

  Raises:
    Refused: the work directory cannot be used after all, or no checkpoint in
      it.
    FloatingPointError: too many steps in a row were not finite.
    Preempted: `preempted` said so, and all is saved.
  """
  config, steps = plan.config, plan.config.steps
  _use_compilation_cache()
  with (
    exchange.refusal_explained(),
    open_writer(
      plan.workdir, plan.options, label=plan.label, check=plan.check_workdir
    ) as run,
  ):
    state, position = _restore_or_begin(plan, run)
    late = plan.evaluates_after(position.step) and not run.evaluated
    if position.step >= steps and not late:
      print(f'{plan.workdir}: already at step {steps}', file=sys.stderr)
      return
    run.open(_description(plan), largest=max(_sizes(plan)))
    if preempted():  # While text or checkpoint were read.
      raise preemption.Preempted(f'before step {position.step + 1} of {steps}')
    train_step = make_train_step(config, plan.training)
    evaluate = make_evaluation(config, plan.training, plan.mesh, plan.text)
    if late and not run.add(evaluate(state, preempted)):
      raise preemption.Preempted(f'after step {position.step} of {steps}')
    batches = training_batches(
      config, plan.mesh, plan.text.train_tokens, position.next_sequence
    )
    for step in range(position.step + 1, steps + 1):
      state, *told = train_step(state, next(batches))
      run.record(step, *told)  # It is read while the next step runs.
      last, stop = step == steps, preempted()
      if last or stop or step % config.checkpoint_every == 0:
        run.save(state, wait=last or stop)  # Before the evaluation can fail.
      if not stop and plan.evaluates_after(step):
        stop = not run.add(evaluate(state, preempted))
      if stop:
        run.save(state, wait=True)
        raise preemption.Preempted(f'saved after step {step} of {steps}')


def _restore_or_begin(plan: Plan, run: Writer) -> tuple[TrainState, Position]:
  """Reads the state of the run in the work directory, or makes the first one.

  Only then is the config that is wanted now written down.
  """

  def items_under(options: dict[str, Any]) -> dict[str, Any]:
    # Routers have the state of the balancer that the checkpoint was saved by.
    abstract = _training_under(plan, options).abstract
    return {name: getattr(abstract, name) for name in ITEMS}

  saved = run.restore(items_under, size=sum(_sizes(plan)))
  if saved is None:
    state, position = plan.training.init(), Position()
    facts = facts_lib.of_run(plan.config, plan.mesh, plan.text, state.params)
    # By all processes together, as each has only a part of the parameters.
    facts['initial_parameters_digest'] = checksums.digest(state.params)
  else:
    state, position = _continued(plan, saved), saved.position
    facts = _changed_facts(plan, saved)
  run.begin(saved, facts, json.loads(plan.text.tokenizer.to_json()))
  return state, position


def _sizes(plan: Plan) -> list[int]:
  """Returns the bytes of each array of the state."""
  leaves = jax.tree.leaves(plan.training.abstract)
  return [leaf.size * leaf.dtype.itemsize for leaf in leaves]


def _training_under(plan: Plan, options: dict[str, Any]) -> Training:
  """Plans the model under the balancer of a checkpoint, on the mesh of now."""
  options = config_lib.upgrade(options)
  if options['balancer'] == plan.config.balancer:
    return plan.training
  mesh = dataclasses.asdict(plan.config.mesh)
  config = config_lib.freeze(options | {'mesh': mesh})
  return make_training(config, plan.mesh)


def _continued(plan: Plan, saved: Saved) -> TrainState:
  """Returns the state to go on from, also under another balancer."""
  step = np.int32(saved.position.step)
  sharding = plan.training.abstract.step.sharding
  state = TrainState(step=jax.device_put(step, sharding), **saved.items)
  if config_lib.upgrade(saved.config)['balancer'] == plan.config.balancer:
    return state
  router = nn.carry_prices(state.router, plan.training.init_router())
  return state._replace(router=router)


def _changed_facts(plan: Plan, saved: Saved) -> dict[str, Any]:
  """Returns run.json with what changes from this checkpoint on."""
  facts, step = Reader(plan.workdir).facts, saved.position.step
  before = config_lib.upgrade(saved.config)
  changes = {
    at: change
    for at, change in facts.get('config_changes', {}).items()
    if int(at) < step  # What came later reached no checkpoint.
  }
  now = config_lib.differences(before, plan.options)
  if now:
    changes[str(step)] = {
      name: {'from': old, 'to': new} for name, (old, new) in now.items()
    }
    updates = step - saved.position.skipped
    old, new = (
      float(make_schedule(config)(updates))
      for config in (config_lib.freeze(before), plan.config)
    )
    if jax.process_index() == 0 and not math.isclose(old, new, rel_tol=1e-3):
      print(
        f'note: {", ".join(now)} changed: the learning rate of step {step + 1} '
        f'is {new:.3g}, without the change it would be {old:.3g}',
        file=sys.stderr,
      )
  return facts | ({'config_changes': changes} if changes else {})


def _description(plan: Plan) -> str:
  facts = Reader(plan.workdir).facts
  return events.describe(plan.label, plan.options, facts)


def _use_compilation_cache() -> None:
  """Keeps compiled programs, unless the user has named a place for them.

  They are native code: the directory is the user's own, readable by nobody
  else, and never part of a work directory.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  try:
    directory = open_cache('') / 'xla'
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
  except (OSError, ValueError):
    return  # All works without it, only later.
  jax.config.update('jax_compilation_cache_dir', str(directory))
