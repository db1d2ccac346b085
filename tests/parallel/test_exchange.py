"""Expert parallelism equals one device: rows, layers, gradients, q."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from moe_jax import nn, routing
from moe_jax.parallel import compilers, dispatch, exchange
from moe_jax.parallel import mesh as meshes
from moe_jax.runs import processes
from tests import several_processes

BATCH, SEQUENCE, WIDTH, EXPERTS, K = 8, 16, 12, 8, 2
MESHES = ((1, 1), (2, 1), (1, 2), (4, 2), (2, 4), (1, 8))


def make_mesh(data, expert):
  return meshes.make_mesh(data, expert, devices=jax.devices()[: data * expert])


def on_meshes(*quick):
  """Tries all meshes, those that are not quick in the long suite."""
  return pytest.mark.parametrize(
    'shape',
    [
      pytest.param(
        shape,
        id='x'.join(map(str, shape)),
        marks=[] if shape in quick else pytest.mark.long,
      )
      for shape in MESHES
    ],
  )


LOADS = {
  'random': [[3, 0, 2, 1, 0, 4, 1, 1], [0, 1, 0, 5, 2, 2, 0, 2]],
  'all to one': [[12, 0, 0, 0, 0, 0, 0, 0], [12, 0, 0, 0, 0, 0, 0, 0]],
  'crossed': [[0, 0, 0, 0, 5, 0, 0, 7], [6, 0, 6, 0, 0, 0, 0, 0]],
  'none': [[0] * 8, [1] * 8],
}


@pytest.mark.parametrize('loads', LOADS)
@pytest.mark.parametrize('devices', [2, 4])
def test_rows_meet_their_experts_and_come_back(loads, devices):
  """Against a loop over rows; gradients by the rows and by the experts."""
  load_PxE = np.resize(LOADS[loads], (devices, 8))
  random = np.random.default_rng(0)
  rows = 14  # Two are spare.
  x = random.normal(size=(devices * rows, 3)).astype(np.float32)
  factor_E = np.arange(1.0, 9.0, dtype=np.float32)

  def apply(factor_L, x_MxD, load_L):
    # Each expert multiplies by its number, found from the loads alone.
    expert_M = jnp.searchsorted(
      jnp.cumsum(load_L), jnp.arange(len(x_MxD)), side='right'
    )
    return x_MxD * factor_L.at[expert_M].get(mode='fill', fill_value=0)[:, None]

  def run(x_NxD, load_E, factor_L):
    return exchange.ragged(
      x_NxD,
      load_E[0],
      functools.partial(apply, factor_L),
      most=devices * rows,
      axis_name='expert',
    )

  run = jax.shard_map(
    run,
    mesh=make_mesh(1, devices),
    in_specs=P('expert'),
    out_specs=P('expert'),
  )
  weight = random.normal(size=x.shape).astype(np.float32)

  @jax.jit
  def value_and_gradients(x, factor_E):
    y, pullback = jax.vjp(lambda x, f: run(x, load_PxE, f), x, factor_E)
    return y, *pullback(weight)

  y, dx, dfactor_E = value_and_gradients(x, factor_E)
  expected = np.zeros_like(x)
  expected_dx = np.zeros_like(x)
  expected_dfactor_E = np.zeros(8)
  for device in range(devices):
    row = device * rows
    for expert in np.repeat(np.arange(8), load_PxE[device]):
      expected[row] = x[row] * factor_E[expert]
      expected_dx[row] = weight[row] * factor_E[expert]
      expected_dfactor_E[expert] += x[row] @ weight[row]
      row += 1
  np.testing.assert_array_equal(y, expected)
  np.testing.assert_array_equal(dx, expected_dx)
  np.testing.assert_allclose(dfactor_E, expected_dfactor_E, atol=1e-5)


# Each has the groups of 8 devices on any mesh, where groups matter.
LAYERS = {
  'dropless': (routing.bip(3), {}),
  'histogram': (routing.quantile(estimator='histogram', bins=64), {}),
  'auxiliary loss': (
    routing.loss_controlled(),
    {'gate_scale': 2.5, 'scoring': 'sigmoid', 'shared_experts': 2},
  ),
  'capacity': (routing.loss_free(), {'capacity_factor': 0.75, 'shards': 8}),
  'rounding': (
    routing.midpoint(2),
    {'round_to_capacity': True, 'shards': 8},
  ),
}


def layer_step(layer, mesh=None, fsdp=False, by_shard=False):
  """Returns everything that a training step of a layer computes."""
  balancer, options = LAYERS[layer]
  if by_shard:
    balancer = routing.midpoint(2, scope='shard')
  options = dict(options)
  capacity_factor = options.pop('capacity_factor', 0.0)
  config = nn.MoEConfig(
    width=WIDTH,
    hidden=16,
    experts=EXPERTS,
    experts_per_token=K,
    **options,
  )
  model = nn.MoE(
    config,
    balancer,
    capacity_factor=capacity_factor,
    mesh=mesh,
    fsdp=fsdp,
    rngs=nnx.Rngs(0),
  )
  random = np.random.default_rng(1)

  def exact(*shape):
    # Sums of such products have no rounding error in any order.
    return jnp.asarray(random.integers(-8, 9, shape) / 8, jnp.float32)

  model.router.set_value(exact(WIDTH, EXPERTS) * (1 + jnp.arange(EXPERTS) % 3))
  x = exact(BATCH, SEQUENCE, WIDTH)
  mask = jnp.asarray(random.random((BATCH, SEQUENCE)) < 0.9)
  graphdef, params, routers = nnx.split(model, nnx.Param, nn.RouterState)

  def step(params, x):
    def loss(params, x):
      model = nnx.merge(graphdef, params, routers, copy=True)
      y, output = model(x, mask, train=True)
      nn.update_routers(model)
      routers_after = nnx.to_pure_dict(nnx.state(model, nn.RouterState))
      total = jnp.sum(jnp.sin(y)) + output.loss
      return total, (y, output, routers_after)

    gradients, results = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return nnx.to_pure_dict(gradients[0]), gradients[1], *results

  # Whole on every device: another process may hold the others.
  everywhere = None if mesh is None else NamedSharding(mesh, P())
  step = jax.jit(step, out_shardings=everywhere)
  return jax.device_get(step(*jax.device_get((params, x))))


@functools.cache
def expected(layer, by_shard=False):
  return layer_step(layer, by_shard=by_shard)


def assert_equal_step(actual, reference):
  *gradients, y, output, routers = actual
  *expected_gradients, expected_y, expected_output, expected_routers = reference
  # From equal scores, equal choices and prices, to the bit.
  np.testing.assert_array_equal(output.scores, expected_output.scores)
  choice, sums = expected_output.choice, expected_output.sums
  jax.tree.map(np.testing.assert_array_equal, output.choice, choice)
  # Counts are exact, sums of floats are made in another order.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=1e-6 * (x.dtype == jnp.float32)
    ),
    output.sums,
    sums,
  )
  jax.tree.map(np.testing.assert_array_equal, routers, expected_routers)
  np.testing.assert_allclose(output.loss, expected_output.loss, rtol=1e-5)
  np.testing.assert_allclose(y, expected_y, atol=1e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    gradients,
    expected_gradients,
  )


@on_meshes((2, 4))
@pytest.mark.parametrize(
  'layer',
  [
    'dropless',
    'capacity',
    pytest.param('rounding', marks=pytest.mark.long),
    pytest.param('histogram', marks=pytest.mark.long),
    pytest.param('auxiliary loss', marks=pytest.mark.long),
  ],
)
def test_a_layer_on_a_mesh_equals_one_device(layer, shape):
  assert_equal_step(layer_step(layer, make_mesh(*shape)), expected(layer))


@pytest.mark.long
@pytest.mark.parametrize('layer', ['dropless', 'rounding'])
def test_devices_may_come_in_any_order(layer):
  """As a torus or several slices have them."""
  devices = np.array(jax.devices())[[6, 1, 3, 0, 7, 2, 5, 4]]
  mesh = meshes.make_mesh(2, 4, devices=list(devices))
  assert list(mesh.devices.flat) == list(devices)
  assert_equal_step(layer_step(layer, mesh), expected(layer))


@pytest.mark.parametrize(
  'layer', ['dropless', pytest.param('capacity', marks=pytest.mark.long)]
)
def test_weights_split_over_data_change_nothing(layer):
  actual = layer_step(layer, make_mesh(4, 2), fsdp=True)
  assert_equal_step(actual, expected(layer))


@pytest.mark.long
@pytest.mark.parametrize(
  'shape', [(4, 2), pytest.param((1, 8), marks=pytest.mark.long)]
)
def test_shards_solve_and_round_by_themselves(shape):
  """As one device does for 8 shards; q is a mean, so sums may differ."""
  actual = layer_step('rounding', make_mesh(*shape), by_shard=True)
  reference = expected('rounding', by_shard=True)
  np.testing.assert_allclose(
    actual[-1]['state'].q, reference[-1]['state'].q, atol=1e-6
  )
  assert_equal_step((*actual[:-1], reference[-1]), reference)
  output = actual[-2]
  # No shard has more tokens for an expert than its even share.
  experts, gates = (
    x.reshape(8, -1) for x in (output.choice.experts, output.choice.gates)
  )
  share = BATCH * SEQUENCE // 8 * K // EXPERTS
  for expert in range(EXPERTS):
    assert np.sum((experts == expert) & (gates > 0), axis=1).max() <= share
  assert output.sums['dropped'] == 0


@functools.cache
def evaluated(layer, shape=None, solve=False):
  """Returns what a layer computes where nothing may be dropped."""
  balancer, options = LAYERS[layer]
  options = dict(options, shards=0)
  capacity_factor = options.pop('capacity_factor', 0.0)
  config = nn.MoEConfig(
    width=WIDTH, hidden=16, experts=EXPERTS, experts_per_token=K, **options
  )
  model = nn.MoE(
    config,
    balancer,
    capacity_factor=capacity_factor,
    mesh=shape and make_mesh(*shape),
    rngs=nnx.Rngs(0),
  )
  model.set_attributes(dropless=True)
  random = np.random.default_rng(1)
  # Two experts get most of the tokens.
  model.router.set_value(jnp.ones((WIDTH, 1)) * jnp.arange(EXPERTS))
  x = jnp.asarray(random.normal(1, 1, (BATCH, SEQUENCE, WIDTH)), jnp.float32)
  mask = jnp.asarray(random.random((BATCH, SEQUENCE)) < 0.9)
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state, x):
    return nnx.merge(graphdef, state)(x, mask, train=solve)

  return jax.device_get(run(*jax.device_get((state, x))))


@on_meshes((2, 4))
@pytest.mark.parametrize('layer', ['rounding', 'capacity'])
@pytest.mark.parametrize('solve', [False, True])
def test_evaluation_in_the_buffers_of_training_drops_nothing(
  layer, solve, shape
):
  """As without any, on one device, however uneven the loads are."""
  y, output = evaluated(layer, shape, solve)
  expected_y, expected_output = evaluated(layer, None, solve)
  load_E = output.choice.load
  assert solve or load_E.max() > 2 * load_E.mean()  # Several rounds.
  np.testing.assert_array_equal(load_E, expected_output.choice.load)
  np.testing.assert_array_equal(
    output.choice.experts, expected_output.choice.experts
  )
  assert output.sums['dropped'] == 0
  assert 'unrounded_load' not in output.sums
  np.testing.assert_allclose(y, expected_y, atol=1e-5)


@pytest.mark.long
def test_evaluation_in_rounds_has_no_gradient_and_says_so():
  config = nn.MoEConfig(
    width=WIDTH,
    hidden=8,
    experts=8,
    experts_per_token=2,
    round_to_capacity=True,
  )
  moe = nn.MoE(config, routing.bip(), mesh=make_mesh(4, 2), rngs=nnx.Rngs(0))

  def loss(x):
    return jnp.sum(moe(x, train=False)[0])

  with pytest.raises(ValueError, match='^train=False: has no gradient'):
    jax.grad(loss)(jnp.ones((8, 16, WIDTH)))


def test_a_compiler_without_the_ragged_exchange_is_explained():
  """That of CPUs, for one; there, `ragged` never asks for it."""

  @functools.partial(
    jax.shard_map,
    mesh=make_mesh(1, 2),
    in_specs=P('expert'),
    out_specs=P('expert'),
  )
  def send(rows_NxD, sizes_P):
    route = exchange._Route(*[sizes_P] * 4)
    return exchange._move_ragged(rows_NxD, route, rows=4, axis_name='expert')

  arguments = jnp.ones((8, 3)), jnp.ones(4, jnp.int32)
  with pytest.raises(ValueError, match='^model.round_to_capacity=False: '):
    with compilers.refusal_explained():
      jax.jit(send).lower(*arguments).compile()
  with pytest.raises(jax.errors.JaxRuntimeError, match='memory'):
    with compilers.refusal_explained():
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')


def test_a_batch_that_does_not_divide_is_refused():
  config = nn.MoEConfig(width=WIDTH, hidden=8, experts=8, experts_per_token=2)
  moe = nn.MoE(config, routing.bip(), mesh=make_mesh(4, 2), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='8 device.* the 6 sequences'):
    moe(jnp.zeros((6, 16, WIDTH)), train=True)


@pytest.mark.parametrize('capacity', [1, 3, 8])
def test_groups_have_buffers_of_their_own(capacity):
  """As a call for each group."""
  random = np.random.default_rng(2)
  scores = jnp.asarray(random.random((24, EXPERTS)), jnp.float32)
  x = jnp.asarray(random.normal(size=(24, WIDTH)), jnp.float32)
  weights = dispatch.ExpertWeights(
    *(
      jnp.asarray(random.normal(size=(EXPERTS, *shape)), jnp.float32)
      for shape in ((WIDTH, 4), (WIDTH, 4), (4, WIDTH))
    )
  )
  mask = jnp.asarray(random.random(24) < 0.8)
  skew = jnp.linspace(0, -1, EXPERTS)

  @functools.partial(jax.jit, static_argnames='groups')
  def run(x, scores, mask, *, groups):
    choice = routing.choose(scores + skew, skew * 0, k=K)
    return dispatch.capacity(
      x, choice, weights, mask_T=mask, capacity=capacity, groups=groups
    )

  together = run(x, scores, mask, groups=3)
  parts = [
    run(x[i : i + 8], scores[i : i + 8], mask[i : i + 8], groups=1)
    for i in (0, 8, 16)
  ]
  np.testing.assert_allclose(
    together.y,
    np.concatenate([part.y for part in parts]),
    rtol=1e-5,
    atol=1e-5,
  )
  assert together.dropped == sum(part.dropped for part in parts)
  assert (together.dropped > 0) == (capacity < 8)


def run_process() -> None:
  """One of two processes, with four of the eight devices."""
  processes.start()
  for shape in ((2, 4), (1, 8)):
    for layer in LAYERS:
      assert_equal_step(layer_step(layer, make_mesh(*shape)), expected(layer))


@pytest.mark.long
def test_layers_in_two_processes_equal_one_device():
  command = ['-m', 'tests.parallel.test_exchange']
  for process in several_processes.run(command, command, timeout=900):
    assert process.returncode == 0, process.stderr


if __name__ == '__main__':
  run_process()
