"""The MoE layer by itself, inside somebody else's model."""

import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from moe_jax import nn, routing
from moe_jax.parallel import mesh as meshes

WIDTH, EXPERTS, K = 16, 8, 2


def _config(**overrides):
  return nn.MoEConfig(
    **{
      'width': WIDTH,
      'hidden': 24,
      'experts': EXPERTS,
      'experts_per_token': K,
      **overrides,
    }
  )


def _layer(balancer, capacity_factor=0.0, **overrides):
  return nn.MoE(
    _config(**overrides),
    balancer,
    capacity_factor=capacity_factor,
    rngs=nnx.Rngs(0),
  )


# q as `bip` has it, with the observation of `loss_free`.
COUNTING = routing.bip(2)._replace(observe=routing.loss_free().observe)


class Somebody(nnx.Module):
  """A model that knows nothing of routing."""

  def __init__(self, balancer):
    self.first = nnx.Linear(4, WIDTH, rngs=nnx.Rngs(1))
    # In training, room for every token, by the backend that compiles fast.
    self.moe = _layer(balancer, capacity_factor=EXPERTS / K)
    self.last = nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(2))

  def __call__(self, x, *, train):
    y, aux = self.moe(self.first(x), train=train)
    return self.last(y), aux


@pytest.fixture(scope='module')
def x():
  return 2 * jax.random.normal(jax.random.key(0), (2, 40, 4))


def _q(model):
  return np.asarray(model.moe.state.get_value().q)


@functools.partial(nnx.jit, static_argnames='train')
def _apply(model, x, *, train):
  return model(x, train=train)


def test_q_moves_in_training_and_only_there(x):
  model = Somebody(COUNTING)
  _, aux = _apply(model, x, train=True)
  expected = routing.dual_iterations(
    aux.scores, jnp.zeros(EXPERTS), k=K, iterations=2
  )
  assert np.any(expected > 0)
  np.testing.assert_array_equal(_q(model), expected)
  np.testing.assert_array_equal(
    aux.choice.load, routing.choose(aux.scores, expected, k=K).load
  )
  before = jax.tree.map(np.asarray, nnx.state(model))
  y, aux = _apply(model, 1.5 * x, train=False)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
  # Evaluation chooses by that frozen q.
  choice = routing.choose(aux.scores, expected, k=K)
  total = choice.gates.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(aux.choice.gates, choice.gates / total, rtol=1e-6)
  np.testing.assert_array_equal(aux.choice.experts, choice.experts)
  np.testing.assert_array_equal(aux.choice.load, choice.load)
  assert aux.loss == 0 and aux.sums['dropped'] == 0


@pytest.fixture(scope='module')
def plain(x):
  """One step written as a function of arrays: y, gradients, router state."""
  return _step(x, lambda model, x: model(x, train=True))


def _step(x, apply):
  graphdef, params, routers = nnx.split(
    Somebody(COUNTING), nnx.Param, nn.RouterState
  )

  @jax.jit
  def step(params, routers):
    def loss(params):
      model = nnx.merge(graphdef, params, routers, copy=True)
      y, _ = apply(model, x)
      return jnp.sum(jnp.sin(y)), (y, nnx.state(model, nn.RouterState))

    gradients, (y, moved) = jax.grad(loss, has_aux=True)(params)
    return y, gradients, moved

  return step(params, routers)


def test_split_and_merge_inside_jit_move_q_as_nnx_jit_does(x, plain):
  model = Somebody(COUNTING)
  y, aux = _apply(model, x, train=True)
  expected_y, _, moved = plain
  np.testing.assert_allclose(y, expected_y, atol=1e-6)
  jax.tree.map(
    np.testing.assert_array_equal, nnx.state(model, nn.RouterState), moved
  )
  observation = moved['moe']['observation'].get_value()
  np.testing.assert_array_equal(observation, aux.choice.load)
  assert observation.sum() == 2 * 40 * K


