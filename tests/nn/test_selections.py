"""Selections, replay, prices and axis names of the MoE layer."""

import copy
import functools
import pickle

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
import numpy as np
import optax
import pytest

from moe_jax import nn, routing

WIDTH, EXPERTS, K = 16, 8, 2
SIZES = {
  'width': WIDTH,
  'hidden': 24,
  'experts': EXPERTS,
  'experts_per_token': K,
}


def _layer(balancer=None, *, mesh=None, axes=('data', 'expert'), **options):
  return nn.MoE(
    nn.MoEConfig(**SIZES | options),
    balancer or routing.bip(2),
    capacity_factor=EXPERTS / K,  # Room for all, by what compiles fast.
    mesh=mesh,
    axes=axes,
    rngs=nnx.Rngs(0),
  )


@functools.partial(nnx.jit, static_argnames='train')
def call(moe, x, mask=None, experts=None, *, train=True):
  return moe(x, mask, experts, train=train)


@pytest.fixture(scope='module')
def x():
  return jax.random.normal(jax.random.key(0), (8, 12, WIDTH))


@pytest.fixture(scope='module')
def own_mesh():
  """A mesh of somebody else's, with an axis that no MoE layer uses."""
  devices = np.array(jax.devices()[:8]).reshape(2, 2, 2)
  return Mesh(devices, ('replica', 'tensor', 'ep'))


def _dense(moe, x, choice):
  """Every expert on every token, mixed by the gates of the choice."""
  gates = np.zeros((len(choice.experts), EXPERTS), np.float32)
  for slot in range(choice.experts.shape[1]):
    rows = np.arange(len(gates))
    gates[rows, choice.experts[:, slot]] += choice.gates[:, slot]
  flat = x.reshape(-1, WIDTH)
  hidden = jax.nn.silu(jnp.einsum('td,edf->tef', flat, moe.gate[...]))
  hidden *= jnp.einsum('td,edf->tef', flat, moe.up[...])
  y = jnp.einsum('te,tef,efd->td', gates, hidden, moe.down[...])
  return y.reshape(x.shape) + moe.shared(x)


OPTIONS = [
  {'selection': 'choose_above'},
  {'selection': 'choose_by_experts'},
  {'selection': 'choose_evenly'},
  {
    'expert_groups': 4,
    'groups_per_token': 2,
    'scoring': 'sigmoid',
    'gate_scale': 2.5,
  },
  {'priced': 'logits', 'scoring': 'sqrt_softplus'},
]


@pytest.mark.parametrize(
  'options',
  [
    OPTIONS[i]
    if i in (0, 3)
    else pytest.param(OPTIONS[i], marks=pytest.mark.long)
    for i in range(5)
  ],
  ids=str,
)
def test_every_option_equals_every_expert_on_every_token(x, options):
  moe = _layer(**options)
  mask = jnp.arange(12) % 6 < 5
  mask = jnp.broadcast_to(mask, (8, 12))
  for train in (True, False):
    y, aux = call(moe, x, mask, train=train)
    expected = _dense(moe, x, jax.tree.map(np.asarray, aux.choice))
    np.testing.assert_allclose(y[mask], expected[mask], atol=2e-5)
    total = aux.choice.gates.sum(axis=1)[mask.reshape(-1)]
    some = aux.choice.active.any(axis=1)[mask.reshape(-1)]
    scale = options.get('gate_scale', 1.0)
    np.testing.assert_allclose(total, scale * some, rtol=1e-5)
    assert aux.sums['dropped'] == 0


