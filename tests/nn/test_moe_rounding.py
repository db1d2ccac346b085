"""Rounding and shards as options of the MoE layer."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import nn, routing
from moe_jax.parallel import dispatch

WIDTH, EXPERTS, K = 16, 8, 2
COUNTING = routing.bip(1)._replace(observe=routing.loss_free().observe)


def make_layer(balancer, capacity_factor=0.0, **overrides):
  config = nn.MoEConfig(
    width=WIDTH,
    hidden=24,
    experts=EXPERTS,
    experts_per_token=K,
    shared_experts=0,
    **overrides,
  )
  return nn.MoE(
    config, balancer, capacity_factor=capacity_factor, rngs=nnx.Rngs(0)
  )


@functools.partial(nnx.jit, static_argnames='train')
def call(moe, x, mask=None, *, train):
  return moe(x, mask, train=train)


def tokens(batch=4, sequence=10, seed=1):
  x = jax.random.normal(jax.random.key(seed), (batch, sequence, WIDTH))
  return x + 0.5  # in common, so that some experts are in demand


@pytest.mark.parametrize(
  ('sequence', 'violation'),
  # 40 tokens x 2 / 8 experts = 10; 25 x 2 / 8 = 6.25.
  [
    pytest.param((4, 10), 0.0, marks=pytest.mark.long),
    ((5, 5), 7 / 6.25 - 1),
  ],
)
@pytest.mark.parametrize(
  'capacity_factor', [pytest.param(0.0, marks=pytest.mark.long), 1.0]
)
def test_rounding_is_even_and_drops_nothing_from_the_first_step(
  sequence, violation, capacity_factor
):
  x = tokens(*sequence)
  moe = make_layer(
    COUNTING, round_to_capacity=True, capacity_factor=capacity_factor
  )
  y, aux = call(moe, x, train=True)
  np.testing.assert_allclose(
    routing.max_violation(aux.choice.load), violation, atol=1e-6
  )
  assert aux.sums['dropped'] == 0
  # The balancer sees what it chose, not what was made of it.
  plain = make_layer(COUNTING)
  _, unrounded = call(plain, x, train=True)
  assert np.max(unrounded.choice.load) > np.max(aux.choice.load)
  np.testing.assert_array_equal(
    aux.sums['unrounded_load'], unrounded.choice.load
  )
  np.testing.assert_array_equal(
    moe.observation.get_value(), unrounded.choice.load
  )
  np.testing.assert_array_equal(
    moe.state.get_value().q, plain.state.get_value().q
  )
  # What is mixed is what was rounded: against a loop over all experts.
  gates = np.zeros(aux.scores.shape, np.float32)
  np.put_along_axis(
    gates, np.asarray(aux.choice.experts), np.asarray(aux.choice.gates), 1
  )
  flat = x.reshape(-1, WIDTH)
  hidden = jax.nn.silu(jnp.einsum('td,edf->tef', flat, moe.gate[...]))
  hidden *= jnp.einsum('td,edf->tef', flat, moe.up[...])
  expected = jnp.einsum('te,tef,efd->td', gates, hidden, moe.down[...])
  np.testing.assert_allclose(y.reshape(-1, WIDTH), expected, atol=1e-5)
  # Evaluation rounds nothing.
  _, aux = call(moe, x, train=False)
  q = moe.state.get_value().q
  np.testing.assert_array_equal(
    aux.choice.experts, routing.choose(aux.scores, q, k=K).experts
  )


@pytest.mark.parametrize(
  ('full', 'sequence', 'factor', 'masked', 'replayed'),
  [
    (True, (4, 10), 0.0, False, False),
    (False, (5, 5), 0.0, False, False),  # 6.25 a buffer.
    (False, (4, 10), 1.5, False, False),
    (False, (4, 10), 0.0, True, False),
    (False, (4, 10), 0.0, False, True),
  ],
)
def test_buffers_are_full_where_every_row_has_a_pair(
  monkeypatch, full, sequence, factor, masked, replayed
):
  seen = []
  real = dispatch.capacity

  def capacity(*arguments, **options):
    seen.append(options['full'])
    return real(*arguments, **options)

  monkeypatch.setattr(dispatch, 'capacity', capacity)
  x = tokens(*sequence)
  moe = make_layer(COUNTING, factor, round_to_capacity=True)
  mask = jnp.ones(sequence, bool) if masked else None
  experts = jnp.zeros((*sequence, K), jnp.int32).at[..., 1].set(1)
  nnx.eval_shape(
    lambda moe: moe(x, mask, experts if replayed else None, train=True)[0], moe
  )
  assert seen == [full]


def test_rounding_splits_equal_tokens():
  """Which no price can."""
  x = jnp.ones((4, 10, WIDTH))
  moe = make_layer(routing.midpoint(), round_to_capacity=True)
  _, aux = call(moe, x, train=True)
  np.testing.assert_array_equal(aux.choice.load, 10)
  assert np.max(aux.sums['unrounded_load']) == 40


@pytest.mark.long
def test_each_shard_rounds_by_itself():
  x = tokens()
  moe = make_layer(
    COUNTING, round_to_capacity=True, shards=4, capacity_factor=1.0
  )
  _, aux = call(moe, x, train=True)
  assert aux.sums['dropped'] == 0
  chosen = jax.nn.one_hot(aux.choice.experts, EXPERTS).sum(1)
  # 10 tokens x 2 / 8 experts = 2.5.
  assert np.max(chosen.reshape(4, 10, EXPERTS).sum(1)) == 3
  np.testing.assert_array_equal(chosen.sum(0), aux.choice.load)


@pytest.mark.parametrize(
  'masked', [pytest.param(False, marks=pytest.mark.long), True]
)
@pytest.mark.parametrize(
  'balancer',
  [
    pytest.param(COUNTING, id='bip'),
    pytest.param(
      routing.quantile(estimator='histogram'),
      id='histogram',
      marks=pytest.mark.long,
    ),
    pytest.param(
      routing.midpoint(2, lag=True), id='midpoint_lag', marks=pytest.mark.long
    ),
    pytest.param(routing.quantile(), id='quantile', marks=pytest.mark.long),
  ],
)
def test_global_rules_do_not_see_the_shards(balancer, masked):
  x, mask = tokens(), None
  if masked:
    mask = np.ones(x.shape[:2], bool)
    mask[0] = False  # a shard of padding only
    mask[2, 7:] = False
  results = []
  for shards in (1, 4):
    moe = make_layer(balancer, shards=shards)
    for seed in (1, 2):
      _, aux = call(moe, tokens(seed=seed), mask, train=True)
      moe.update_router()
    results.append((aux, moe.state.get_value()))
  assert np.any(results[0][1].q)
  jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.long
def test_shards_with_prices_of_their_own():
  x = tokens()
  moe = make_layer(routing.bip(2, scope='shard'), shards=4)
  _, aux = call(moe, x, train=True)
  moe.update_router()
  scores = aux.scores.reshape(4, 10, EXPERTS)
  q = [
    routing.dual_iterations(s, jnp.zeros(EXPERTS), k=K, iterations=2)
    for s in scores
  ]
  experts = [
    routing.choose(*pair, k=K).experts for pair in zip(scores, q, strict=True)
  ]
  np.testing.assert_array_equal(aux.choice.experts, np.concatenate(experts))
  np.testing.assert_allclose(
    moe.state.get_value().q, np.mean(q, axis=0), atol=1e-7
  )


def test_tokens_that_do_not_divide_into_shards_are_refused():
  moe = make_layer(COUNTING, shards=3)
  with pytest.raises(ValueError, match='shards=3: .* the 40 tokens'):
    moe(tokens(), train=True)


def test_rounding_refuses_a_capacity_that_would_drop():
  with pytest.raises(ValueError, match=r'capacity_factor=0\.5: .* at least 1'):
    make_layer(COUNTING, round_to_capacity=True, capacity_factor=0.5)