def _remat(model, x):
  return nnx.remat(lambda model, x: model(x, train=True))(model, x)


def _checkpoint(model, x):
  graphdef, params, routers = nnx.split(model, nnx.Param, nn.RouterState)

  @jax.checkpoint
  def call(params, routers, x):
    model = nnx.merge(graphdef, params, routers, copy=True)
    return model(x, train=True), nnx.state(model, nn.RouterState)

  result, routers = call(params, routers, x)
  nnx.update(model, routers)
  return result


@pytest.mark.parametrize('apply', [_remat, _checkpoint])
def test_recomputation_changes_nothing(x, plain, apply):
  """Not q, not the gradients, and the observation counts once."""
  y, gradients, moved = _step(x, apply)
  np.testing.assert_allclose(y, plain[0], atol=1e-6)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5),
    gradients,
    plain[1],
  )
  jax.tree.map(np.testing.assert_array_equal, moved, plain[2])


def test_router_state_is_not_optimised(plain):
  model = Somebody(COUNTING)
  nnx.update(model, plain[2])
  before = jax.tree.map(np.asarray, nnx.state(model, nn.RouterState))
  assert np.any(_q(model) != 0)
  params = nnx.state(model, nnx.Param)
  names = {path[-1] for path, _ in nnx.to_flat_state(params)}
  assert 'router' in names and not names & {'state', 'observation'}
  # Neither differentiated nor decayed.
  router = np.asarray(model.moe.router[...])
  gradients = plain[1]
  assert jax.tree.structure(gradients) == jax.tree.structure(params)
  optimizer = nnx.Optimizer(
    model, optax.adamw(0.1, weight_decay=0.5), wrt=nnx.Param
  )
  optimizer.update(model, gradients)
  assert np.all(model.moe.router[...] != router)
  jax.tree.map(
    np.testing.assert_array_equal, nnx.state(model, nn.RouterState), before
  )


def test_orbax_keeps_q(tmp_path, plain):
  model = Somebody(COUNTING)
  nnx.update(model, plain[2])
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', nnx.state(model))
    checkpointer.wait_until_finished()
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Somebody(COUNTING)))
    restored = checkpointer.restore(tmp_path / 'state', abstract)
  restored = nnx.merge(graphdef, restored)
  assert np.any(_q(restored) != 0)
  jax.tree.map(
    np.testing.assert_array_equal, nnx.state(restored), nnx.state(model)
  )


def test_update_router_moves_q_once_and_forgets():
  moe = _layer(routing.loss_free(0.5))
  loads = jnp.array([1, 9, 4, 4, 4, 4, 4, 2])
  moe.observation.set_value(loads)
  moe.update_router()
  expected = [-0.5, 0.5, 0, 0, 0, 0, 0, -0.5]
  np.testing.assert_array_equal(moe.state.get_value().q, expected)
  np.testing.assert_array_equal(moe.observation.get_value(), 0)
  moe.update_router()  # No token, no move.
  np.testing.assert_array_equal(moe.state.get_value().q, expected)


def test_observations_add_up_over_microbatches(x):
  model = Somebody(routing.loss_free(0.5))
  loads = [_apply(model, part, train=True)[1].choice.load for part in (x, -x)]
  np.testing.assert_array_equal(_q(model), 0)
  np.testing.assert_array_equal(
    model.moe.observation.get_value(), loads[0] + loads[1]
  )
  model.moe.update_router()
  np.testing.assert_array_equal(
    _q(model), 0.5 * np.sign((loads[0] + loads[1]) - 2 * 2 * 40 * K / EXPERTS)
  )


def test_a_balancer_of_ones_own(x):
  """The docs show how to write one; nothing has to be registered."""

  def proportional(rate):
    def update(state, load_E, *, k):
      return state._replace(q=state.q + rate * (load_E / jnp.mean(load_E) - 1))

    return routing.loss_free()._replace(update=update)

  model = Somebody(proportional(0.01))
  violations = []
  for _ in range(40):
    _, aux = _apply(model, x, train=True)
    violations.append(routing.max_violation(aux.choice.load))
    model.moe.update_router()
  assert violations[-1] < 0.5 * violations[0]


