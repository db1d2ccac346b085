"""The state of a training run and where each part of it lives."""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import os
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from moe_jax import nn
from moe_jax.config import Config
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel.compilers import compiler_options
from moe_jax.parallel.grouped_matmul import check_compiler
from moe_jax.train.optimizer import make_optimizer


class TrainState(NamedTuple):
  """All that changes from step to step, as nested dicts of arrays.

  Attributes:
    step: int32 scalar, steps completed.
    params: float32 parameters.
    optimizer: optax's state.
    router: every MoE layer's router state.
    average: moving average of the parameters, or None.
  """

  step: jax.Array
  params: Any
  optimizer: Any
  router: Any
  average: Any = None

  @property
  def evaluated(self) -> Any:
    """The parameters that are evaluated: their average, where there is one."""
    return self.params if self.average is None else self.average


def evaluated_item(config: Config) -> str:
  """Returns which item of a checkpoint has `TrainState.evaluated`."""
  return 'average' if config.optimizer.average else 'params'


class Training(NamedTuple):
  """A model ready to train on a mesh.

  Attributes:
    graphdef: with `state.params` and `state.router`, `nnx.merge` makes the
      `Decoder`.
    optimizer: the gradient transformation; `update` takes the gradient's
      global `norm`.
    init: `() -> TrainState`, sharded; call it once, compiled.
    init_router: `() -> TrainState.router` alone.
    abstract: the shapes, dtypes and shardings of that state.
    compiler_options: what `jax.jit` needs to compile the model well.
  """

  graphdef: nnx.GraphDef
  optimizer: optax.GradientTransformationExtraArgs
  init: Callable[[], TrainState]
  init_router: Callable[[], Any]
  abstract: TrainState
  compiler_options: Mapping[str, bool | int]


def make_model(config: Config, mesh: Mesh | None = None) -> nn.Decoder:
  """Builds the model with initial weights that depend on the seed alone."""
  return nn.Decoder(
    config.model,
    config.balancer_rule,
    vocabulary=config.data.vocabulary,
    capacity_factor=config.capacity_factor,
    mesh=mesh,
    fsdp=config.mesh.fsdp,
    rngs=nnx.Rngs(config.seed),
  )


