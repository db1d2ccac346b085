"""The dual iterations against values worked by hand, and their edge cases."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from tests.routing.rules import SCORES

bip = importlib.import_module('moe_jax.routing.bip')


def test_bip_by_hand():
  """c = floor(4 x 1 / 3) = 1: the second largest of each column."""
  # p: second largest of each row, 0.3, 0.4, 0.2, 0.3; s - p =
  #   0.3 0.0 -.2 | 0.1 0.0 -.3 | 0.0 0.5 -.1 | 0.1 0.0 0.0
  q = routing.dual_iterations(SCORES, jnp.zeros(3), k=1, iterations=1)
  np.testing.assert_allclose(q, [0.1, 0.0, 0.0], atol=1e-7)
  # The third column's second largest is -0.1; no clip keeps it.
  q = routing.dual_iterations(
    SCORES, jnp.zeros(3), k=1, iterations=1, clip=False
  )
  np.testing.assert_allclose(q, [0.1, 0.0, -0.1], atol=1e-7)
  # Midpoints: p = 0.45, 0.45, 0.45, 0.35; s - p =
  #   .15 -.15 -.35 | .05 -.05 -.35 | -.25 .25 -.35 | .05 -.05 -.05
  q = routing.dual_iterations(
    SCORES, jnp.zeros(3), k=1, iterations=1, clip=False, cutoff='midpoint'
  )
  np.testing.assert_allclose(q, [0.1, 0.1, -0.2], atol=1e-7)


def test_upper_and_interpolated_cutoffs_by_hand():
  """As above, from the k-th and the c-th largest; k / E = 1/3, c / n = 1/4."""
  solve = functools.partial(
    routing.dual_iterations, SCORES, jnp.zeros(3), k=1, iterations=1
  )
  # p: the largest of each row, 0.6, 0.5, 0.7, 0.4; s - p =
  #   0.0 -.3 -.5 | 0.0 -.1 -.4 | -.5 0.0 -.6 | 0.0 -.1 -.1
  q = solve(clip=False, cutoff='kth')
  np.testing.assert_allclose(q, [0.0, 0.0, -0.1], atol=1e-7)
  np.testing.assert_array_equal(solve(cutoff='kth'), np.zeros(3))
  # p: a third of the way from the second to the largest, in thirtieths 12, 13,
  # 11, 10; s - p, in thirtieths =
  #   6 -3 -9 | 2 -1 -10 | -5 10 -8 | 2 -1 -1
  # q: a quarter of the way: 2 + 4/4, -1 + 11/4, -8 + 7/4.
  q = solve(clip=False, cutoff='linear')
  np.testing.assert_allclose(q, np.array([3, 1.75, -6.25]) / 30, atol=1e-7)


@pytest.mark.parametrize(
  ('cutoff', 'method'), [('linear', 'linear'), ('midpoint', 'hazen')]
)
def test_interpolated_cutoffs_are_quantiles_of_numpy(scores, cutoff, method):
  """Where c / n = k / E; padding is as if it were not there."""
  mask = np.arange(256) % 4 != 2
  start = np.linspace(0, 0.1, 8, dtype=np.float32)
  q = routing.dual_iterations(
    scores, start, k=2, iterations=1, clip=False, cutoff=cutoff, mask_T=mask
  )
  quantile = functools.partial(np.quantile, q=1 - 2 / 8, method=method)
  left = np.float64(scores)[mask]
  p = quantile(left - start, axis=1, keepdims=True)
  np.testing.assert_allclose(q, quantile(left - p, axis=0), atol=1e-6)


@pytest.mark.parametrize('cutoff', ['linear', 'kth'])
def test_other_cutoffs_lower_the_dual_as_well(scores, cutoff):
  """Each iteration, from prices of 0: k sum p + c sum q + sum max(0, ...)."""
  solve = jax.jit(
    functools.partial(
      routing.dual_iterations, k=2, iterations=1, clip=False, cutoff=cutoff
    )
  )

  def dual_value(q):
    s_TxE, q = np.float64(scores), np.float64(q)
    p = np.sort(s_TxE - q, axis=1)[:, -3:-2]
    slack = np.maximum(s_TxE - p - q, 0)
    return 2 * p.sum() + 64 * q.sum() + slack.sum()

  q = jnp.zeros(8)
  values = [dual_value(q)]
  for _ in range(8):
    q = solve(scores, q)
    values.append(dual_value(q))
  assert np.all(np.diff(values) <= 1e-5)
  assert values[-1] < values[0] - 1


def test_states_can_be_donated(scores):
  """No two leaves share a buffer, at the start and after each step."""
  balancer = routing.bip(1, lag=True)

  def step(state, scores):
    _, state = balancer.solve(state, scores, k=2)
    return balancer.update(state, (), k=2)

  donating = jax.jit(step, donate_argnums=0)
  states = [balancer.init(8)]
  states.append(step(states[0], scores))
  for state in states:
    q, pending = (leaf.unsafe_buffer_pointer() for leaf in state)
    assert q != pending
    for _ in range(2):
      state = donating(state, scores)
  assert np.any(state.q)


@pytest.mark.long
def test_bip_resumes_from_batch_to_batch(scores):
  balancer = routing.bip(3)
  state, q = balancer.init(8), jnp.zeros(8)
  np.testing.assert_array_equal(state.q, q)
  for batch in (scores, scores[::-1] ** 1.5, scores * 0.5):
    q_of_choice, state = balancer.solve(state, batch, k=2)
    q = routing.dual_iterations(batch, q, k=2, iterations=3)
    np.testing.assert_array_equal(q_of_choice, q)
    np.testing.assert_array_equal(state.q, q)
    choice = routing.choose(batch, q, k=2)
    seen = balancer.observe(state, q, batch, choice, k=2)
    state = balancer.update(state, seen, k=2)
    np.testing.assert_array_equal(state.q, q)
  assert np.any(q != 0)


def test_a_cold_start_forgets_the_batches_before(scores):
  balancer, nothing = routing.bip(2, warm=False), jnp.zeros(len(scores), bool)
  state = balancer.init(8)
  for batch in (scores, scores[::-1] ** 1.5):
    q, state = balancer.solve(state, batch, k=2)
    fresh = routing.dual_iterations(batch, jnp.zeros(8), k=2, iterations=2)
    np.testing.assert_array_equal(q, fresh)
  kept, _ = balancer.solve(state, scores, k=2, mask_T=nothing)
  np.testing.assert_array_equal(kept, q)
  assert np.any(q != 0)


def test_more_iterations_balance_better(scores):
  def violation(iterations):
    q = routing.dual_iterations(
      scores, jnp.zeros(8), k=2, iterations=iterations
    )
    return routing.max_violation(routing.choose(scores, q, k=2).load)

  assert violation(0) > 1.5
  assert violation(16) < 0.25


@pytest.mark.parametrize('cutoff', ['next', 'midpoint'])
def test_unclipped_q_is_centred_once_after_the_iterations(scores, cutoff):
  balancer = routing.bip(2, clip=False, cutoff=cutoff)
  start = jnp.linspace(-1, 1, 8)
  q, state = balancer.solve(routing.State(start), scores, k=2)
  uncentred = routing.dual_iterations(
    scores, start, k=2, iterations=2, clip=False, cutoff=cutoff
  )
  assert abs(np.mean(uncentred)) > 1e-3
  np.testing.assert_array_equal(q, uncentred - jnp.mean(uncentred))
  np.testing.assert_array_equal(state.q, q)


def test_masked_tokens_do_not_move_q(scores):
  """As if they were not there; the capacity counts valid tokens only."""
  mask = jnp.arange(256) % 3 != 1
  spoilt = jnp.where(mask[:, None], scores, jnp.nan)
  solve = functools.partial(routing.dual_iterations, k=2, iterations=4)
  q = solve(spoilt, jnp.zeros(8), mask_T=mask)
  np.testing.assert_array_equal(q, solve(scores[mask], jnp.zeros(8)))


def test_dual_iterations_have_no_gradient(scores):
  def total(scores, q):
    return jnp.sum(routing.dual_iterations(scores, q, k=2, iterations=1))

  for gradient in jax.grad(total, argnums=(0, 1))(scores, jnp.zeros(8)):
    np.testing.assert_array_equal(gradient, 0)


# Group limits


def test_what_brings_a_group_in(scores):
  """A little more than what an expert needs, or a little less."""
  limits = {'groups': 4, 'groups_per_token': 2}
  least = np.asarray(bip._to_compete(scores, 'kth', **limits))
  competes = np.asarray(routing.competing(scores, jnp.zeros(8), **limits))
  # Without it, a group that does not compete never does.
  assert np.all(least[~competes] > np.asarray(scores)[~competes])
  competing = jax.jit(functools.partial(routing.competing, **limits))
  for expert in range(8):
    for by, comes_in in ((1e-5, True), (-1e-5, False)):
      changed = scores.at[:, expert].set(least[:, expert] + by)
      found = np.asarray(competing(changed, jnp.zeros(8)))[:, expert]
      outside = ~competes[:, expert]
      assert np.all(found[outside] == comes_in)


def test_group_limits_that_exclude_nothing_change_no_bit(scores):
  solve = functools.partial(
    routing.dual_iterations, scores, jnp.zeros(8), k=2, iterations=2
  )
  np.testing.assert_array_equal(solve(groups=4, groups_per_token=4), solve())
  with pytest.raises(ValueError, match='groups=3: must divide the 8 experts'):
    solve(groups=3)


@pytest.mark.parametrize('cutoff', ['next', 'midpoint'])
def test_prices_that_mind_the_groups_balance_better(scores, cutoff):
  limits = {'groups': 4, 'groups_per_token': 2}

  def violation(**options):
    q = jax.jit(
      functools.partial(
        routing.dual_iterations,
        k=3,
        iterations=12,
        clip=False,
        cutoff=cutoff,
        **options,
      )
    )(scores, jnp.zeros(8))
    return routing.max_violation(routing.choose(scores, q, k=3, **limits).load)

  assert violation(**limits) < 0.7 * violation()


# Edge cases

RULES = pytest.mark.parametrize(
  'options',
  [{}]
  + [
    {'clip': False, 'cutoff': cutoff}
    for cutoff in ('next', 'midpoint', 'linear', 'kth')
  ],
  ids=['bip', 'quantile', 'midpoint', 'linear', 'kth'],
)
START = jnp.array([0.25, 0.0, 0.5])


@RULES
def test_all_experts_leave_q(options):
  q = routing.dual_iterations(SCORES, START, k=3, iterations=4, **options)
  np.testing.assert_array_equal(q, START)
  assert np.all(routing.choose(SCORES, q, k=3).load == 4)


@RULES
def test_fewer_choices_than_experts_leave_q(options):
  q = routing.dual_iterations(SCORES[:2], START, k=1, iterations=4, **options)
  np.testing.assert_array_equal(q, START)


@RULES
def test_no_valid_token_leaves_q(options):
  solve = functools.partial(routing.dual_iterations, k=1, iterations=4)
  nothing = jnp.zeros(4, bool)
  for scores in (SCORES, np.full_like(SCORES, np.nan)):
    q = solve(scores, START, mask_T=nothing, **options)
    np.testing.assert_array_equal(q, START)
  assert np.all(routing.choose(SCORES, START, k=1, mask_T=nothing).load == 0)


def test_capacity_is_rounded_down():
  """n k / m = 5 / 3: the second largest of each column, as for n = 3."""
  scores = jnp.array([[0.8, 0.1, 0.1]] * 2 + [[0.6, 0.2, 0.2]] * 3)
  q = routing.dual_iterations(scores, jnp.zeros(3), k=1, iterations=1)
  # s - p of the first column: 0.7, 0.7, 0.4, 0.4, 0.4.
  np.testing.assert_allclose(q, [0.7, 0, 0], atol=1e-7)
  q = routing.dual_iterations(
    jnp.concatenate([scores, scores[:1] * 0 + 1 / 3]),
    jnp.zeros(3),
    k=1,
    iterations=1,
  )
  # One token more: n k / m = 2, the third largest.
  np.testing.assert_allclose(q, [0.4, 0, 0], atol=1e-7)


@RULES
def test_equal_scores_give_equal_prices(options):
  scores = jnp.full((12, 4), 0.25)
  q = routing.dual_iterations(
    scores, jnp.zeros(4), k=2, iterations=4, **options
  )
  np.testing.assert_array_equal(q, np.zeros(4))
  # No price can part equals; that takes rounding.
  assert routing.max_violation(routing.choose(scores, q, k=2).load) == 1


@RULES
def test_minus_infinity_makes_no_nan(scores, options):
  """Some scores of some tokens; k + 1 = 3 finite ones are left to each."""
  hidden = (jnp.arange(256)[:, None] + jnp.arange(8)) % 8 < 5
  hidden &= jnp.arange(256)[:, None] % 2 == 0
  solve = functools.partial(
    routing.dual_iterations, q_E=jnp.zeros(8), k=2, iterations=4, **options
  )
  scattered = jnp.where(hidden, -jnp.inf, scores)
  q = solve(scattered)
  assert np.all(np.isfinite(q))
  choice = routing.choose(scattered, q, k=2)
  assert np.all(np.isfinite(choice.gates))
  # An expert that nobody can choose, and a token without a choice.
  for index in (np.s_[:, 5], np.s_[7, 1:]):
    q = solve(scores.at[index].set(-jnp.inf))
    assert np.all(np.isfinite(np.delete(q, 5)))
    assert not np.isnan(q[5])


@RULES
@pytest.mark.parametrize(
  'iterations', [pytest.param(1, marks=pytest.mark.long), 2]
)
def test_scores_computed_in_the_same_program_change_no_bit(options, iterations):
  """A compiler that rounds s - q otherwise here than there breaks ties."""

  def route(scores):
    q = routing.dual_iterations(
      scores, jnp.linspace(0, 0.1, 8), k=2, iterations=iterations, **options
    )
    return q, routing.choose(scores, q, k=2)

  @jax.jit
  def whole(x):
    scores = jax.nn.softmax(x)
    return scores, route(scores)

  x = np.random.default_rng(4).normal(size=(2048, 8)).astype(np.float32) / 2
  scores, routed = whole(x)
  jax.tree.map(np.testing.assert_array_equal, routed, jax.jit(route)(scores))


@RULES
def test_bfloat16_scores_are_routed_in_float32(scores, options):
  scores = scores.astype(jnp.bfloat16)
  start = jnp.linspace(0, 0.01, 8)  # Lost in the rounding of bfloat16.

  def route(scores):
    q = routing.dual_iterations(scores, start, k=2, iterations=2, **options)
    return q, routing.choose(scores, q, k=2)

  q, choice = route(scores)
  assert q.dtype == choice.gates.dtype == jnp.float32
  jax.tree.map(
    np.testing.assert_array_equal,
    (q, choice),
    route(scores.astype(jnp.float32)),
  )
