"""One optimizer step: the place where the training state changes."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import optax

from moe_jax import nn
from moe_jax import routing
from moe_jax.config import Config
from moe_jax.train import telemetry
from moe_jax.train.optimizer import make_schedule
from moe_jax.train.state import Training
from moe_jax.train.state import TrainState


class Batch(NamedTuple):
  """Sequences and what follows each of their tokens.

  Attributes:
    inputs: int32 [B, S].
    targets: int32 [B, S].
    mask: bool [B, S], False for padding; None where there is none.
  """

  inputs: jax.Array
  targets: jax.Array
  mask: jax.Array | None = None


class _Sums(NamedTuple):
  """What adds up over microbatches, per layer where there are layers."""

  loss: jax.Array
  auxiliary_loss: jax.Array
  load_LxE: jax.Array
  unrounded_load_LxE: jax.Array
  dropped: jax.Array
  infinite_L: jax.Array  # microbatches with logits that are not finite


def cross_entropy(logits_BxSxV: jax.Array, batch: Batch) -> jax.Array:
  """Computes each target's negative log-likelihood in nats; 0 if masked."""
  loss_BxS = optax.softmax_cross_entropy_with_integer_labels(
    logits_BxSxV, batch.targets
  )
  return loss_BxS if batch.mask is None else jnp.where(batch.mask, loss_BxS, 0)


def _microbatches(batch: Batch, count: int) -> Batch:
  # Strided, so that every device has rows of each microbatch.
  def split(x):
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(split, batch)


def make_train_step(
  config: Config, training: Training
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
  """Builds the jit-compiled step `(state, batch) -> (state, metrics)`.

  The state given is donated. The loss is the mean over the tokens of the whole
  step; losses of balancers are averaged over microbatches.
  """
  optimizer, accumulation = training.optimizer, config.accumulation
  schedule = make_schedule(config)

  def losses(params, router, batch, tokens):
    model = nnx.merge(training.graphdef, params, router, copy=True)
    logits, outputs = model(batch.inputs, batch.mask, train=True)
    sums = _Sums(
      loss=jnp.sum(cross_entropy(logits, batch)) / tokens,
      auxiliary_loss=jnp.sum(outputs.loss) / accumulation,
      load_LxE=outputs.choice.load,
      unrounded_load_LxE=outputs.unrounded_load,
      dropped=jnp.sum(outputs.dropped, dtype=jnp.float32),
      infinite_L=1 - outputs.finite.astype(jnp.int32),
    )
    router = nnx.to_pure_dict(nnx.state(model, nn.RouterState))
    return sums.loss + sums.auxiliary_loss, (router, sums)

  def gradients(params, router, batch):
    """Returns gradients, sums and router state after all microbatches."""
    tokens = batch.inputs.size if batch.mask is None else jnp.sum(batch.mask)
    tokens = jnp.maximum(tokens, 1)
    gradient = jax.grad(losses, has_aux=True)
    if accumulation == 1:
      total, (router, sums) = gradient(params, router, batch, tokens)
      return total, sums, router

    def add(carry, microbatch):
      total, sums, router = carry
      new, (router, new_sums) = gradient(params, router, microbatch, tokens)
      total, sums = jax.tree.map(jnp.add, (total, sums), (new, new_sums))
      return (total, sums, router), None

    microbatches = _microbatches(batch, accumulation)
    first = jax.tree.map(lambda x: x[0], microbatches)
    shapes = jax.eval_shape(gradient, params, router, first, tokens)
    total, (_, sums) = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), shapes
    )
    carry, _ = lax.scan(add, (total, sums, router), microbatches)
    return carry

  def update_router(params, router):
    model = nnx.merge(training.graphdef, params, router, copy=True)
    model.update_router()
    return nnx.to_pure_dict(nnx.state(model, nn.RouterState))

  def train_step(state, batch):
    gradient, sums, router = gradients(state.params, state.router, batch)
    gradient_squares = squares(gradient)
    gradient_norm = jnp.sqrt(sum(map(jnp.sum, gradient_squares.values())))
    loss = sums.loss + sums.auxiliary_loss
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    finite &= ~jnp.any(sums.infinite_L)

    def update(state):
      with jax.named_scope('optimizer'):
        updates, optimizer_state = optimizer.update(
          gradient, state.optimizer, state.params
        )
        params = optax.apply_updates(state.params, updates)
      router_state = update_router(state.params, router)
      return state._replace(
        params=params, optimizer=optimizer_state, router=router_state
      )

    new = apply_if(finite, update, state)
    q_LxE = nn.prices(new.router)
    metrics = {
      'train/loss': sums.loss,
      'train/aux_loss': sums.auxiliary_loss,
      'train/gradient_norm': gradient_norm,
      'train/learning_rate': schedule(_updates(state.optimizer)),
      **_router_metrics(sums, config.model.round_to_capacity),
      'router/q/layer': q_LxE,
      telemetry.SQUARES: {
        'gradient': gradient_squares,
        'parameters': squares_unless(finite, new.params),
      },
    }
    return new._replace(step=state.step + 1), metrics

  shardings = jax.tree.map(lambda x: x.sharding, training.abstract)
  # Metrics whole on every device, so that every process can read them.
  return jax.jit(
    train_step,
    donate_argnums=0,
    out_shardings=(shardings, shardings.step),
    compiler_options=training.compiler_options,
  )


def _updates(optimizer: Any) -> jax.Array:
  """Returns how many updates an optimizer has made; steps may be skipped."""
  _, count = optax.tree.get_all_with_path(optimizer, 'count')[0]
  return count


def apply_if(
  condition: jax.Array, update: Callable[[Any], Any], state: Any
) -> Any:
  """Returns `update(state)` where `condition` holds, else `state`.

  A loop of one turn or of none: XLA updates in place what a loop carries.
  `lax.cond` and `jnp.where` copied, which took 2 to 4 % of the demo's steps.
  """
  turns = condition.astype(jnp.int32)
  return lax.fori_loop(0, turns, lambda _, state: update(state), state)


def squares_unless(finite: jax.Array, params: Any) -> dict[str, jax.Array]:
  """Computes `squares`, or zeros where nobody will ask for them."""
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(squares, params)
  )
  return apply_if(~finite, lambda _: squares(params), zeros)


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


def _router_metrics(sums: _Sums, rounded: bool) -> dict[str, Any]:
  violation_L = routing.max_violation(sums.load_LxE)
  # In float32: over all layers of a pod's step it may not fit into an int32.
  pairs = jnp.maximum(jnp.sum(sums.load_LxE, dtype=jnp.float32), 1)
  metrics = {
    'router/max_violation': jnp.mean(violation_L),
    'router/min_violation': jnp.mean(routing.min_violation(sums.load_LxE)),
    'router/dropped': sums.dropped / pairs,
    # Split by layer on the host, see telemetry.py.
    'router/max_violation/layer': violation_L,
    'router/load/layer': sums.load_LxE,
    telemetry.INFINITE: sums.infinite_L,
  }
  if rounded:
    metrics['router/max_violation_unrounded'] = jnp.mean(
      routing.max_violation(sums.unrounded_load_LxE)
    )
  return metrics
