"""One optimizer step: the place where the training state changes."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from moe_jax import nn, routing
from moe_jax.config import Config
from moe_jax.parallel import mesh as meshes
from moe_jax.train.batches import Batch
from moe_jax.train.optimizer import make_schedule
from moe_jax.train.state import Training, TrainState


def cross_entropy(logits_BxSxV: jax.Array, batch: Batch) -> jax.Array:
  """Computes each target's negative log-likelihood in nats; 0 if masked."""
  loss_BxS = optax.softmax_cross_entropy_with_integer_labels(
    logits_BxSxV, batch.targets
  )
  return loss_BxS if batch.mask is None else jnp.where(batch.mask, loss_BxS, 0)


def make_train_step(
  config: Config, training: Training, sources: Sequence[str] = ()
) -> Callable[[TrainState, Batch], tuple[TrainState, dict, dict]]:
  """Builds the jit-compiled step.

  The loss is the mean over the tokens of the whole step; losses of balancers
  are averaged over microbatches.

  Args:
    config: what to train.
    training: the model.
    sources: names of the texts, for the metrics where there are several.

  Returns:
    `(state, batch) -> (state, metrics, diagnostics)`. The state given is
    donated. Metrics have a value for each MoE layer where their name ends in
    '/layer'. Diagnostics are for the report of a step that was skipped:
    `infinite` [L], more than 0 where a router's logits are not finite, and the
    `squares` of `gradient` and `parameters`; with `config.record_routes` also
    `routes`, int16 [B, L, S, K], split over the batch, see `Batch.experts`.
  """
  schedule = make_schedule(config)
  gradients = functools.partial(_gradients, training.graphdef, config)
  mesh = training.abstract.step.sharding.mesh
  # Parameters that are split have gradients too large to be kept whole.
  if config.accumulation > 1 and mesh.size > 1 and not config.mesh.fsdp:
    gradients = _summed_once(gradients, training.abstract.params, mesh)

  def train_step(state, batch):
    tokens = batch.inputs.size if batch.mask is None else jnp.sum(batch.mask)
    tokens = jnp.maximum(tokens, 1)
    (gradient, sums, most), router, routes = gradients(
      state.params, state.router, batch, tokens
    )
    # Else XLA sums the same squares again for the norm, and on CPUs keeps them.
    gradient_squares = lax.optimization_barrier(squares(gradient))
    gradient_norm = jnp.sqrt(sum(map(jnp.sum, gradient_squares.values())))
    finite = jnp.isfinite(sums['loss'] + sums['auxiliary_loss'])
    finite &= jnp.isfinite(gradient_norm)
    finite &= ~jnp.any(sums['router']['infinite'])
    update = functools.partial(
      _update,
      training,
      config.optimizer.average,
      gradient,
      gradient_norm,
      router,
    )
    new = apply_if(finite, update, state)
    # Not `state.step`: skipped steps update nothing.
    (_, updates), *_ = optax.tree.get_all_with_path(state.optimizer, 'count')
    metrics = {
      'train/loss': sums['loss'],
      **_by_source(sources, sums['sources']),
      'train/aux_loss': sums['auxiliary_loss'],
      'train/gradient_norm': gradient_norm,
      'train/learning_rate': schedule(updates),
      **nn.router_metrics(sums['router'], most),
      'router/q/layer': nn.prices(new.router),
    }
    diagnostics = {
      'infinite': sums['router']['infinite'],
      'squares': {
        'gradient': gradient_squares,
        'parameters': squares_unless(finite, new.params),
      },
      'routes': routes,
    }
    return new._replace(step=state.step + 1), metrics, diagnostics

  shardings = jax.tree.map(lambda x: x.sharding, training.abstract)
  whole = shardings.step  # So that every process can read them.
  by_row = NamedSharding(mesh, meshes.BATCH)
  diagnostics = {'infinite': whole, 'squares': whole, 'routes': by_row}
  return jax.jit(
    train_step,
    donate_argnums=0,
    out_shardings=(shardings, whole, diagnostics),
    compiler_options=training.compiler_options,
  )


