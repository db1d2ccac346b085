"""The state of a training run and where each part of it lives."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from moe_jax import nn
from moe_jax.config import Config
from moe_jax.config import make_balancer


class TrainState(NamedTuple):
  """All that changes from step to step, as nested dicts of arrays.

  Attributes:
    step: int32 scalar, steps completed.
    params: float32 parameters.
    optimizer: optax's state.
    router: every MoE layer's router state.
  """

  step: jax.Array
  params: Any
  optimizer: Any
  router: Any


class Training(NamedTuple):
  """A model ready to train on a mesh.

  Attributes:
    graphdef: with `state.params` and `state.router`, `nnx.merge` makes the
      `Decoder`.
    dropless_graphdef: the same without capacity or rounding, for evaluation.
    optimizer: the gradient transformation.
    init: `() -> TrainState`, sharded; call it once, compiled.
    init_router: `() -> TrainState.router` alone.
    abstract: the shapes, dtypes and shardings of that state.
  """

  graphdef: nnx.GraphDef
  dropless_graphdef: nnx.GraphDef
  optimizer: optax.GradientTransformation
  init: Callable[[], TrainState]
  init_router: Callable[[], Any]
  abstract: TrainState


def make_model(config: Config) -> nn.Decoder:
  """Builds the model with initial weights that depend on the seed alone."""
  balancer = make_balancer(config.balancer)
  return nn.Decoder(config.model, balancer, rngs=nnx.Rngs(config.seed))


def _spec(variable: nnx.Variable) -> P:
  """Experts are split over their axis, third from the end; the rest is not."""
  if isinstance(variable, nn.ExpertParam):
    leading = (None,) * (variable.ndim - 3)
    return P(*leading, 'expert', None, None)
  return P()


def make_training(
  config: Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Training:
  """Plans model and optimizer state on the mesh; computes nothing yet.

  Raises:
    ValueError: experts or batch do not divide over the mesh or its shards.
  """
  if config.model.experts % mesh.shape['expert']:
    raise ValueError(
      f'mesh.expert={mesh.shape["expert"]}: must divide '
      f'model.experts={config.model.experts}'
    )
  microbatch = config.batch_size // config.accumulation
  shards = shards_of(config, mesh)
  if shards % mesh.size:
    raise ValueError(
      f'model.shards={shards}: must be 0 or a multiple of the {mesh.size} '
      'devices, so that no shard is spread over several'
    )
  for name, parts in (('mesh', mesh.size), ('model.shards', shards)):
    if microbatch % parts:
      raise ValueError(
        f'batch_size={config.batch_size}: batch_size / accumulation = '
        f'{microbatch} must be a multiple of {parts}, the parts that {name} '
        'splits it into'
      )
  model = dataclasses.replace(config.model, shards=shards)
  config = dataclasses.replace(config, model=model)
  # Splitting abstractly gives the graph once; `init` then makes the arrays.
  graphdef, params, router = nnx.split(
    nnx.eval_shape(lambda: make_model(config)), nnx.Param, nn.RouterState
  )

  model = dataclasses.replace(
    model, capacity_factor=0.0, round_to_capacity=False
  )
  dropless = dataclasses.replace(config, model=model)
  dropless_graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(dropless)))

  def init() -> TrainState:
    _, params, router = nnx.split(make_model(config), nnx.Param, nn.RouterState)
    params, router = nnx.to_pure_dict(params), nnx.to_pure_dict(router)
    return TrainState(jnp.int32(0), params, optimizer.init(params), router)

  def sharding(spec):
    return NamedSharding(mesh, spec)

  replicated = sharding(P())
  param_shardings = nnx.to_pure_dict(
    jax.tree.map(
      lambda variable: variable.replace(sharding(_spec(variable))),
      params,
      is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
  )
  abstract = jax.eval_shape(init)
  shardings = TrainState(
    step=replicated,
    params=param_shardings,
    # In Auto mode moments would be replicated if this were left out.
    optimizer=optax.tree.map_params(
      optimizer,
      lambda _, sharding: sharding,
      abstract.optimizer,
      param_shardings,
      transform_non_params=lambda _: replicated,
    ),
    router=jax.tree.map(lambda _: replicated, abstract.router),
  )
  abstract = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    abstract,
    shardings,
  )
  return Training(
    graphdef,
    dropless_graphdef,
    optimizer,
    init=jax.jit(init, out_shardings=shardings),
    init_router=jax.jit(lambda: init().router, out_shardings=shardings.router),
    abstract=abstract,
  )


def shards_of(config: Config, mesh: Mesh) -> int:
  """Returns into how many parts a batch is split that route by themselves."""
  return config.model.shards or mesh.size


def carry_prices(before: Any, router: Any) -> Any:
  """Starts routers from the prices that they had under another rule.

  Args:
    before: router state that was trained.
    router: initial state of the same routers under the new rule.

  Returns:
    `router` with its prices, q and any other array of the state of q's shape,
    such as the pending ones, set to the q before.
  """
  q_of = {
    jax.tree_util.keystr(path[:-1]): leaf
    for path, leaf in jax.tree.leaves_with_path(before)
    if jax.tree_util.keystr(path[-1:]) == '.q'
  }

  def carry(path, leaf):
    q = q_of.get(jax.tree_util.keystr(path[:-1]), leaf)
    same = (q.shape, q.dtype) == (leaf.shape, leaf.dtype)
    return jnp.copy(q) if same else leaf  # No array may be donated twice.

  return jax.tree.map_with_path(carry, router)


def parameter_counts(config: Config, params: Any) -> tuple[int, int]:
  """Counts parameters: all, and those that one token's forward pass uses."""
  count = functools.partial(jax.tree.reduce, lambda n, x: n + x.size)
  total = count(params, 0)
  model = config.model
  idle = model.experts - model.experts_per_token
  expert = 3 * model.width * model.hidden
  return total, total - (model.layers - model.dense_layers) * idle * expert
