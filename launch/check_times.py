"""What `launch.check` times, and what the planner says of it.

Parts are those of one layer and one microbatch: grouped products and attention
of one device, forward and backward; `solve` (solve, choose, round) and the
exchange, there and back, on the mesh. The planner's time of `solve` is that of
all of routing, with logits, gradients and losses.
"""

from collections.abc import Callable, Mapping
import math
import statistics
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from launch import check_results
from moe_jax import routing
from moe_jax.config import Config
from moe_jax.nn.attention import Attention
from moe_jax.parallel import exchange
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel.compilers import compiler_options
from moe_jax.parallel.grouped_matmul import TILE, grouped_matmul
from moe_jax.train import batches
from moe_jax.train import state as state_lib
from moe_jax.train import step as step_lib

REPEATS = 10
SHORT, LONG = 0.05, 60.0  # Seconds: least of a measurement, most of them all.


class Timing(NamedTuple):
  """Seconds of one run: the median, the range, the planner's; None: no plan."""

  median: float
  least: float
  most: float
  planned: float | None
  ratio: float | None
  passed: bool = True

  def __str__(self) -> str:
    return f'{1e3 * self.median:.3f} ms'


def measure(run: Callable[[], Any], planned: float | None) -> Timing:
  """Times `run`, which starts work on the devices and returns its results."""

  def seconds(turns):
    started = time.perf_counter()
    for _ in range(turns):
      results = run()
    jax.block_until_ready(results)
    return (time.perf_counter() - started) / turns

  seconds(1)  # Compiles.
  once = seconds(1)
  # To wait takes time, so what is short is started many times. But on CPUs,
  # collectives that wait for each other could take all threads.
  turns = 1 if jax.default_backend() == 'cpu' else int(SHORT / once) + 1
  repeats = min(REPEATS, int(LONG / (once * turns)) + 3)
  times = [seconds(turns) for _ in range(repeats)]
  median = statistics.median(times)
  ratio = median / planned if planned else None
  return Timing(median, min(times), max(times), planned, ratio)


def train_step(config: Config, mesh: Mesh, losses: list[jax.Array]) -> Callable:
  """Returns a step on made-up tokens, always the same; it adds its loss."""
  training = state_lib.make_training(config, mesh)
  state = training.init()
  step = step_lib.make_train_step(config, training)
  shape = (config.batch_size, config.sequence_length + 1)
  tokens_BxS = np.random.default_rng(0).integers(
    config.data.vocabulary, size=shape, dtype=np.int32
  )
  batch = batches.to_devices(
    mesh, {'inputs': tokens_BxS[:, :-1], 'targets': tokens_BxS[:, 1:]}
  )

  def run():
    nonlocal state
    state, metrics, _ = step(state, batch)
    losses.append(metrics['train/loss'])
    return losses[-1]

  return run


def planned(config: Config, plan: Mapping[str, Any]) -> dict[str, float]:
  """Returns seconds of the step, without overlap, and of each part once."""
  if 'step_seconds' not in plan:
    return {}
  layers, compute = config.model.layers, plan['compute_seconds']
  moe_layers = layers - config.model.dense_layers
  exchanged = [
    row['seconds']
    for row in plan['collectives']
    if row['kind'].endswith('all-to-all')
  ]
  attention = compute.get('attention', 0.0) + compute.get('scores', 0.0)
  found = {
    'solve': plan['routing']['seconds'] / moe_layers,
    'grouped products': compute.get('experts', 0.0) / moe_layers,
    'attention': attention / layers,
    'exchange': sum(exchanged) / moe_layers,
  }
  if config.capacity_factor or config.model.round_to_capacity:
    del found['grouped products']  # Batched ones take their place.
  found = {name: each / config.accumulation for name, each in found.items()}
  return found | {'train step': plan['step_seconds'][1]}


def parts(config: Config, mesh: Mesh) -> dict[str, Callable[[], Callable]]:
  """Returns what makes each part; that returns what is to be timed."""
  makers = {
    'solve': _solve,
    'grouped products': _grouped_products,
    'attention': _attention,
  }
  if mesh.shape['expert'] > 1:
    makers['exchange'] = _exchange
  tokens = config.batch_size // config.accumulation * config.sequence_length
  return {
    name: lambda make=make: make(config, mesh, tokens // mesh.size)
    for name, make in makers.items()
  }


def _random(shape, dtype, where) -> jax.Array:
  x = np.random.default_rng(0).normal(size=shape)
  return jax.device_put(x.astype(jnp.dtype(dtype)), where)


def _both(function: Callable, *operands) -> Callable[[], Any]:
  """Returns a compiled call of a function and its gradients."""

  def both(*operands):
    y, pullback = jax.vjp(function, *operands)
    return y, pullback(jnp.ones_like(y))

  options = compiler_options(jax.devices())
  run = jax.jit(both, compiler_options=options)
  return lambda: run(*operands)


def _solve(config, mesh, tokens):
  rule, model = config.balancer_rule, config.model
  split = NamedSharding(mesh, meshes.BATCH)
  logits = _random((tokens * mesh.size, model.experts), 'float32', split)
  scores, k = jax.nn.softmax(logits), model.experts_per_token

  def solve(scores_TxE, axis_name):
    state = rule.init(model.experts)
    q_E, _ = rule.solve(state, scores_TxE, k=k, axis_name=axis_name)
    if model.round_to_capacity:
      return routing.round_to_capacity(scores_TxE, q_E, k=k).experts
    return routing.choose(scores_TxE, q_E, k=k).experts

  run = jax.jit(check_results.on_mesh(mesh, solve, meshes.BATCH))
  return lambda: run(scores)


def _grouped_products(config, mesh, tokens):
  """Applies the experts of a device to as many rows as balance gives it."""
  model, device = config.model, mesh.devices.flat[0]
  experts = model.experts // mesh.shape['expert']
  rows, sides = tokens * model.experts_per_token, (model.width, model.hidden)
  load_E = np.full(experts, rows // experts, np.int32)

  def apply(x_NxD, gate, up, down):
    hidden = jax.nn.silu(grouped_matmul(x_NxD, gate, load_E))
    hidden *= grouped_matmul(x_NxD, up, load_E)
    return grouped_matmul(hidden, down, load_E)

  shapes = ((rows + TILE, model.width), *2 * [(experts, *sides)])
  shapes += ((experts, *sides[::-1]),)
  return _both(apply, *(_random(s, model.dtype, device) for s in shapes))


def _attention(config, mesh, tokens):
  model, device = config.model, mesh.devices.flat[0]
  alone = meshes.make_mesh(1, 1, devices=[device])
  attention = Attention(model, mesh=alone, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(attention)
  shape = (tokens // config.sequence_length, config.sequence_length)
  x = _random((*shape, model.width), model.dtype, device)
  params = jax.device_put(params, device)
  return _both(lambda params, x: nnx.merge(graphdef, params)(x)[0], params, x)


def _exchange(config, mesh, tokens):
  """Sends equal numbers of rows to experts that do nothing, and back."""
  model, room = config.model, max(config.capacity_factor, 1.0)
  room = math.ceil(room * tokens * model.experts_per_token / model.experts)
  shape = (mesh.size * model.experts, room, model.width)
  run = jax.shard_map(
    lambda x: exchange.static((x,), lambda rows: rows, axis_name='expert'),
    mesh=mesh,
    in_specs=meshes.BATCH,
    out_specs=meshes.BATCH,
  )
  split = NamedSharding(mesh, meshes.BATCH)
  return _both(run, _random(shape, model.dtype, split))