def _summed_once(gradients, params, mesh):
  """Returns `gradients` that are summed over devices at the end of a step.

  The compiler would sum them after every microbatch. So each device computes
  its own, of the loss over all.
  """
  specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)

  def over_copies(function, tree):
    """Calls a function of each leaf and the axes that it is not split over."""
    return jax.tree.map(
      lambda leaf, spec: function(
        leaf, tuple(axis for axis in meshes.AXES if axis not in spec)
      ),
      tree,
      specs,
    )

  def of_device(params, router, batch, tokens):
    own = over_copies(functools.partial(lax.pcast, to='varying'), params)
    (gradient, sums, most), router, routes = gradients(
      own, router, batch, tokens, axis_name=meshes.AXES
    )
    return (over_copies(lax.psum, gradient), sums, most), router, routes

  same = P()
  return jax.shard_map(
    of_device,
    mesh=mesh,
    in_specs=(specs, same, meshes.BATCH, same),
    out_specs=((specs, same, same), same, meshes.BATCH),
  )


def _gradients(graphdef, config, params, router, batch, tokens, axis_name=None):
  """Adds up the gradients and sums of microbatches; routers move in each."""
  losses = functools.partial(_losses, graphdef, config, axis_name)

  def of_microbatch(router, batch):
    gradient, (sums, most, router, routes) = jax.grad(losses, has_aux=True)(
      params, router, batch, tokens
    )
    return (gradient, sums, most), router, routes

  def combine(so_far, new):
    *sums, most = so_far
    *more, of_new = new
    sums = jax.tree.map(jnp.add, sums, more)
    return *sums, jax.tree.map(jnp.maximum, most, of_new)

  return add_up(of_microbatch, router, batch, config.accumulation, combine)


def _losses(graphdef, config, axis_name, params, router, batch, tokens):
  """Returns the loss of a microbatch; sums, what is greatest, routers, routes.

  Routes are None where nobody records them.
  """
  model = nnx.merge(graphdef, params, router, copy=True)
  experts = batch.experts
  if experts is not None:
    experts = experts.swapaxes(0, 1)
  logits, outputs = model(
    batch.inputs,
    batch.mask,
    experts,
    positions_BxS=batch.positions,
    train=True,
  )
  loss_BxS = cross_entropy(logits, batch)
  loss = jnp.sum(loss_BxS) / tokens
  of_sources = _sums_of_sources(loss_BxS, batch)
  if axis_name is not None:
    loss, of_sources = lax.psum((loss, of_sources), axis_name)
  sums = {
    'loss': loss,
    'sources': of_sources,
    'auxiliary_loss': jnp.sum(outputs.loss) / config.accumulation,
    'router': outputs.sums,
  }
  loss = sums['loss'] + sums['auxiliary_loss']
  routes = None
  if config.record_routes:
    routes = _routes(outputs.choice, batch.inputs.shape)
  return loss, (sums, outputs.most, _router_state(model), routes)


def _sums_of_sources(loss_BxS: jax.Array, batch: Batch) -> dict[str, jax.Array]:
  """Sums losses and tokens of each text; nothing where there is one."""
  if batch.sources is None:
    return {}
  mask_BxS = batch.mask
  if mask_BxS is None:
    mask_BxS = jnp.ones_like(batch.inputs)

  def of_each(x_BxS):
    x_Bx1 = jnp.sum(x_BxS, axis=1, keepdims=True)
    return jnp.sum(jnp.where(batch.sources, x_Bx1, 0), axis=0)

  return {'loss': of_each(loss_BxS), 'tokens': of_each(mask_BxS)}


