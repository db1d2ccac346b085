"""A run from its plan to its last checkpoint."""

from collections.abc import Callable, Mapping
import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config as config_lib
from moe_jax import nn
from moe_jax.data.cache import open_cache
from moe_jax.options import Refused
from moe_jax.parallel import compilers
from moe_jax.runs import checkpoints, checksums, preemption, routes, writer
from moe_jax.runs.profile import profiled
from moe_jax.train import facts as facts_lib
from moe_jax.train.batches import make_epochs, training_batches
from moe_jax.train.evaluate import make_evaluation
from moe_jax.train.optimizer import make_schedule
from moe_jax.train.plan import Plan
from moe_jax.train.state import TrainState, abstract_router
from moe_jax.train.step import make_train_step

_MANY_PASSES = 100


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
  _use_compilation_cache()
  directory = writer.open_writer(
    plan.workdir, plan.options, plan.label, plan.check_workdir
  )
  with compilers.refusal_explained(), directory as run:
    state, position = _restore_or_begin(plan, run)
    done, steps = position.step, plan.config.steps
    late = plan.evaluates_after(done) and not run.evaluated
    if done >= steps and not late:
      print(f'{plan.workdir}: already at step {done}', file=sys.stderr)
      return
    run.open(facts_lib.seconds_at_peak(plan.config, plan.mesh, state.params))
    _tell_passes(plan)
    if plan.config.record_routes:
      _tell_size_of_routes(plan, done)
    names = [source.name for source in plan.text.train]
    train_step = make_train_step(plan.config, plan.training, names)
    evaluate = make_evaluation(plan.config, plan.training, plan.mesh, plan.text)
    # The first question is of the time while text and checkpoint were read.
    if preempted() or (late and not run.add(evaluate, state, preempted)):
      raise preemption.Preempted(f'after step {done} of {steps}')
    first, size = position.next_sequence, plan.config.batch_size
    batches = run.timed(
      training_batches(plan.config, plan.mesh, plan.text, first)
    )
    epochs = make_epochs(plan.config, plan.text)
    coming = range(done + 1, steps + 1)
    for step in profiled(coming, plan.config.profile, plan.workdir):
      state, metrics, diagnostics = train_step(state, next(batches))
      metrics |= epochs(first + (step - done) * size)
      run.record(step, metrics, diagnostics)  # Read while the next step runs.
      last = step == steps
      stop = preempted() and not last  # An evaluation asks for itself.
      evaluates = plan.evaluates_after(step) and not stop
      due = last or stop or step % plan.config.checkpoint_every == 0
      # The evaluation can fail: not before there is a checkpoint.
      if due or (evaluates and not run.saved_step):
        run.save(state, wait=last or stop)
      if evaluates:
        stop = not run.add(evaluate, state, preempted)
      if stop:
        run.save(state, wait=True)
        raise preemption.Preempted(f'saved after step {step} of {steps}')


def _tell_passes(plan: Plan) -> None:
  """Says where a text is read so often that another one was meant, maybe."""
  config = plan.config
  size = sum(len(source.tokens) for source in plan.text.train)
  passes = config.steps * config.batch_size * config.sequence_length / size
  if passes > _MANY_PASSES and jax.process_index() == 0:
    print(
      f'note: steps={config.steps}: {passes:,.0f} passes over '
      f'{size / 1e6:.3g} M tokens; data.corpus names a larger text',
      file=sys.stderr,
    )


def _tell_size_of_routes(plan: Plan, done: int) -> None:
  """Says how much will be written, after so many steps."""
  config, slots = plan.config, plan.config.model.slots_per_token
  if config.replay_routes and done < config.steps:
    recorded = routes.Reader(config.replay_routes)
    slots = recorded.read(done + 1, range(1)).shape[-1]
  layers = config.model.layers - config.model.dense_layers
  size = 2 * config.batch_size * layers * config.sequence_length * slots
  if jax.process_index() == 0:
    print(
      f'note: record_routes=True: writes {size / 1e6:.3g} MB a step, '
      f'{size * (config.steps - done) / 1e6:.3g} MB in total, into '
      f'{plan.workdir}/routes',
      file=sys.stderr,
    )