@pytest.mark.parametrize(
  'options',
  [
    OPTIONS[0] | {'scoring': 'sigmoid'},
    pytest.param(OPTIONS[3], marks=pytest.mark.long),
  ],
  ids=str,
)
def test_a_mesh_of_ones_own_gives_the_same(x, own_mesh, options):
  """Axes of any name; those that are not named do nothing."""
  plain = _layer(**options)
  moe = _layer(mesh=own_mesh, axes=('replica', 'ep'), **options)
  expected, theirs = call(plain, x)
  y, ours = call(moe, x)
  np.testing.assert_allclose(y, expected, atol=1e-6)
  np.testing.assert_array_equal(ours.choice.experts, theirs.choice.experts)
  np.testing.assert_array_equal(ours.choice.active, theirs.choice.active)
  # Scores may differ in the last bit, where products are tiled otherwise.
  np.testing.assert_allclose(
    moe.state.get_value().q, plain.state.get_value().q, atol=1e-6
  )
  # Four shards of 24 tokens; the experts of two devices in each replica.
  experts = np.asarray(ours.choice.experts)[np.asarray(ours.choice.active)]
  rows = np.repeat(np.arange(96) // 48, np.asarray(ours.choice.active).sum(1))
  load = [
    np.sum((experts // 4 == half) & (rows == replica))
    for replica in (0, 1)
    for half in (0, 1)
  ]
  np.testing.assert_allclose(
    ours.most['device_load'], np.max(load) / np.mean(load), rtol=1e-6
  )


def test_axes_and_types_of_a_mesh_are_checked(own_mesh):
  with pytest.raises(ValueError, match=r"mesh: has axes .* not \['data', 'exp"):
    _layer(mesh=own_mesh)
  explicit = Mesh(
    own_mesh.devices,
    own_mesh.axis_names,
    axis_types=(AxisType.Explicit,) * 3,
  )
  with pytest.raises(ValueError, match='mesh: has axis types .* must be Auto'):
    _layer(mesh=explicit, axes=('replica', 'ep'))


def test_a_selection_of_ones_own(x):
  """The second best, whatever the prices."""

  def second(priced_TxE, q_E, config, mask_T):
    experts = jnp.argsort(-priced_TxE, axis=1)[:, 1:2]
    return routing.replay(priced_TxE, experts.astype(jnp.int32), mask_T=mask_T)

  moe = nn.MoE(
    nn.MoEConfig(**SIZES), routing.bip(2), select=second, rngs=nnx.Rngs(0)
  )
  for train in (True, False):
    y, aux = call(moe, x, train=train)
    expected = np.argsort(-aux.scores, axis=1)[:, 1:2]
    np.testing.assert_array_equal(aux.choice.experts, expected)
    expected = _dense(moe, x, jax.tree.map(np.asarray, aux.choice))
    np.testing.assert_allclose(y, expected, atol=2e-5)


# Replay.


@pytest.mark.parametrize(
  'options', [pytest.param({}, marks=pytest.mark.long), OPTIONS[0]], ids=str
)
def test_replayed_routes_are_those_that_were_recorded(x, options):
  moe = _layer(**options)
  y, aux = call(moe, x)
  recorded = np.where(aux.choice.active, aux.choice.experts, -1)
  recorded = recorded.reshape(8, 12, -1).astype(np.int32)
  again = _layer(**options)
  replayed, same = call(again, x, None, recorded)
  np.testing.assert_array_equal(replayed, y)
  jax.tree.map(
    np.testing.assert_array_equal, same.choice.gates, aux.choice.gates
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    nnx.state(again, nn.RouterState),
    nnx.state(moe, nn.RouterState),
  )
  # Under other prices, and frozen, which packs rows otherwise.
  other = _layer(routing.loss_free(), **options)
  for train in (True, False):
    replayed, _ = call(other, x, None, recorded, train=train)
    np.testing.assert_allclose(replayed, y, atol=1e-6)


@pytest.mark.long
def test_recorded_routes_hold_for_another_mesh_and_under_remat(x, own_mesh):
  _, aux = call(_layer(round_to_capacity=True), x)
  recorded = aux.choice.experts.reshape(8, 12, K)
  reference, _ = call(_layer(), x, None, recorded)

  @nnx.jit
  def loss_and_gradient(moe):
    def loss(moe):
      y, aux = nnx.remat(
        lambda moe, x: moe(x, None, recorded, train=True), prevent_cse=False
      )(moe, x)
      return jnp.sum(jnp.sin(y)), aux.choice.experts

    return nnx.value_and_grad(loss, has_aux=True)(moe)

  results = [
    loss_and_gradient(_layer(**options))
    for options in ({}, {'mesh': own_mesh, 'axes': ('replica', 'ep')})
  ]
  for (loss, experts), gradient in results:
    np.testing.assert_array_equal(experts.reshape(8, 12, K), recorded)
    np.testing.assert_allclose(loss, jnp.sum(jnp.sin(reference)), rtol=1e-5)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5),
      gradient,
      results[0][1],
    )


# Balancers.


def test_a_frozen_router_asks_for_the_price(x):
  """A rule whose price is not its q is evaluated by its price."""
  price = functools.partial(jnp.multiply, -1.0)
  balancer = routing.bip(2)._replace(price=lambda state: price(state.q))
  moe = _layer(balancer)
  call(moe, x)
  q = moe.state.get_value().q
  assert np.any(q != 0)
  _, aux = call(moe, x, train=False)
  expected = routing.choose(aux.scores, -q, k=K)
  np.testing.assert_array_equal(aux.choice.experts, expected.experts)
  trained = routing.choose(aux.scores, q, k=K)
  assert np.any(trained.experts != expected.experts)


def test_rules_solve_for_the_groups_that_compete(x):
  options = {'expert_groups': 4, 'groups_per_token': 2}
  moe = _layer(routing.bip(3), **options)
  q = jnp.linspace(0, 0.1, EXPERTS)
  moe.state.set_value(routing.State(q))
  _, aux = call(moe, x)
  expected = jax.jit(
    functools.partial(
      routing.dual_iterations,
      k=K,
      iterations=3,
      groups=4,
      groups_per_token=2,
    )
  )(aux.scores, q)
  np.testing.assert_array_equal(moe.state.get_value().q, expected)
  choice = routing.choose(
    aux.scores, expected, k=K, groups=4, groups_per_token=2
  )
  np.testing.assert_array_equal(aux.choice.experts, choice.experts)


@pytest.mark.long
def test_what_does_not_add_up_is_refused_or_seen(x):
  moe = _layer(routing.quantile())
  moe(x, train=True)
  with pytest.raises(ValueError, match='accumulation=2 .* does not add up'):
    moe(x, train=True)
  moe.update_router()
  moe(x, train=True)
  # Compiled code cannot raise: its results are nothing that looks right.
  compiled = _layer(routing.quantile())
  y, _ = call(compiled, x)
  assert np.all(np.isfinite(y))
  y, _ = call(compiled, x)
  assert np.all(np.isnan(y))
  with pytest.raises(ValueError, match='2 observations in a step'):
    compiled.update_router()


def test_a_global_batch_loss_counts_the_step_so_far(x):
  balancer = routing.with_losses(
    routing.unbalanced(), routing.auxiliary_loss(1.0, over='step')
  )
  moe = _layer(balancer)
  load = np.zeros(EXPERTS)
  for part in (x, -x, 2 * x):
    _, aux = call(moe, part)
    load += np.asarray(aux.choice.load)
    expected = EXPERTS * np.sum(load / load.sum() * aux.scores.mean(axis=0))
    np.testing.assert_allclose(aux.loss, expected, rtol=1e-5)
  moe.update_router()
  _, aux = call(moe, x)
  load = np.asarray(aux.choice.load)
  expected = EXPERTS * np.sum(load / load.sum() * aux.scores.mean(axis=0))
  np.testing.assert_allclose(aux.loss, expected, rtol=1e-5)


def test_update_routers_walks_any_model_and_stacks(x):
  class Model(nnx.Module):
    def __init__(self, balancer):
      self.first = _layer(balancer)
      self.others = nnx.List(
        [_layer(balancer), nnx.Linear(2, 2, rngs=nnx.Rngs(0))]
      )

      @nnx.split_rngs(splits=3)
      @nnx.vmap(in_axes=0, out_axes=0)
      def stack(rngs):
        return nn.MoE(nn.MoEConfig(**SIZES), balancer, rngs=rngs)

      self.stack = stack(nnx.Rngs(1))

  model = Model(routing.loss_free(0.5))
  generator = np.random.default_rng(0)
  layers = model.first, model.others[0], model.stack
  for moe in layers:
    shape = moe.observation.get_value().shape
    moe.observation.set_value(jnp.asarray(generator.integers(0, 99, shape)))
  loads = [np.asarray(moe.observation.get_value()) for moe in layers]
  nn.update_routers(model)
  for moe, load in zip(layers, loads, strict=True):
    expected = 0.5 * np.sign(load - load.mean(axis=-1, keepdims=True))
    np.testing.assert_array_equal(moe.state.get_value().q, expected)
    assert not np.any(moe.observation.get_value())
  with pytest.raises(ValueError, match=r'stack of layers; nn.update_routers'):
    model.stack.update_router()


@pytest.mark.long
def test_models_copy_and_equal_ones_are_traced_once(x):
  traces = []

  @nnx.jit
  def forward(moe, x):
    traces.append(0)
    return moe(x, train=False)[0]

  balancers = [
    functools.partial(routing.with_losses, routing.loss_free(0.01)),
    functools.partial(routing.midpoint, 3, lag=True),
    functools.partial(routing.quantile, estimator='histogram'),
    functools.partial(routing.sinkhorn, 2),
  ]
  for make in balancers:
    traces.clear()
    if make.args and isinstance(make.args[0], routing.Balancer):
      make = functools.partial(make, routing.auxiliary_loss(1e-4))
    moe = _layer(make())
    copies = moe, _layer(make()), copy.deepcopy(moe)
    copies += (pickle.loads(pickle.dumps(moe)),)
    for each in copies:
      np.testing.assert_array_equal(forward(each, x), forward(moe, x))
    assert len(traces) == 1


@pytest.mark.parametrize('selection', ['choose_by_experts', 'choose_evenly'])
def test_a_selection_of_shards_is_that_on_any_mesh(x, own_mesh, selection):
  """Eight shards on one device, and two on each of four."""
  options = {'selection': selection, 'shards': 8}
  _, expected = call(_layer(**options), x)
  moe = _layer(mesh=own_mesh, axes=('replica', 'ep'), **options)
  _, found = call(moe, x)
  np.testing.assert_array_equal(found.choice.experts, expected.choice.experts)
  np.testing.assert_array_equal(found.choice.active, expected.choice.active)


def test_a_lagged_state_can_be_donated():
  balancer = routing.midpoint(2, lag=True)
  for state in (
    balancer.init(4),
    balancer.update(balancer.init(4), (), k=1),
    routing.threshold().init(4),
    routing.threshold(lag=False).solve(
      routing.threshold().init(4), jnp.ones((8, 4)), k=1
    )[1],
  ):
    moved = jax.jit(
      lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0
    )(state)
    assert moved.q.shape == (4,)


@pytest.mark.long
def test_linen_trains_the_experts(x):
  """By the bridge of Flax, all weights are in the collection 'params'."""
  model = nnx.bridge.to_linen(
    nn.MoE, nn.MoEConfig(**SIZES), routing.bip(2), capacity_factor=2.0
  )
  variables = model.init(jax.random.key(0), x, train=False)
  params = variables.pop('params')
  assert set(params) == {'router', 'gate', 'up', 'down', 'shared'}

  @jax.jit
  def loss(params):
    (y, _), _ = model.apply(
      {'params': params, **variables}, x, train=True, mutable=['RouterState']
    )
    return jnp.sum(jnp.sin(y))

  gradient = jax.grad(loss)(params)
  moved = optax.apply_updates(params, optax.tree.scale(-0.01, gradient))
  for name in ('router', 'gate', 'up', 'down'):
    assert np.any(moved[name] != params[name])
  assert loss(moved) < loss(params)


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (lambda moe, x: moe(x[0], train=True), r'x_BxSxD: shape \(12, 16\) must'),
    (lambda moe, x: moe(x[..., :8], train=True), 'batch, sequence, 16'),
    (
      lambda moe, x: moe(x[:, :0], train=True),
      r'x_BxSxD: shape \(8, 0, 16\) has no tokens',
    ),
    (
      lambda moe, x: moe(x, jnp.ones((8, 12)), train=True),
      r'mask_BxS: float32\[8, 12\] must be bool\[8, 12\]',
    ),
    (
      lambda moe, x: moe(x, jnp.ones(8, bool), train=True),
      r'mask_BxS: bool\[8\] must be bool\[8, 12\]',
    ),
    (
      lambda moe, x: moe(x, None, jnp.zeros((8, 12)), train=True),
      r'experts_BxSxK: float32\[8, 12\] must be integers \[8, 12, K\]',
    ),
    (
      lambda moe, x: _layer(
        routing.bip()._replace(
          init=lambda experts: routing.State(jnp.float32(0))
        )
      ),
      r'balancer: .* q=float32\[\]; it must be float32\[8\]',
    ),
    (
      lambda moe, x: _layer(routing.bip()._replace(init=jnp.zeros)),
      r'balancer: .* q=None; it must be float32\[8\]',
    ),
    (
      lambda moe, x: _layer(
        routing.quantile(estimator='histogram'), priced='logits'
      ),
      r'model.priced=logits: this balancer takes scores in \[0, 1\]',
    ),
  ],
)
def test_bad_input_is_refused_in_words(x, make, words):
  with pytest.raises(ValueError, match=words):
    make(_layer(), x)