def make_mesh(
  config: Config, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Arranges all devices, or those given, as the config wants them."""
  mesh = config.mesh
  return meshes.make_mesh(
    mesh.data, mesh.expert, expert_across=mesh.expert_across, devices=devices
  )


def make_training(
  config: Config,
  mesh: Mesh,
  *,
  optimizer: optax.GradientTransformation | None = None,
) -> Training:
  """Plans model and optimizer state on the mesh; computes nothing yet.

  Args:
    config: what to train.
    mesh: the devices.
    optimizer: by default that of the config.

  Raises:
    ValueError: experts or batch do not divide over the mesh or its shards, or
      the compiler is too old for dropless training.
  """
  check_mesh(config, mesh)
  devices = list(mesh.devices.flat)
  if not (config.capacity_factor or config.model.round_to_capacity):
    check_compiler(devices[0].platform)
  if optimizer is None:
    optimizer = make_optimizer(config)
  optimizer = optax.with_extra_args_support(optimizer)

  def split():
    return nnx.split(make_model(config, mesh), nnx.Param, nn.RouterState)

  # Splitting abstractly gives the graph once; `init` then makes the arrays.
  graphdef, params, _ = nnx.eval_shape(split)

  def init() -> TrainState:
    _, params, router = split()
    params, router = nnx.to_pure_dict(params), nnx.to_pure_dict(router)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), router)
    return state._replace(average=params) if config.optimizer.average else state

  abstract = jax.eval_shape(init)
  shardings = _shardings(abstract, params, optimizer, mesh, config.mesh.fsdp)
  options = compiler_options(devices)
  jit = functools.partial(jax.jit, compiler_options=options)
  return Training(
    graphdef,
    optimizer,
    init=jit(init, out_shardings=shardings),
    init_router=jit(lambda: init().router, out_shardings=shardings.router),
    abstract=jax.tree.map(
      lambda leaf, where: leaf.update(sharding=where), abstract, shardings
    ),
    compiler_options=options,
  )


def abstract_router(config: Config, mesh: Mesh) -> Any:
  """Returns the abstract state of the routers alone, as `Training.abstract`."""
  whole = NamedSharding(mesh, P())
  router = nnx.eval_shape(
    lambda: nnx.state(make_model(config, mesh), nn.RouterState)
  )
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
    nnx.to_pure_dict(router),
  )


def check_mesh(config: Config, mesh: Mesh) -> None:
  """Raises ValueError where something does not divide evenly."""
  model, expert = config.model, mesh.shape['expert']
  if model.experts % expert:
    fits = meshes.expert_sizes(model.experts, mesh)
    raise ValueError(
      f'mesh.expert={expert}: must divide model.experts={model.experts}; here '
      f'{", ".join(map(str, fits))} would do'
    )
  microbatch = config.batch_size // config.accumulation
  shards = shards_of(config, mesh)
  if shards % mesh.size:
    raise ValueError(
      f'model.shards={shards}: must be 0 or a multiple of the {mesh.size} '
      'devices, so that no shard is spread over several'
    )
  if config.balancer_rule.per_shard and mesh.size > 1 and shards != mesh.size:
    raise ValueError(
      f'model.shards={shards}: must be 0 or {mesh.size}, the number of '
      'devices, where each shard has prices of its own; on one device it is '
      'free'
    )
  if microbatch % shards:
    raise ValueError(
      f'batch_size={config.batch_size}: batch_size / accumulation = '
      f'{microbatch} must be a multiple of {shards}, the parts that the mesh '
      f'and model.shards split it into{_such_as(config, shards)}'
    )
  sequence_pairs = config.sequence_length * model.experts_per_token
  pairs = microbatch // shards * sequence_pairs
  if model.round_to_capacity and expert > 1 and pairs % model.experts:
    least = model.experts // math.gcd(model.experts, sequence_pairs)
    raise ValueError(
      f'model.round_to_capacity=True: a shard has {pairs} pairs of token and '
      f'expert, which model.experts={model.experts} must divide where '
      f'mesh.expert={expert}, so that all devices exchange equal amounts'
      f'{_such_as(config, shards * least)}'
    )


def _such_as(config: Config, multiple: int) -> str:
  """Names a batch size whose microbatches are a multiple of something."""
  multiple *= config.accumulation
  size = -(-config.batch_size // multiple) * multiple
  return f', as it is with batch_size={size}'


def _shardings(abstract, params, optimizer, mesh, fsdp) -> TrainState:
  """Returns the sharding of every leaf: one rule for parameters and moments."""
  replicated = NamedSharding(mesh, P())
  param_shardings = jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    nnx.to_pure_dict(nn.parameter_specs(params, mesh, fsdp=fsdp)),
  )

  def is_masked(moment):  # Another optimizer moves this parameter.
    return isinstance(moment, optax.MaskedNode)

  def of_moment(moment, param, sharding):
    if is_masked(moment):
      return moment
    # Adafactor's factors have other axes than what they are of, and are small.
    return sharding if moment.shape == param.shape else replicated

  return TrainState(
    step=replicated,
    params=param_shardings,
    # In Auto mode, moments without this would be replicated.
    optimizer=optax.tree.map_params(
      optimizer,
      of_moment,
      abstract.optimizer,
      abstract.params,
      param_shardings,
      transform_non_params=lambda _: replicated,
      is_leaf=is_masked,
    ),
    router=jax.tree.map(lambda _: replicated, abstract.router),
    average=None if abstract.average is None else param_shardings,
  )


def shards_of(config: Config, mesh: Mesh) -> int:
  """Returns into how many parts a batch is split that route by themselves."""
  return config.model.shards or mesh.size


def bytes_per_device(tree: Any) -> int:
  """Sums what each device holds of abstract arrays that have shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def check_memory(abstract: TrainState) -> None:
  """Raises ValueError if a device cannot even hold its part of the state."""
  size = bytes_per_device(abstract)
  device = jax.local_devices()[0]
  if device.platform == 'cpu':  # Virtual devices share what there is.
    room = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    room //= len(abstract.step.sharding.addressable_devices)
  else:
    room = (device.memory_stats() or {}).get('bytes_limit', size)
  if size > room:
    raise ValueError(
      f'model: parameters, optimizer and router take {size / 1e9:.1f} GB on '
      f'each device, which has {room / 1e9:.1f} GB; take a smaller model, more '
      'devices along mesh.expert, or mesh.fsdp=True'
    )


def sharding_table(abstract: TrainState) -> str:
  """Lists name, shape, dtype, spec and bytes per device of every array."""
  import pandas  # Late: it is slow to import, and trainings do not need it.

  rows = []
  for path, leaf in jax.tree.leaves_with_path(abstract):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    spec = ', '.join(str(axis) for axis in leaf.sharding.spec)
    rows.append(
      (name, leaf.shape, leaf.dtype, f'({spec})', f'{bytes_per_device(leaf):,}')
    )
  rows.append(('total', '', '', '', f'{bytes_per_device(abstract):,}'))
  columns = ('array', 'shape', 'dtype', 'spec', 'bytes per device')
  return pandas.DataFrame(rows, columns=columns).to_string(index=False)