def _by_source(
  names: Sequence[str], sums: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
  """Returns loss and share of each text; NaN is the loss of no tokens."""
  if not sums:
    return {}
  losses = sums['loss'] / sums['tokens']
  shares = sums['tokens'] / jnp.sum(sums['tokens'])
  metrics = {}
  for name, loss, share in zip(names, losses, shares, strict=True):
    metrics |= {f'train/loss/{name}': loss, f'data/share/{name}': share}
  return metrics


def _routes(choice: routing.Choice, shape_BxS: tuple[int, int]) -> jax.Array:
  """Returns the experts of all layers, int16 [B, L, S, K]; -1 is no expert."""
  experts_LxTxK = jnp.where(choice.active, choice.experts, -1)
  layers, _, slots = experts_LxTxK.shape
  experts_LxBxSxK = experts_LxTxK.reshape(layers, *shape_BxS, slots)
  return experts_LxBxSxK.swapaxes(0, 1).astype(jnp.int16)


def _update(training, decay, gradient, norm, router, turn, state) -> TrainState:
  """Moves parameters by a gradient and routers by what they have observed."""
  with jax.named_scope('optimizer'):
    # `1 - turn` is 1, but XLA does not know it: else it would compute the
    # moments' products of the gradient before the loop, and keep them.
    gradient = jax.tree.map(lambda g: g * (1 - turn), gradient)
    updates, optimizer = training.optimizer.update(
      gradient, state.optimizer, state.params, norm=norm
    )
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
      # Not `optax.incremental_update`, whose two weights round to another sum
      # than 1 where the decay is near it.
      average = jax.tree.map(
        lambda a, x: a + (1 - decay) * (x - a), average, params
      )
  model = nnx.merge(training.graphdef, state.params, router, copy=True)
  nn.update_routers(model)
  router = _router_state(model)
  return TrainState(state.step, params, optimizer, router, average)


def _router_state(model: nn.Decoder) -> dict[str, Any]:
  return nnx.to_pure_dict(nnx.state(model, nn.RouterState))


def _add(sums: Any, new: Any) -> Any:
  return jax.tree.map(jnp.add, sums, new)


def add_up(
  function: Callable[[Any, Batch], tuple[Any, Any, Any]],
  carry: Any,
  batch: Batch,
  count: int,
  combine: Callable[[Any, Any], Any] = _add,
) -> tuple[Any, Any, Any]:
  """Sums over microbatches what a function returns, one after the other.

  Args:
    function: `(carry, microbatch) -> (sums, carry, rows)`; rows are arrays with
      an element for each row of the microbatch.
    carry: what the first microbatch starts from.
    batch: to be split.
    count: microbatches, of equal size.
    combine: `(sums, sums) -> sums`; starts from zeros.

  Returns:
    The sums, the carry of the last microbatch, and the rows in the order of
    the batch.
  """
  if count == 1:
    return function(carry, batch)
  # Strided, so that every device has rows of each microbatch.
  microbatches = jax.tree.map(
    lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch
  )
  first = jax.tree.map(lambda x: x[0], microbatches)
  shapes, *_ = jax.eval_shape(function, carry, first)
  zeros = jax.tree.map(jnp.zeros_like, shapes)

  def add(totals, microbatch):
    sums, carry = totals
    new, carry, rows = function(carry, microbatch)
    return (combine(sums, new), carry), rows

  (sums, carry), rows = lax.scan(add, (zeros, carry), microbatches)
  rows = jax.tree.map(
    lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rows
  )
  return sums, carry, rows


def apply_if(
  condition: jax.Array, update: Callable[[jax.Array, Any], Any], state: Any
) -> Any:
  """Returns `update(turn, state)` where `condition` holds, else `state`.

  A loop of one turn, its 0, or of none: XLA updates in place what a loop
  carries. `lax.cond` and `jnp.where` copied, which took 2 to 4 % of the demo's
  steps.
  """
  turns = condition.astype(jnp.int32)
  return lax.fori_loop(0, turns, update, state)


def squares_unless(finite: jax.Array, params: Any) -> dict[str, jax.Array]:
  """Computes `squares`, or zeros where nobody will ask for them."""
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(squares, params))
  return lax.cond(finite, lambda _: zeros, squares, params)


def squares(tree: Any) -> dict[str, jax.Array]:
  """Sums the squares of every array, by its name.

  Returns:
    Scalars; [L] of an array of stacked layers.
  """
  sums = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    stacked = nn.is_stacked(path[0].key)
    axes = tuple(range(int(stacked), leaf.ndim))
    sums[name] = jnp.sum(jnp.square(leaf), axis=axes)
  return sums
