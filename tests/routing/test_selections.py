"""What selections other than `choose` make of scores and prices."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from tests.routing.rules import SCORES, skewed_scores

TOKENS, EXPERTS, K = 32, 8, 2

SELECTIONS = {
  'choose': functools.partial(routing.choose, k=K),
  'choose_in_groups': functools.partial(
    routing.choose, k=K, groups=4, groups_per_token=2
  ),
  'choose_above': functools.partial(routing.choose_above, k_max=4),
  'choose_by_experts': lambda scores, q, **mask: routing.choose_by_experts(
    scores, k=K, k_max=4, **mask
  ),
  'choose_evenly': lambda scores, q, **mask: routing.choose_evenly(
    scores, k=K, key=jax.random.key(7), **mask
  ),
}

every_selection = pytest.mark.parametrize('name', SELECTIONS)


@functools.cache
def _jitted(name):
  return jax.jit(SELECTIONS[name])


@every_selection
@settings(deadline=None, max_examples=15)
@given(
  seed=st.integers(0, 2**31),
  skew=st.floats(0, 4, width=32),
  price=st.floats(0, 0.5, width=32),
  masked=st.floats(0, 1),
)
def test_a_choice_is_feasible(name, seed, skew, price, masked):
  """Distinct experts, gates of these, loads that are the active slots."""
  scores = skewed_scores(TOKENS, EXPERTS, seed, skew)
  generator = np.random.default_rng(seed)
  q = np.float32(price * generator.random(EXPERTS))
  mask = generator.random(TOKENS) >= masked
  choice = _jitted(name)(scores, q, mask_T=jnp.asarray(mask))
  experts, gates = np.asarray(choice.experts), np.asarray(choice.gates)
  active = np.asarray(choice.active)
  assert experts.min() >= 0 and experts.max() < EXPERTS
  assert all(len(set(row)) == len(row) for row in experts)
  valid = active & mask[:, None]
  expected = np.take_along_axis(np.asarray(scores), experts, 1) * valid
  np.testing.assert_array_equal(gates, expected)
  load = np.bincount(experts[valid], minlength=EXPERTS)
  np.testing.assert_array_equal(choice.load, load)


@every_selection
def test_masked_tokens_are_as_if_deleted(name):
  scores = skewed_scores(TOKENS, EXPERTS)
  q = 0.02 * jnp.arange(EXPERTS, dtype=jnp.float32) + 0.05
  mask = np.arange(TOKENS) % 4 < 3
  poisoned = jnp.where(mask[:, None], scores, jnp.nan)
  choice = _jitted(name)(poisoned, q, mask_T=mask)
  assert np.all(np.isfinite(choice.gates))
  if name == 'choose_evenly':  # Who meets whom is at random.
    assert np.ptp(choice.load) <= 1 and choice.load.sum() == 24 * K
    return
  left = _jitted(name)(scores[np.flatnonzero(mask)], q)
  np.testing.assert_array_equal(choice.experts[mask], left.experts)
  np.testing.assert_array_equal(choice.active[mask], left.active)
  np.testing.assert_array_equal(choice.load, left.load)


@every_selection
def test_no_token_is_no_choice(name):
  choice = SELECTIONS[name](jnp.zeros((0, EXPERTS)), jnp.zeros(EXPERTS))
  assert choice.experts.shape == choice.active.shape == choice.gates.shape
  assert len(choice.experts) == 0
  np.testing.assert_array_equal(choice.load, np.zeros(EXPERTS))


def test_groups_by_hand():
  # Groups {0, 1}, {2, 3}, {4, 5} at q = 0: sums 1.0, 1.1, 0.9 of two best.
  scores = jnp.array([[0.9, 0.1, 0.5, 0.6, 0.8, 0.1]])
  choose = functools.partial(routing.choose, groups=3)
  choice = choose(scores, jnp.zeros(6), k=2, groups_per_token=1)
  np.testing.assert_array_equal(choice.experts, [[3, 2]])
  choice = choose(scores, jnp.zeros(6), k=2, groups_per_token=2)
  np.testing.assert_array_equal(choice.experts, [[0, 3]])
  # A price of 0.4 on expert 3 takes its group's sum to 0.7, below the others.
  q = jnp.zeros(6).at[3].set(0.4)
  choice = choose(scores, q, k=2, groups_per_token=2)
  np.testing.assert_array_equal(choice.experts, [[0, 4]])
  np.testing.assert_array_equal(
    choice.gates, np.array([[0.9, 0.8]], np.float32)
  )
  # Equal groups: the lower ones.
  choice = choose(jnp.full((1, 6), 0.5), jnp.zeros(6), k=2, groups_per_token=1)
  np.testing.assert_array_equal(choice.experts, [[0, 1]])


def test_all_groups_are_no_limit():
  scores = skewed_scores(TOKENS, EXPERTS)
  q = 0.01 * jnp.arange(EXPERTS)
  limited = routing.choose(scores, q, k=3, groups=4, groups_per_token=4)
  plain = routing.choose(scores, q, k=3)
  jax.tree.map(np.testing.assert_array_equal, limited, plain)


def test_choose_above_by_hand():
  choice = routing.choose_above(SCORES, jnp.array([0.45, 0.3, 0.05]), k_max=2)
  # Above: token 0 {0, 2}, token 1 {0, 1, 2}, token 2 {1, 2}, token 3 {2}.
  np.testing.assert_array_equal(choice.active, [[1, 1], [1, 1], [1, 1], [1, 0]])
  np.testing.assert_array_equal(choice.experts[0], [0, 2])
  # Of three experts, those whose scores exceed their prices the most.
  np.testing.assert_array_equal(choice.experts[1], [1, 0])
  np.testing.assert_array_equal(choice.experts[2], [1, 2])
  assert choice.experts[3, 0] == 2 and choice.gates[3, 1] == 0
  np.testing.assert_array_equal(choice.load, [2, 2, 3])


def test_threshold_activates_k_experts_on_average():
  """Every expert gets c tokens, from the first step on where q is its own."""
  scores = skewed_scores(64, EXPERTS, skew=2.0)
  balancer = routing.threshold(lag=False)
  q, _ = balancer.solve(balancer.init(EXPERTS), scores, k=K)
  np.testing.assert_array_equal(q, -np.sort(-scores, axis=0)[64 * K // EXPERTS])
  choice = routing.choose_above(scores, q, k_max=EXPERTS)
  np.testing.assert_array_equal(choice.load, 64 * K // EXPERTS)
  taken = choice.active.sum(axis=1)
  assert taken.sum() == 64 * K and taken.min() < K < taken.max()


def test_a_lagged_threshold_is_that_of_the_step_before():
  balancer = routing.threshold(ema=0.75)
  state = balancer.init(EXPERTS)
  first, second = (skewed_scores(64, EXPERTS, seed) for seed in (1, 2))
  cut = [-np.sort(-s, axis=0)[16] for s in (first, second)]
  q, state = balancer.solve(state, first, k=K)
  np.testing.assert_array_equal(q, 0)
  state = balancer.update(state, (), k=K)
  np.testing.assert_array_equal(state.q, cut[0])
  q, state = balancer.solve(state, second, k=K)
  np.testing.assert_array_equal(q, cut[0])
  state = balancer.update(state, (), k=K)
  np.testing.assert_allclose(state.q, 0.75 * cut[0] + 0.25 * cut[1], rtol=1e-6)


def test_choose_by_experts_by_hand():
  # c = floor(4 * 2 / 3) = 2 tokens for each expert; ties to the lower token.
  choice = routing.choose_by_experts(SCORES, k=2, k_max=3)
  by_token = [
    set(row[on].tolist())
    for row, on in zip(
      np.asarray(choice.experts), np.asarray(choice.active), strict=True
    )
  ]
  assert by_token == [{0, 2}, {0, 1}, {1}, {2}]
  np.testing.assert_array_equal(choice.load, [2, 2, 2])


def test_choose_evenly_is_even_and_at_random():
  scores = skewed_scores(TOKENS, EXPERTS, skew=4.0)
  a, b = (
    routing.choose_evenly(scores, k=3, key=jax.random.key(seed))
    for seed in (0, 1)
  )
  for choice in (a, b):
    np.testing.assert_array_equal(choice.load, TOKENS * 3 // EXPERTS)
  assert np.any(a.experts != b.experts)


def test_replay_takes_the_experts_and_new_gates():
  recorded = routing.choose_above(SCORES, jnp.full(3, 0.35), k_max=2)
  experts = jnp.where(recorded.active, recorded.experts, -1)
  mask = jnp.array([True, True, True, False])
  choice = routing.replay(2 * SCORES, experts, mask_T=mask)
  np.testing.assert_array_equal(choice.active, recorded.active)
  np.testing.assert_array_equal(choice.gates[:3], 2 * recorded.gates[:3])
  np.testing.assert_array_equal(choice.gates[3], 0)
  np.testing.assert_array_equal(choice.load, [2, 2, 0])


def test_replaying_a_choice_changes_nothing():
  scores = skewed_scores(TOKENS, EXPERTS)
  choice = routing.choose(scores, 0.01 * jnp.arange(EXPERTS), k=K)
  replayed = routing.replay(scores, choice.experts)
  jax.tree.map(np.testing.assert_array_equal, replayed, choice)


@pytest.mark.parametrize(
  'select',
  [
    lambda scores, q: routing.choose(scores, q, k=1),
    lambda scores, q: routing.choose_above(scores, q, k_max=2),
    lambda scores, q: routing.choose_by_experts(scores, k=1, k_max=2),
    lambda scores, q: routing.choose_evenly(scores, k=2, key=jax.random.key(0)),
    lambda scores, q: routing.replay(scores, jnp.array([[0], [-1], [2], [1]])),
  ],
)
def test_gradients_flow_through_active_gates_only(select):
  scores, q = jnp.asarray(SCORES), jnp.full(3, 0.35)
  by_scores, by_q = jax.grad(
    lambda scores, q: jnp.sum(select(scores, q).gates), argnums=(0, 1)
  )(scores, q)
  assert set(np.unique(by_scores)) == {0, 1}
  assert by_scores.sum() == select(scores, q).load.sum()
  assert not np.any(by_q)


@pytest.mark.parametrize(
  ('choose', 'words'),
  [
    (
      lambda: routing.choose(SCORES, jnp.zeros(3), k=1, groups=2),
      ['groups=2', 'must divide the 3 experts: 1, 3'],
    ),
    (
      lambda: routing.choose(
        SCORES, jnp.zeros(3), k=2, groups=3, groups_per_token=1
      ),
      ['groups_per_token=1', 'between 2', 'k=2', 'groups=3'],
    ),
    (
      lambda: routing.choose_above(SCORES, jnp.zeros(3), k_max=4),
      ['k_max=4', 'number of experts, 3'],
    ),
    (
      lambda: routing.choose_by_experts(SCORES, k=0, k_max=1),
      ['k=0', 'between 1'],
    ),
  ],
)
def test_what_cannot_be_chosen_is_refused(choose, words):
  with pytest.raises(ValueError) as error:
    choose()
  assert all(word in str(error.value) for word in words), error.value