def test_a_balancer_from_nothing(x):
  """Any pytree with a q is a state; any numbers are an observation."""

  class State(NamedTuple):
    q: jax.Array
    tokens: jax.Array

  balancer = routing.Balancer(
    init=lambda experts: State(jnp.zeros(experts), jnp.int32(0)),
    solve=lambda state, scores, **_: (state.q, state),
    observe=lambda state, q, scores, choice, **_: {
      'tokens': jnp.sum(choice.load) // K
    },
    update=lambda state, seen, *, k: state._replace(
      q=state.q + k, tokens=state.tokens + seen['tokens']
    ),
    loss=lambda inputs: 0.0,
  )
  model = Somebody(balancer)
  for _ in range(2):
    _, aux = _apply(model, x, train=True)
  model.moe.update_router()
  assert model.moe.state.get_value().tokens == 2 * 2 * 40
  np.testing.assert_array_equal(_q(model), K)
  assert aux.loss == 0


# The layer against a few lines that apply every expert to every token.


@functools.partial(nnx.jit, static_argnames='train')
def _call(moe, x, mask=None, *, train=False):
  return moe(x, mask, train=train)


@nnx.jit
def _dense(moe, x):
  config = moe.config
  logits = jnp.dot(x, moe.router[...], precision='highest')
  if config.scoring == 'softmax':
    scores = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
  else:
    scores = 1 / (1 + jnp.exp(-logits))
  adjusted = scores - moe.state.get_value().q
  _, best = jax.lax.top_k(adjusted, config.experts_per_token)
  gates = scores * jax.nn.one_hot(best, config.experts).sum(-2)
  if config.renormalize_gates:
    gates /= gates.sum(-1, keepdims=True)
  hidden = jax.nn.silu(jnp.einsum('bsd,edf->bsef', x, moe.gate[...]))
  hidden *= jnp.einsum('bsd,edf->bsef', x, moe.up[...])
  y = jnp.einsum('bse,bsef,efd->bsd', gates, hidden, moe.down[...])
  if config.shared_experts:
    gate, up, down = (
      getattr(moe.shared, name).kernel[...] for name in ('gate', 'up', 'down')
    )
    assert gate.shape == (WIDTH, 24 * config.shared_experts)
    y += (jax.nn.silu(x @ gate) * (x @ up)) @ down
  return y, scores.reshape(-1, config.experts), gates


@pytest.fixture(scope='module')
def wide_x():
  return jax.random.normal(jax.random.key(1), (2, 20, WIDTH))


@pytest.mark.parametrize(
  'overrides',
  [
    {},
    {'scoring': 'sigmoid'},
    {'scoring': 'sigmoid', 'renormalize_gates': False},
    {'shared_experts': 0},
    {'shared_experts': 2, 'experts_per_token': 1},
  ],
  ids=str,
)
def test_options_equal_every_expert_on_every_token(wide_x, overrides):
  moe = _layer(routing.unbalanced(), **overrides)
  moe.state.set_value(routing.State(jnp.linspace(-0.1, 0.1, EXPERTS)))
  y, aux = _call(moe, wide_x)
  expected, scores, gates = _dense(moe, wide_x)
  np.testing.assert_allclose(aux.scores, scores, rtol=1e-5)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  np.testing.assert_array_equal(aux.choice.load, (gates > 0).sum((0, 1)))
  if not overrides:
    np.testing.assert_allclose(aux.scores.sum(-1), 1, rtol=1e-5)


