"""Laws that all rules obey."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.routing import balancer as balancer_lib
from tests.routing import rules

TOKENS, EXPERTS, K = 96, 8, 3

every_rule = rules.each()


def warm(name, k=K, experts=EXPERTS):
  """The state after two steps, so that q is not 0 where it ever moves."""
  state = rules.RULES[name].init(experts)
  for seed in (11, 12):
    scores = rules.skewed_scores(TOKENS, experts, seed)
    state, _, _ = rules.jitted_step(name, k)(state, scores)
  return state


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_same_price(name, actual, expected):
  """Bit for bit, except for the rule that sums floats."""
  if name in rules.BY_SUMS:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
  else:
    np.testing.assert_array_equal(actual, expected)


def dual_value(scores, q, *, k, clip):
  """k sum p + c sum q + sum max(0, s - p - q) at the best p, in float64."""
  scores, q = np.float64(scores), np.float64(q)
  p = np.sort(scores - q, axis=1)[:, -k - 1]
  p = np.maximum(p, 0) if clip else p
  slack = np.maximum(0, scores - p[:, None] - q)
  return (
    k * p.sum() + len(scores) * k // scores.shape[1] * q.sum() + slack.sum()
  )


@functools.cache
def _one_iteration(k, clip, cutoff):
  return jax.jit(
    lambda scores, q: routing.dual_iterations(
      scores, q, k=k, iterations=1, clip=clip, cutoff=cutoff
    )
  )


@settings(deadline=None, max_examples=15)
@given(
  seed=st.integers(0, 2**31),
  skew=st.floats(0, 4, width=32),
  k=st.sampled_from([1, 3, 7]),
  clip=st.booleans(),
  cutoff=st.sampled_from(['next', 'midpoint', 'linear', 'kth']),
  start=st.floats(0, 0.5, width=32),
)
def test_dual_value_never_rises(seed, skew, k, clip, cutoff, start):
  scores = rules.skewed_scores(TOKENS, EXPERTS, seed, skew)
  q = start * jax.random.uniform(jax.random.key(seed), (EXPERTS,))
  before = dual_value(scores, q, k=k, clip=clip)
  for _ in range(4):
    q = _one_iteration(k, clip, cutoff)(scores, q)
    assert not clip or np.min(q) >= 0
    after = dual_value(scores, q, k=k, clip=clip)
    assert after <= before + 1e-6 * abs(before)
    before = after


@functools.cache
def _choose(k):
  return jax.jit(functools.partial(routing.choose, k=k))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_constant_added_to_q_changes_no_choice(data):
  # Multiples of 1/64 of this size subtract without rounding.
  def dyadic(*shape):
    size = int(np.prod(shape))
    numbers = st.lists(st.integers(-64, 64), min_size=size, max_size=size)
    return np.float32(data.draw(numbers)).reshape(shape) / 64

  scores, q, shift = dyadic(6, 4), dyadic(4), dyadic(1)
  choice = _choose(2)(scores, q)
  assert_same(_choose(2)(scores, q + shift), choice)


@every_rule
def test_permuting_tokens_permutes_the_choice(name):
  scores = rules.skewed_scores(TOKENS, EXPERTS)
  order = np.random.default_rng(0).permutation(TOKENS)
  state = warm(name)
  after, q, choice = rules.jitted_step(name, K)(state, scores)
  after_2, q_2, choice_2 = rules.jitted_step(name, K)(state, scores[order])
  assert_same_price(name, q_2, q)
  assert_same_price(name, after_2.q, after.q)
  np.testing.assert_array_equal(choice_2.experts, choice.experts[order])
  np.testing.assert_array_equal(choice_2.load, choice.load)


@pytest.mark.parametrize('cutoff', ['next', 'midpoint'])
@pytest.mark.parametrize('clip', [True, False])
def test_permuting_experts_permutes_q(clip, cutoff):
  scores = rules.skewed_scores(TOKENS, EXPERTS)
  start = 0.1 * jnp.arange(EXPERTS)
  order = np.random.default_rng(0).permutation(EXPERTS)
  q = _one_iteration(K, clip, cutoff)(scores, start)
  permuted = _one_iteration(K, clip, cutoff)(scores[:, order], start[order])
  np.testing.assert_array_equal(permuted, q[order])


@every_rule
def test_masked_tokens_are_as_if_deleted(name):
  scores = rules.skewed_scores(TOKENS, EXPERTS)
  mask = np.random.default_rng(1).random(TOKENS) < 0.6
  poisoned = jnp.where(mask[:, None], scores, jnp.nan)
  state = warm(name)
  after, q, choice = rules.jitted_step(name, K)(state, poisoned, mask_T=mask)
  left = scores[np.flatnonzero(mask)]
  after_2, q_2, choice_2 = rules.jitted_step(name, K)(state, left)
  jax.tree.map(functools.partial(assert_same_price, name), after, after_2)
  assert_same_price(name, q, q_2)
  np.testing.assert_array_equal(choice.experts[mask], choice_2.experts)
  np.testing.assert_array_equal(choice.gates[mask], choice_2.gates)
  np.testing.assert_array_equal(choice.gates[~mask], 0)
  np.testing.assert_array_equal(choice.load, choice_2.load)


@every_rule
def test_a_step_without_tokens_leaves_the_state(name):
  state = warm(name)
  if name not in rules.UNPRICED:
    assert np.any(state.q)
  scores = jnp.full((TOKENS, EXPERTS), jnp.nan)
  after, _, choice = rules.jitted_step(name, K)(
    state, scores, mask_T=np.zeros(TOKENS, bool)
  )
  assert_same(after, state)
  assert not np.any(choice.load)


@every_rule
def test_updating_from_nothing_leaves_q(name):
  balancer, state = rules.RULES[name], warm(name)
  nothing = routing.zero_observation(balancer, EXPERTS, K)
  assert_same(balancer.update(state, nothing, k=K).q, state.q)


@every_rule
def test_where_every_token_takes_every_expert_q_stays(name):
  assert_nothing_moves(name, TOKENS, EXPERTS)


@rules.each(
  [
    name
    for name in rules.RULES
    if name not in (*rules.BY_LOADS, *rules.BY_SUMS)
  ]
)
def test_nothing_to_share_out_leaves_q(name):
  """n k < E, so c = 0."""
  assert_nothing_moves(name, 2, 3)


def assert_nothing_moves(name, tokens, k):
  state = warm(name)
  scores = rules.skewed_scores(tokens, EXPERTS)
  after, q, choice = rules.jitted_step(name, k)(state, scores)
  assert_same(after.q, state.q)
  assert np.all(np.isfinite(after.q)) and np.all(np.isfinite(q))
  if k == EXPERTS:
    np.testing.assert_array_equal(choice.load, tokens)


@every_rule
def test_equal_scores_give_equal_prices(name):
  """No price can part equal tokens; see rounding for that."""
  state = rules.RULES[name].init(EXPERTS)
  scores = jnp.full((TOKENS, EXPERTS), 0.125)
  for _ in range(3):
    state, q, choice = rules.jitted_step(name, K)(state, scores)
    assert np.all(np.isfinite(q))
    if name not in rules.BY_LOADS:
      np.testing.assert_array_equal(q, q[0])
      np.testing.assert_array_equal(choice.load, [TOKENS] * K + [0] * 5)


@every_rule
def test_scores_of_minus_infinity_do_no_lasting_harm(name):
  """No token can take expert 2; or each can take just three experts."""
  scores = rules.skewed_scores(TOKENS, EXPERTS)
  nobody = scores.at[:, 2].set(-jnp.inf)
  rank = jnp.argsort(jnp.argsort(scores, axis=1), axis=1)
  three = jnp.where(rank >= EXPERTS - K, scores, -jnp.inf)
  state = warm(name)
  for bad in (nobody, nobody, three, three):
    state, q, choice = rules.jitted_step(name, K)(state, bad)
    assert np.all(np.isfinite(q)) and np.all(np.isfinite(state.q))
    assert np.all(np.isfinite(np.asarray(choice.gates)))
  _, _, choice = rules.jitted_step(name, K)(state, scores)
  assert np.sum(choice.load) == TOKENS * K


def test_a_token_of_nan_does_not_take_sinkhorn_from_the_others():
  scores = rules.skewed_scores(TOKENS, EXPERTS)
  state = rules.RULES['sinkhorn'].init(EXPERTS)
  _, q, _ = rules.jitted_step('sinkhorn', K)(state, scores.at[5].set(jnp.nan))
  _, expected, _ = rules.jitted_step('sinkhorn', K)(state, scores)
  np.testing.assert_allclose(q, expected, atol=0.01)
  assert np.any(q)


# The others average prices of shards and microbatches.
@rules.each([name for name, rule in rules.RULES.items() if not rule.per_shard])
def test_a_rule_knows_whether_its_observations_add_up(name):
  """Over microbatches that are priced alike."""
  balancer, state = rules.RULES[name], warm(name)
  observe = jax.jit(functools.partial(balancer.observe, k=K))

  def seen(scores):
    choice = routing.choose(scores, state.q, k=K)
    return observe(state, state.q, scores, choice)

  scores = rules.skewed_scores(TOKENS, EXPERTS)
  parts = jax.tree.map(jnp.add, *map(seen, jnp.split(scores, 2)))
  if balancer.additive:
    assert_same(parts, seen(scores))
  else:
    with pytest.raises(ValueError, match="2 observations .*'histogram'"):
      balancer.update(state, parts, k=K)


@every_rule
def test_a_rule_knows_whether_shards_have_prices_of_their_own(name):
  balancer, state = rules.RULES[name], warm(name)
  scores = rules.skewed_scores(TOKENS, EXPERTS)
  together, _, _ = rules.jitted_step(name, K)(state, scores)
  on_shards = jax.vmap(
    functools.partial(rules.step, balancer, state, k=K, axis_name='shard'),
    axis_name='shard',
    out_axes=(None, 0, 0),
  )
  apart, _, _ = jax.jit(on_shards)(scores.reshape(4, -1, EXPERTS))
  if balancer.per_shard:
    assert np.max(np.abs(apart.q - together.q)) > 1e-3
  else:
    assert_same_price(name, apart.q, together.q)


def test_counts_beyond_int32_are_shared_out_exactly():
  """300 million tokens of 8 choices: n k does not fit."""
  n, k, experts = 300_000_001, 8, 256
  shared = jax.jit(lambda n: balancer_lib.even_share(n, k, experts))(
    jnp.int32(n)
  )
  assert shared == n * k // experts
  even = np.full(experts, n * k // experts, np.int32)
  load = even + np.where(np.arange(experts) == 3, 5, 0).astype(np.int32)
  rule = rules.RULES['loss_free']
  q = rule.update(rule.init(experts), jnp.asarray(load), k=k).q
  assert q[3] > 0 and np.all(np.delete(q, 3) == -q[3])


@pytest.mark.long
@rules.each(
  [
    'bip_unclipped',
    'midpoint',
    'midpoint_lag',
    'quantile',
    'quantile_histogram',
    'loss_free_proportional',
    'sinkhorn',
  ]
)
def test_unclipped_prices_stay_bounded_over_5000_batches(name):
  # Capacity is rounded down (42 * 3 / 8 = 15.75): what lets the mean drift.
  tokens, batches = 42, 5000

  def batch(state, i):
    turn = jnp.sin(i / 300 + jnp.arange(EXPERTS))
    logits = jax.random.normal(jax.random.key(i), (tokens, EXPERTS)) + turn
    state, _, choice = rules.step(
      rules.RULES[name], state, jax.nn.softmax(logits), k=K
    )
    return state, (jnp.max(jnp.abs(state.q)), choice.load)

  state = rules.RULES[name].init(EXPERTS)
  _, (size, load) = jax.jit(
    lambda state: jax.lax.scan(batch, state, jnp.arange(batches))
  )(state)
  # Scores lie in [0, 1], so no two prices need differ by more than 1.
  assert np.max(size) < 1
  late = routing.max_violation(load[-500:])
  assert np.mean(late) < np.mean(routing.max_violation(load[:1])) + 0.1


def test_capacity_rounded_down_makes_uncentred_prices_drift():
  """Why rules are centred: the iteration alone, on the stream above."""

  def batch(q, i):
    logits = jax.random.normal(jax.random.key(i), (42, EXPERTS))
    q = routing.dual_iterations(
      jax.nn.softmax(logits), q, k=K, iterations=1, clip=False
    )
    return q, jnp.mean(q)

  _, mean = jax.jit(lambda q: jax.lax.scan(batch, q, jnp.arange(2000)))(
    jnp.zeros(EXPERTS)
  )
  assert abs(mean[-1]) > 1


@pytest.mark.long
@every_rule
def test_bfloat16_scores_are_priced_in_float32(name):
  scores = rules.skewed_scores(TOKENS, EXPERTS, dtype=jnp.bfloat16)
  state = warm(name)
  actual = rules.jitted_step(name, K)(state, scores)
  expected = rules.jitted_step(name, K)(state, scores.astype(jnp.float32))
  for leaf in jax.tree.leaves(actual[0]):
    assert leaf.dtype in (jnp.float32, jnp.int32)
  assert_same(actual, expected)


@every_rule
def test_gradient_is_that_of_plain_routing_with_the_same_choice(name):
  """Through the gates alone: q has none, whatever computed it."""
  state = warm(name)
  scores = rules.skewed_scores(TOKENS, EXPERTS)
  weight = jax.random.normal(jax.random.key(5), (TOKENS, K))

  def output(scores):
    _, q, choice = rules.step(rules.RULES[name], state, scores, k=K)
    total = jnp.sum(choice.gates, axis=-1, keepdims=True)
    return jnp.sum(weight * choice.gates / total), (q, choice)

  gradient, (q, choice) = jax.jit(jax.grad(output, has_aux=True))(scores)

  def same_choice(scores):
    gates = jnp.take_along_axis(scores, choice.experts, axis=1)
    return jnp.sum(weight * gates / jnp.sum(gates, axis=1, keepdims=True))

  np.testing.assert_allclose(
    gradient, jax.grad(same_choice)(scores), rtol=1e-6, atol=1e-7
  )
  # Against finite differences, in float64, along a direction.
  direction = np.random.default_rng(2).normal(size=scores.shape)

  def shifted(h):
    gates = np.take_along_axis(
      np.float64(scores) + h * direction, np.asarray(choice.experts), 1
    )
    return np.sum(np.float64(weight) * gates / gates.sum(1, keepdims=True))

  slope = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
  np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-4)
  jacobian = jax.jit(
    jax.grad(
      lambda scores: jnp.sum(
        rules.step(rules.RULES[name], state, scores, k=K)[1]
      )
    )
  )(scores)
  assert not np.any(jacobian)