def _restore_or_begin(
  plan: Plan, run: writer.Writer
) -> tuple[TrainState, checkpoints.Position]:
  """Reads the state of the run in the work directory, or makes the first one.

  Only then is the config that is wanted now written down.
  """

  def items_under(options: dict[str, Any]) -> checkpoints.Items:
    abstract = plan.training.abstract
    router = _router_under(plan, config_lib.upgrade(options)['balancer'])
    return checkpoints.items_of(abstract) | {'router': router}

  saved = run.restore(items_under)
  if saved is None:
    state, position = _first_state(plan), checkpoints.Position()
    facts = facts_lib.of_run(plan.config, plan.mesh, plan.text, state.params)
    # By all processes together, as each has only a part of the parameters.
    facts['initial_parameters_digest'] = checksums.digest(state.params)
    if plan.start:
      facts['init_from'] = plan.start.facts
  else:
    before = config_lib.upgrade(saved.config)
    saved = saved._replace(position=_position_now(plan, before, saved))
    state, position = _continued(plan, before, saved), saved.position
    facts = _changed_facts(plan, before, position, run.facts)
  run.begin(saved, facts, json.loads(plan.text.tokenizer.to_json()))
  return state, position


def _first_state(plan: Plan) -> TrainState:
  """Makes random parameters, or takes those of another run."""
  state, start = plan.training.init(), plan.start
  if not start:
    return state
  wanted = {'params': plan.training.abstract.params}
  balancer = start.options['balancer']
  if plan.config.init_router:
    wanted['router'] = _router_under(plan, balancer)
  items = start.read(wanted)
  if plan.config.init_router:
    items['router'] = _router_now(plan, balancer, items['router'])
  state = state._replace(**items)
  if state.average is not None:  # It begins where they do.
    state = state._replace(average=jax.tree.map(jnp.copy, state.params))
  return state


def _continued(
  plan: Plan, before: dict[str, Any], saved: checkpoints.Saved
) -> TrainState:
  """Returns the state to resume from, also where it is of another balancer."""
  step = np.int32(saved.position.step)
  sharding = plan.training.abstract.step.sharding
  state = TrainState(step=jax.device_put(step, sharding), **saved.items)
  router = _router_now(plan, before['balancer'], state.router)
  return state._replace(router=router)


def _router_under(plan: Plan, balancer: Mapping[str, Any]) -> Any:
  """Returns the abstract router state that a balancer leaves in checkpoints."""
  if balancer == plan.config.balancer:
    return plan.training.abstract.router
  # Some balancers allow no accumulation.
  options = plan.options | {'balancer': balancer, 'accumulation': 1}
  return abstract_router(config_lib.freeze(options), plan.mesh)


def _router_now(plan: Plan, balancer: Mapping[str, Any], router: Any) -> Any:
  """Returns router state that a balancer left, for the balancer of now."""
  if balancer == plan.config.balancer:
    return router
  return nn.carry_prices(nn.prices(router), plan.training.init_router())


def _position_now(
  plan: Plan, before: dict[str, Any], saved: checkpoints.Saved
) -> checkpoints.Position:
  """Returns the position at the same token, in sequences of today's length.

  Raises:
    Refused: routes to be replayed are of other rows.
  """
  config, position = plan.config, saved.position
  tokens = position.next_sequence * before['sequence_length']
  sequence = tokens // config.sequence_length
  if config.replay_routes and sequence != position.step * config.batch_size:
    raise Refused(
      f'replay_routes={config.replay_routes}: not where batch_size or '
      'sequence_length of this run changed; its steps have other rows'
    )
  return position._replace(next_sequence=sequence)


def _changed_facts(
  plan: Plan,
  before: dict[str, Any],
  position: checkpoints.Position,
  facts: dict[str, Any],
) -> dict[str, Any]:
  """Returns run.json with what changes from this checkpoint on.

  Args:
    plan: of now.
    before: the options that the checkpoint was saved under.
    position: where it was saved.
    facts: what run.json says so far.
  """
  changes = {
    at: change
    for at, change in facts.get('config_changes', {}).items()
    if int(at) < position.step  # What came later reached no checkpoint.
  }
  now = config_lib.differences(before, plan.options)
  if now:
    changes[str(position.step)] = {
      name: {'from': old, 'to': new} for name, (old, new) in now.items()
    }
    updates = position.step - position.skipped
    old, new = (
      float(make_schedule(config)(updates))
      for config in (config_lib.freeze(before), plan.config)
    )
    if jax.process_index() == 0 and not math.isclose(old, new, rel_tol=1e-3):
      print(
        f'note: {", ".join(now)} changed: the learning rate of step '
        f'{position.step + 1} is {new:.3g}, without the change it would be '
        f'{old:.3g}',
        file=sys.stderr,
      )
  if changes == facts.get('config_changes', {}):
    return facts
  return facts | {
    'config_changes': changes,
    'shards': facts_lib.shards_that_matter(plan.config, plan.mesh),
    'tokens_per_step': plan.config.batch_size * plan.config.sequence_length,
  }


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