def test_padding_takes_part_in_nothing(wide_x):
  """As the unpadded batch: outputs, loads, q and losses, with any padding."""
  balancer = routing.with_losses(
    COUNTING, routing.auxiliary_loss(0.1), routing.z_loss(0.01)
  )
  results = []
  mask = jnp.broadcast_to(jnp.arange(26) % 13 < 10, (2, 26))
  padded = jnp.full((2, 26, WIDTH), jnp.nan)
  padded = padded.at[mask].set(wide_x.reshape(-1, WIDTH))
  for x, mask_BxS in [(wide_x, None), (padded, mask)]:
    moe = _layer(balancer)
    y, aux = _call(moe, x, mask_BxS, train=True)
    state = moe.state.get_value().q, moe.observation.get_value()
    results.append((y, aux.loss, aux.choice.load, *state))
  plain, masked = results
  np.testing.assert_allclose(
    masked[0][mask], plain[0].reshape(-1, WIDTH), atol=1e-6
  )
  np.testing.assert_array_equal(masked[0][~mask], 0)
  np.testing.assert_allclose(masked[1], plain[1], rtol=1e-6)
  np.testing.assert_array_equal(masked[2], plain[2])
  assert plain[2].sum() == 2 * 20 * K
  np.testing.assert_allclose(masked[3], plain[3], atol=1e-6)
  np.testing.assert_array_equal(masked[4], plain[4])


def test_z_loss_by_hand(wide_x):
  balancer = routing.with_losses(routing.unbalanced(), routing.z_loss(0.5))
  moe = _layer(balancer, capacity_factor=1.0)
  # Logits 0 and ln 3: logsumexp of seven zeros and one is ln 10.
  moe.router[...] = jnp.zeros((WIDTH, EXPERTS)).at[0, 0].set(1.0)
  x = jnp.zeros((1, 2, WIDTH)).at[0, 1, 0].set(np.log(3))
  _, aux = _call(moe, x, train=True)
  expected = 0.5 * (np.log(8) ** 2 + np.log(10) ** 2) / 2
  np.testing.assert_allclose(aux.loss, expected, rtol=1e-6)
  _, aux = _call(moe, x, jnp.array([[False, True]]), train=True)
  np.testing.assert_allclose(aux.loss, 0.5 * np.log(10) ** 2, rtol=1e-6)


def test_capacity_drops_in_training_only(wide_x):
  moe = _layer(routing.unbalanced(), capacity_factor=1.05, shared_experts=0)
  _, aux = _call(moe, wide_x, train=True)
  # 1.05 x 40 tokens x 2 / 8 experts = 10.5, rounded up.
  over = np.maximum(np.asarray(aux.choice.load) - 11, 0)
  assert aux.sums['dropped'] == over.sum() > 0
  assert aux.choice.load.sum() == 80
  y, aux = _call(moe, wide_x, train=False)
  assert aux.sums['dropped'] == 0
  np.testing.assert_allclose(y, _dense(moe, wide_x)[0], atol=1e-5)


def test_bfloat16_experts_are_routed_as_in_float32(wide_x):
  wide_x = wide_x.astype(jnp.bfloat16)  # Given the same numbers ...
  results = {}
  for dtype in ('float32', 'bfloat16'):
    moe = _layer(COUNTING, dtype=dtype)
    y, aux = _call(moe, wide_x.astype(dtype), train=True)
    assert y.dtype == dtype
    assert aux.scores.dtype == aux.choice.gates.dtype == jnp.float32
    for variable in jax.tree.leaves(nnx.state(moe, nnx.Param)):
      assert variable.dtype == jnp.float32
    assert moe.state.get_value().q.dtype == jnp.float32
    results[dtype] = (
      y.astype(jnp.float32),
      (
        aux.scores,
        aux.choice,
        moe.state.get_value(),
      ),
    )
  # ... scores, q and routes are equal to the last bit; outputs are close.
  jax.tree.map(np.testing.assert_array_equal, *(results[d][1] for d in results))
  y, half = (results[d][0] for d in results)
  np.testing.assert_allclose(half, y, atol=0.03 * np.max(np.abs(y)))
  assert np.any(half != y)


