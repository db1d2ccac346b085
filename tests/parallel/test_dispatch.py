"""Both backends against a loop over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.parallel import dispatch
from moe_jax.parallel.grouped_matmul import TILE

T, D, F, E, K = 400, 6, 10, 5, 2
# Preferences by expert; 320 tokens are not padding. The tile is 256 rows.
BIASES = {
  'even': [0, 0, 0, 0, 0],
  # All tokens take experts 1 and 3, none takes the others.
  'one with all': [-50, 50, -50, 0, -50],
  # A short tile followed by groups without a row.
  'first and last': [50, -50, -50, -50, 40],
  'last two': [-50, -50, -50, 50, 40],
}


def _choice(experts, gates, mask):
  load = np.bincount(np.asarray(experts)[mask].ravel(), minlength=E)
  gates = jnp.where(mask[:, None], gates, 0.0)
  return routing.Choice(
    experts, gates, jnp.asarray(load, jnp.int32), jnp.ones(gates.shape, bool)
  )


@functools.cache
def _problem(bias):
  """x, the choice, the mask and the experts; every fifth token is padding."""
  generator = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(generator.normal(size=shape), jnp.float32)

  mask = np.arange(T) % 5 != 2
  _, experts = jax.lax.top_k(draw(T, E) + jnp.array(BIASES[bias]), K)
  choice = _choice(experts, jax.nn.sigmoid(draw(T, K)), mask)
  weights = dispatch.ExpertWeights(
    draw(E, D, F), draw(E, D, F), draw(E, F, D) / 4
  )
  return draw(T, D), choice, jnp.asarray(mask), weights


def _with_gradients(apply):
  """Compiles value, drops, and gradients by x, gates and weights."""

  @jax.jit
  def run(x, choice, mask, weights):
    def mix(x, gates, weights):
      mixed = apply(x, choice._replace(gates=gates), weights, mask)
      return mixed.y, mixed.dropped

    y, pullback, dropped = jax.vjp(mix, x, choice.gates, weights, has_aux=True)
    # Unlike weights for the entries of y, so that no error cancels.
    cotangent = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return (y, pullback(cotangent)), dropped

  return run


@functools.cache
def _backend(capacity=None):
  def apply(x, choice, weights, mask):
    if capacity is None:
      return dispatch.grouped(x, choice, weights, mask_T=mask)
    return dispatch.capacity(x, choice, weights, mask_T=mask, capacity=capacity)

  return _with_gradients(apply)


def _one_by_one(x, choice, weights, kept):
  """Adds up what each kept (token, expert) pair contributes."""

  def pair(x_D, expert, gate, kept):
    gate_w, up_w, down_w = (w[expert] for w in weights)
    hidden = jax.nn.silu(x_D @ gate_w) * (x_D @ up_w)
    return jnp.where(kept, gate * (hidden @ down_w), 0.0)

  of_token = jax.vmap(pair, in_axes=(None, 0, 0, 0))
  y = jax.vmap(of_token)(x, choice.experts, choice.gates, kept).sum(axis=1)
  return dispatch.Mixed(y, 0)


_reference = _with_gradients(_one_by_one)


def _fitting(bias, capacity):
  """Walks through the queue: better ranks first, then lower tokens."""
  _, choice, mask, _ = _problem(bias)
  experts, mask = np.asarray(choice.experts), np.asarray(mask)
  kept, room = np.zeros((T, K), bool), [capacity] * E
  for rank in range(K):
    for token in np.flatnonzero(mask):
      room[experts[token, rank]] -= 1
      kept[token, rank] = room[experts[token, rank]] >= 0
  return kept, np.sum(~kept[mask])


def _assert_close(actual, expected, tolerance=2e-5):
  def close(a, b):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, atol=tolerance * np.max(np.abs(b)))

  jax.tree.map(close, actual, expected)


def test_the_cases_are_what_they_say():
  load = {bias: np.asarray(_problem(bias)[1].load) for bias in BIASES}
  np.testing.assert_array_equal(
    load['one with all'][[0, 1, 2, 4]], [0, 320, 0, 0]
  )
  np.testing.assert_array_equal(load['first and last'], [320, 0, 0, 0, 320])
  assert TILE < 320 < 2 * TILE
  assert np.all(load['even'] > 0) and np.all(load['even'] % 32)


@pytest.mark.parametrize('bias', BIASES)
def test_grouped_equals_a_loop_over_tokens(bias):
  x, choice, mask, weights = _problem(bias)
  everyone, _ = _fitting(bias, T)
  expected, _ = _reference(x, choice, everyone, weights)
  actual, dropped = _backend()(x, choice, mask, weights)
  _assert_close(actual, expected)
  assert dropped == 0
  y, (dx, _, _) = actual
  np.testing.assert_array_equal(y[~mask], 0)
  np.testing.assert_array_equal(dx[~mask], 0)


@pytest.mark.parametrize('bias', BIASES)
def test_capacity_equals_a_loop_over_tokens(bias):
  x, choice, mask, weights = _problem(bias)
  kept, expected_dropped = _fitting(bias, 110)
  expected, _ = _reference(x, choice, kept, weights)
  actual, dropped = _backend(110)(x, choice, mask, weights)
  _assert_close(actual, expected)
  assert dropped == expected_dropped > 0


def test_capacity_for_the_largest_load_equals_grouped():
  problem = _problem('even')
  load = problem[1].load
  expected, _ = _backend()(*problem)
  actual, dropped = _backend(int(load.max()))(*problem)
  _assert_close(actual, expected, 2e-6)
  assert dropped == 0
  _, dropped = _backend(int(load.max()) - 1)(*problem)
  assert dropped == np.sum(load == load.max())


def test_full_buffers_need_not_be_cleared():
  x, _, _, weights = _problem('even')
  everyone = jnp.ones(T, bool)
  experts = (jnp.arange(T)[:, None] + jnp.array([0, 2])) % E  # 160 for each.
  gates = jax.random.uniform(jax.random.key(0), (T, K))
  choice = _choice(experts, gates, np.ones(T, bool))

  def run(full):
    def apply(x, choice, weights, mask):
      return dispatch.capacity(x, choice, weights, capacity=160, full=full)

    return _with_gradients(apply)(x, choice, everyone, weights)

  jax.tree.map(np.testing.assert_array_equal, run(True), run(False))


@pytest.mark.parametrize('capacity', [None, 110])
def test_bfloat16_is_float32_within_its_precision(capacity):
  x, choice, mask, weights = _problem('even')
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (x, weights))
  # The same numbers, computed in float32.
  x, weights = jax.tree.map(lambda a: a.astype(jnp.float32), half)
  (expected, _), _ = _backend(capacity)(x, choice, mask, weights)
  (actual, gradients), _ = _backend(capacity)(half[0], choice, mask, half[1])
  dx, dgates, dweights = gradients
  assert actual.dtype == dx.dtype == dweights.up_ExDxF.dtype == jnp.bfloat16
  assert dgates.dtype == jnp.float32
  _assert_close(actual, expected, 2e-2)
  assert np.any(expected != actual)


def test_drops_by_choice_rank_and_then_token_index_by_hand():
  """Experts double, triple, ... the token, in a buffer of two tokens each."""
  experts = jnp.array([[1, 0], [0, 1], [0, 1], [0, 2], [1, 0]])
  # Expert 0: first choices of tokens 1 and 2 stay; 3, then 0 and 4 drop.
  # Expert 1: first choices of tokens 0 and 4 stay; second of 1, 2 drop.
  # Expert 2: the second choice of token 3 stays. Token 5 is padding.
  experts = jnp.concatenate([experts, jnp.array([[0, 1]])])
  mask = np.array([True] * 5 + [False])
  choice = _choice(experts, jnp.array([[1.0, 10.0]] * 6), mask)
  big = 40.0  # silu(40) = 40
  weights = dispatch.ExpertWeights(
    jnp.full((E, 1, 1), big),
    jnp.ones((E, 1, 1)),
    jnp.arange(2.0, 2 + E)[:, None, None] / big,
  )
  mixed = dispatch.capacity(
    jnp.ones((6, 1)), choice, weights, mask_T=jnp.asarray(mask), capacity=2
  )
  # Rank 1 counts once, rank 2 ten times; expert e multiplies by e + 2.
  np.testing.assert_allclose(mixed.y[:, 0], [3, 2, 2, 10 * 4, 3, 0], rtol=1e-6)
  assert mixed.dropped == 5


@pytest.mark.parametrize('capacity', [None, 110])
def test_nothing_but_padding(capacity):
  x, choice, mask, weights = _problem('even')
  choice = _choice(choice.experts, choice.gates, np.zeros(T, bool))
  (y, gradients), dropped = _backend(capacity)(x, choice, mask & False, weights)
  jax.tree.map(lambda a: np.testing.assert_array_equal(a, 0), (y, gradients))
  assert dropped == 0


# take_rows


def test_take_rows_by_hand():
  x = jnp.array([[1.0, 2], [3, 4], [5, 6]])
  index = jnp.array([2, 0, 3, 2], jnp.int32)  # 3: none, a row of zeros
  inverse = jnp.array([[1, 4], [4, 4], [0, 3]], jnp.int32)  # 4: none
  y, pullback = jax.vjp(lambda x: dispatch.take_rows(x, index, inverse), x)
  np.testing.assert_array_equal(y, [[5, 6], [1, 2], [0, 0], [5, 6]])
  (dx,) = pullback(jnp.array([[1.0, 1], [2, 2], [4, 4], [8, 8]]))
  np.testing.assert_array_equal(dx, [[2, 2], [0, 0], [9, 9]])


def test_take_rows_has_the_gradient_of_a_gather():
  generator = np.random.default_rng(2)
  index = generator.permutation(24)[:16]  # Entries of 20 or more: none.
  inverse = np.full((20, 1), 16)
  valid = index < 20
  inverse[index[valid], 0] = np.flatnonzero(valid)
  x, cotangent = jnp.asarray(generator.normal(size=(2, 20, 3)), jnp.float32)
  cotangent = cotangent[:16]

  def gather(x):
    return x.at[index].get(mode='fill', fill_value=0)

  def ours(x):
    return dispatch.take_rows(x, jnp.asarray(index), jnp.asarray(inverse))

  for expected, actual in zip(
    *(
      (y, *pullback(cotangent))
      for y, pullback in (jax.vjp(f, x) for f in (gather, ours))
    ),
    strict=True,
  ):
    np.testing.assert_array_equal(actual, expected)


def test_for_the_backward_pass_a_swiglu_keeps_gate_and_up_alone():
  gate, up, weights = jnp.ones((64, 32)), jnp.ones((64, 32)), jnp.ones((32, 8))
  _, pullback = jax.vjp(
    lambda gate, up: dispatch.swiglu(gate, up, lambda x: x @ weights), gate, up
  )
  shapes = [leaf.shape for leaf in jax.tree.leaves(pullback)]
  assert shapes.count(gate.shape) == 2