@pytest.mark.parametrize(
  ('overrides', 'words'),
  [
    ({'experts': 0}, ['model.experts=0', '1 or more']),
    ({'width': -4}, ['model.width=-4', '1 or more']),
    ({'hidden': 0}, ['model.hidden=0', '1 or more']),
    ({'experts_per_token': 0}, ['model.experts_per_token=0', '1 or more']),
    (
      {'experts_per_token': 9},
      ['model.experts_per_token=9', 'model.experts=8'],
    ),
    ({'shared_experts': -1}, ['model.shared_experts=-1', '0 or more']),
    ({'gate_scale': 0.0}, ['model.gate_scale=0.0', 'greater than 0']),
    (
      {'expert_groups': 3},
      ['model.expert_groups=3', 'must divide the 8 experts: 1, 2, 4, 8'],
    ),
    (
      {'expert_groups': 8, 'groups_per_token': 1},
      ['model.groups_per_token=1', 'between 2', 'groups=8'],
    ),
    (
      {'selection': 'choose_above', 'round_to_capacity': True},
      ['model.round_to_capacity=True', 'choose_above'],
    ),
    (
      {'most_experts_per_token': 9},
      ['model.most_experts_per_token=9', 'model.experts=8'],
    ),
    ({'scoring': 'tanh'}, ["model.scoring='tanh'", 'softmax', 'sigmoid']),
    ({'dtype': 'float16'}, ["model.dtype='float16'", 'float32', 'bfloat16']),
  ],
)
def test_config_errors_name_option_value_and_what_would_work(overrides, words):
  with pytest.raises(ValueError) as error:
    _config(**overrides)
  assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize('factor', [-1.0, float('nan')])
def test_a_capacity_that_no_layer_can_have_is_refused(factor):
  with pytest.raises(ValueError, match=f'capacity_factor={factor}: .* 0 or mo'):
    _layer(routing.unbalanced(), capacity_factor=factor)


@pytest.mark.parametrize(
  ('options', 'balancer', 'mesh', 'words'),
  [
    (
      {'experts': 6},
      routing.bip(),
      (1, 4),
      '^experts=6: .* 4 devices of mesh axis expert; 1, 2 would do',
    ),
    (
      {'shards': 8},
      routing.midpoint(2, scope='shard'),
      (4, 1),
      '^shards=8: must be 0 or 4, .* prices of its own',
    ),
    ({}, routing.bip(), None, '^fsdp=True: needs a mesh'),
  ],
)
def test_what_a_mesh_cannot_hold_is_refused(options, balancer, mesh, words):
  with pytest.raises(ValueError, match=words):
    nn.MoE(
      _config(**options),
      balancer,
      mesh=mesh and meshes.make_mesh(*mesh, devices=jax.devices()[:4]),
      fsdp=mesh is None,
      rngs=nnx.Rngs(0),
    )


def test_a_mesh_with_other_axes_is_refused():
  mesh = jax.make_mesh((8,), ('x',))
  with pytest.raises(ValueError, match=r"axes \('x',\), but not .*data.*make_"):
    nn.MoE(_config(), routing.bip(), mesh=mesh, rngs=nnx.Rngs(0))


@pytest.mark.parametrize('shape', [(2, 0, WIDTH), (0, 3, WIDTH)])
def test_a_call_without_tokens_is_refused(shape):
  with pytest.raises(ValueError, match='has no tokens'):
    _layer(routing.bip())(jnp.zeros(shape), train=True)


@pytest.mark.long
def test_shards_are_of_training_alone():
  """So that what was trained with eight of them decodes token by token."""
  x = jnp.ones((1, 1, WIDTH))
  layer = _layer(routing.bip(), shards=8)
  np.testing.assert_array_equal(
    layer(x, train=False)[0], _layer(routing.bip())(x, train=False)[0]
  )
  with pytest.raises(ValueError, match='shards=8: must divide the 1 tokens'):
    layer(x, train=True)
