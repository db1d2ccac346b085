"""The online rules: real heaps, whole histograms, laws and values by hand."""

import heapq
import math

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from tests import golden_data


def softmax_scores(seed, n, experts, *, skew=0.0):
  """Scores of independent arrivals; `skew` makes some experts preferred."""
  generator = np.random.default_rng(seed)
  logits = generator.normal(size=(n, experts))
  logits += skew * generator.normal(size=experts)
  return jax.nn.softmax(jnp.asarray(logits, jnp.float32))


@jax.jit(static_argnums=0)
def trace(rule, scores_NxE):
  """Returns the choices and the prices of every arrival."""

  def step(state, scores_E):
    state, experts_K = rule.step(state, scores_E)
    return state, (experts_K, state.q)

  return jax.lax.scan(step, rule.init(scores_NxE.shape[1]), scores_NxE)[1]


assign = jax.jit(routing.assign_stream, static_argnums=0)


# References: one object per expert, NumPy scalars, one arrival at a time.


class Heap:
  """The c largest margins in a heap, and the largest of the others."""

  def __init__(self):
    self.heap, self.next = [], np.float32(-np.inf)

  def price(self, margin, capacity):
    if len(self.heap) < capacity:
      return np.float32(-np.inf)
    return min(self.heap[0], max(self.next, margin))

  def insert(self, margin, capacity):
    if len(self.heap) < capacity:
      heapq.heappush(self.heap, margin)
    else:
      self.next = max(self.next, heapq.heappushpop(self.heap, margin))


class Everything:
  """All margins, sorted when asked: for a c that changes."""

  def __init__(self):
    self.margins = []

  def price(self, margin, capacity):
    known = sorted([*self.margins, margin], reverse=True)
    return known[capacity] if capacity < len(known) else np.float32(-np.inf)

  def insert(self, margin, capacity):
    self.margins.append(margin)


class Histogram:
  """Counts per block, searched from above."""

  def __init__(self, bins, lower, upper):
    self.bins, self.lower = bins, np.float32(lower)
    self.width = np.float32((upper - lower) / bins)
    self.inverse = np.float32(bins / (upper - lower))
    self.offset = np.float32(lower / ((upper - lower) / bins))
    self.counts = [0] * bins

  def block(self, margin):
    block = np.floor((margin - self.lower) * self.inverse)
    return int(np.clip(block, -1, self.bins - 1))

  def price(self, margin, capacity):
    above = 0
    for block in reversed(range(self.bins)):
      inside = self.counts[block] + (block == self.block(margin))
      if above + inside > capacity:
        depth = np.float32(capacity - above + 0.5) / np.float32(inside)
        return (self.offset + np.float32(block + 1) - depth) * self.width
      above += inside
    return np.float32(0)

  def insert(self, margin, capacity):
    if self.block(margin) >= 0:
      self.counts[self.block(margin)] += 1


def reference(memories, scores_NxE, *, horizon, k, iterations, paced=False):
  experts = len(memories)
  q_E, zero = np.zeros(experts, np.float32), np.float32(0)
  history = []
  for arrival, s_E in enumerate(np.asarray(scores_NxE)):
    capacity = (min(arrival + 1, horizon) if paced else horizon) * k // experts
    for _ in range(iterations):
      p = max(zero, np.sort(s_E - q_E)[::-1][k])
      margins = list(s_E - p)
      q_E = np.array(
        [
          max(zero, memory.price(margin, capacity)) if capacity else zero
          for memory, margin in zip(memories, margins, strict=True)
        ]
      )
    for memory, margin in zip(memories, margins, strict=True):
      memory.insert(margin, capacity)
    chosen_K = np.argsort(-(s_E - q_E), kind='stable')[:k]
    history.append((chosen_K, q_E))
  return tuple(np.array(x) for x in zip(*history, strict=True))


def assert_same(actual, expected):
  for ours, theirs in zip(actual, expected, strict=True):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
  'n, experts, k, iterations, ties',
  [
    (96, 8, 2, 1, False),
    (96, 8, 2, 3, True),
    (50, 6, 1, 2, True),
    (64, 4, 3, 2, False),
  ],
)
def test_exact_equals_heaps(n, experts, k, iterations, ties):
  scores = softmax_scores(n, n, experts, skew=1.0)
  if ties:
    scores = jnp.round(scores * 16) / 16
  options = {'k': k, 'iterations': iterations}
  actual = trace(routing.online_exact(n, **options), scores)
  heaps = [Heap() for _ in range(experts)]
  assert_same(actual, reference(heaps, scores, horizon=n, **options))
  assert np.max(actual[1]) > 0


@pytest.mark.parametrize('arrivals', [80, 130])
def test_paced_equals_sorting_everything(arrivals):
  """Also past the horizon, where c stays the horizon's."""
  scores = softmax_scores(arrivals, arrivals, 8, skew=1.0)
  options = {'k': 1, 'iterations': 2, 'paced': True}
  actual = trace(routing.online_exact(100, **options), scores)
  memories = [Everything() for _ in range(8)]
  assert_same(actual, reference(memories, scores, horizon=100, **options))


@pytest.mark.long
@pytest.mark.parametrize('paced', [False, True])
@pytest.mark.parametrize(
  'bins, lower, upper', [(100, 0.0, 1.0), (7, 0.0, 0.4), (33, -0.1, 0.3)]
)
def test_histogram_equals_counting(bins, lower, upper, paced):
  scores = softmax_scores(bins, 96, 8, skew=1.0)
  options = {'k': 2, 'iterations': 2, 'paced': paced}
  rule = routing.online_histogram(
    96, bins=bins, lower=lower, upper=upper, **options
  )
  actual = trace(rule, scores)
  memories = [Histogram(bins, lower, upper) for _ in range(8)]
  assert_same(actual, reference(memories, scores, horizon=96, **options))
  assert np.max(actual[1]) > 0


# Values by hand and laws.


def test_exact_by_hand():
  """Two experts, k = 1, four arrivals: c = 2, so the third price is open."""
  scores = jnp.array([[0.75, 0.25], [0.75, 0.5], [0.75, 0.25], [0.75, 0.5]])
  rule = routing.online_exact(4, k=1, iterations=1)
  experts, q = trace(rule, scores)
  # p: 0.25, 0.5, 0.25; margins of expert 0: 0.5, 0.25, 0.5 -> price 0.25.
  # Then p = 0.5 both ways: a margin of 0.25 leaves the third largest at 0.25,
  # and 0.75 - 0.25 = 0.5 is a tie, to the lower index.
  np.testing.assert_array_equal(q, [[0, 0], [0, 0], [0.25, 0], [0.25, 0]])
  np.testing.assert_array_equal(experts, [[0], [0], [0], [0]])


# Exact in float32; none is subnormal.
GRID = st.integers(-4, 64).map(lambda x: x / 64)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(rows=st.lists(st.tuples(GRID, GRID), min_size=1, max_size=12))
def test_price_is_the_order_statistic_of_free_margins(rows):
  """Where all but k scores are negative p is 0, and margins are scores."""
  scores = np.full((12, 4), -1.0, np.float32)
  scores[: len(rows), :2] = rows
  cutoff = np.sort(scores, axis=0)[::-1][12 * 2 // 4]
  expected = np.maximum(cutoff, 0)
  _, state = assign(FREE_EXACT, scores)
  np.testing.assert_array_equal(state.q, expected)
  _, state = assign(FREE_HISTOGRAM, scores)
  np.testing.assert_allclose(state.q, expected, atol=0.1 + 1e-6)
  # Below the lowest block there is no price, not even half a block.
  assert np.all(state.q[cutoff < 0] == 0)


FREE_EXACT = routing.online_exact(12, k=2)
# 1.0 falls into the last block, as do all margins from `upper` on.
FREE_HISTOGRAM = routing.online_histogram(12, k=2, bins=10)


LAW = routing.online_exact(64, k=2, iterations=2)


@jax.jit
def batch_fixed_point(scores):
  q = jnp.zeros(scores.shape[1])
  q = routing.dual_iterations(scores, q, k=2, iterations=200)
  return q, routing.dual_iterations(scores, q, k=2, iterations=1)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
  seed=st.integers(0, 2**31), skew=st.floats(0, 3), ties=st.booleans()
)
def test_prices_rise_from_zero_towards_the_batch_fixed_point(seed, skew, ties):
  scores = softmax_scores(seed, 64, 8, skew=skew)
  if ties:
    scores = jnp.round(scores * 32) / 32
  experts_NxK, q_NxE = map(np.asarray, trace(LAW, scores))
  assert np.all(q_NxE[0] == 0)
  assert np.all(np.diff(q_NxE, axis=0) >= 0)
  # No price before c = 16 choices.
  chosen_NxE = np.any(experts_NxK[..., None] == np.arange(8), axis=1)
  before_NxE = np.cumsum(chosen_NxE, axis=0) - chosen_NxE
  assert np.all(before_NxE[q_NxE > 0] >= 64 * 2 // 8)
  fixed, again = batch_fixed_point(scores)
  hypothesis.assume(bool(jnp.all(fixed == again)))
  assert np.all(q_NxE[-1] <= fixed)


@pytest.mark.parametrize('seed', range(3))
def test_paced_prices_come_near_the_batch_fixed_point(seed):
  """Up to a constant for all experts, which changes no choice."""
  scores = softmax_scores(seed, 2048, 8, skew=1.0)
  fixed, again = batch_fixed_point(scores)
  np.testing.assert_allclose(again, fixed, atol=1e-6)
  _, state = assign(PACED, scores)
  assert jnp.std(state.q - fixed) < 0.08 * jnp.std(fixed)


PACED = routing.online_exact(2048, k=2, paced=True)


@pytest.mark.long
def test_pace_balances_and_the_horizon_does_not():
  scores = softmax_scores(0, 1024, 16, skew=1.0)
  violation = {}
  for paced in (False, True):
    rule = routing.online_exact(1024, k=4, paced=paced)
    choice, _ = assign(rule, scores)
    violation[paced] = float(routing.max_violation(choice.load))
  plain = routing.choose(scores, jnp.zeros(16), k=4).load
  assert violation[True] < 0.25
  # An expert that all want takes c arrivals, then c/t of them: c (1 + ln E/k).
  assert 1 < violation[False] < math.log(16 / 4) + 0.1
  assert violation[False] < float(routing.max_violation(plain))


def test_a_share_of_a_long_stream_does_not_overflow():
  """From arrival 2^28 on, it times k = 8 is no int32."""
  rule = routing.online_histogram(2**30, k=8, bins=8, paced=True)
  state = rule.init(16)
  counts = jnp.arange(8, 0, -1) * 2**25  # The share is 2^27.
  state = state._replace(
    memory=jnp.broadcast_to(counts, state.memory.shape),
    seen=jnp.int32(2**28),
  )
  state, _ = rule.step(state, jnp.linspace(0.0, 1.0, 16))
  assert jnp.all(state.q > 0)


def test_histogram_follows_exact():
  scores = softmax_scores(0, 512, 16, skew=1.0)
  exact, _ = assign(routing.online_exact(512, k=4), scores)
  earned = jnp.sum(exact.gates)
  difference = []
  for bins in (10, 1000):
    choice, _ = assign(routing.online_histogram(512, k=4, bins=bins), scores)
    difference.append(jnp.mean(jnp.any(choice.experts != exact.experts, 1)))
    assert abs(jnp.sum(choice.gates) / earned - 1) < 0.02
  assert difference[1] < difference[0]


RULES = {
  'exact': routing.online_exact(48, k=2),
  'paced': routing.online_exact(48, k=2, paced=True),
  'histogram': routing.online_histogram(48, k=2, bins=50),
}


@pytest.fixture(params=RULES)
def rule(request):
  return RULES[request.param]


@pytest.mark.long
def test_permuting_experts_permutes_everything(rule):
  # Except where s - q ties, which prices equal to a margin bring about and
  # the lower index decides.
  scores = softmax_scores(5, 48, 8, skew=1.0)
  order = np.random.default_rng(0).permutation(8)
  experts, q = trace(rule, scores)
  permuted, permuted_q = trace(rule, scores[:, order])
  np.testing.assert_array_equal(permuted_q, q[:, order])
  adjusted = -np.sort(-(scores - q), axis=1)
  untied = np.all(adjusted[:, :2] != adjusted[:, 1:3], axis=1)
  assert untied.mean() > 0.5
  np.testing.assert_array_equal(order[permuted][untied], experts[untied])


@pytest.mark.long
def test_steps_and_pieces_equal_the_whole(rule):
  scores = softmax_scores(6, 48, 8, skew=1.0)
  choice, state = assign(rule, scores)
  first, middle = assign(rule, scores[:30])
  last, end = assign(rule, scores[30:], middle)
  one, each, step = rule.init(8), [], jax.jit(rule.step)
  for scores_E in scores:
    one, experts_K = step(one, scores_E)
    each.append(experts_K)
  np.testing.assert_array_equal(choice.experts, np.stack(each))
  np.testing.assert_array_equal(
    choice.experts, np.concatenate([first.experts, last.experts])
  )
  jax.tree.map(np.testing.assert_array_equal, state, one)
  jax.tree.map(np.testing.assert_array_equal, state, end)
  np.testing.assert_array_equal(choice.load, first.load + last.load)
  assert choice.load.sum() == 48 * 2
  np.testing.assert_array_equal(
    choice.gates, np.take_along_axis(np.asarray(scores), choice.experts, 1)
  )
  assert choice.experts.dtype == choice.load.dtype == jnp.int32
  assert state.seen == 48


@pytest.mark.long
def test_one_program_serves_all_streams_of_a_shape(rule):
  """Even without `jax.jit` around it: the scan's body is the rule's step."""
  traces = 0

  def step(state, scores_E):
    nonlocal traces
    traces += 1
    return rule.step(state, scores_E)

  counting = routing.StreamRule(rule.init, step)
  for n, seed in ((3, 0), (40, 0), (40, 1)):
    routing.assign_stream(counting, softmax_scores(seed, n, 8))
  assert traces == 1


@pytest.mark.long
def test_gradient_flows_through_gates_only(rule):
  scores = softmax_scores(0, 40, 8, skew=1.0)
  choice, _ = assign(rule, scores)
  gradient = jax.grad(
    lambda scores: jnp.sum(routing.assign_stream(rule, scores)[0].gates)
  )(scores)
  chosen = np.zeros((40, 8))
  np.put_along_axis(chosen, np.asarray(choice.experts), 1, axis=1)
  np.testing.assert_array_equal(gradient, chosen)


# Edges.

BUILDERS = [routing.online_exact, routing.online_histogram]


@pytest.mark.parametrize('build', BUILDERS)
@pytest.mark.parametrize('n, k', [(3, 2), (40, 8)])
def test_nothing_to_share_out_or_everyone_takes_all(build, n, k):
  """c = floor(6 / 8) = 0, and k = E: plain top-k, no prices, no memory."""
  scores = softmax_scores(0, n, 8, skew=1.0)
  choice, state = assign(build(n, k=k), scores)
  plain = routing.choose(scores, jnp.zeros(8), k=k)
  jax.tree.map(np.testing.assert_array_equal, choice, plain)
  np.testing.assert_array_equal(state.q, 0)
  assert state.memory.size == 0


def test_nan_and_minus_infinity_come_last(rule):
  scores = softmax_scores(7, 48, 8, skew=1.0)
  missing = np.random.default_rng(0).random((48, 8)) < 0.3
  missing[:, :2] = False
  worst = jnp.where(missing, -jnp.inf, scores)
  nan = jnp.where(missing, jnp.nan, scores)
  experts, q = trace(rule, worst)
  assert np.all(np.isfinite(q)) and np.max(q) > 0
  assert not np.any(np.take_along_axis(missing, np.asarray(experts), axis=1))
  assert_same(trace(rule, nan), (experts, q))


def test_equal_scores_go_to_the_lower_index(rule):
  experts, _ = trace(rule, jnp.full((48, 8), 0.125))
  np.testing.assert_array_equal(experts, [[0, 1]] * 48)


def test_bfloat16_is_priced_in_float32(rule):
  scores = softmax_scores(8, 48, 8, skew=1.0).astype(jnp.bfloat16)
  choice, state = assign(rule, scores)
  same, _ = assign(rule, scores.astype(jnp.float32))
  jax.tree.map(np.testing.assert_array_equal, choice, same)
  assert state.q.dtype == choice.gates.dtype == jnp.float32


@pytest.mark.parametrize('build', BUILDERS)
@pytest.mark.parametrize(
  'arguments, words',
  [
    ({'horizon': 0, 'k': 1}, 'horizon=0'),
    ({'horizon': 9, 'k': 1, 'iterations': 0}, 'iterations=0'),
  ],
)
def test_refuses_arguments(build, arguments, words):
  with pytest.raises(ValueError, match=words):
    build(**arguments)


def test_refuses_a_histogram_of_nothing_and_k():
  with pytest.raises(ValueError, match='bins=0'):
    routing.online_histogram(9, k=1, bins=0)
  with pytest.raises(ValueError, match=r'lower=1.0.*upper=0\.5'):
    routing.online_histogram(9, k=1, lower=1.0, upper=0.5)
  for k in (0, 5):
    with pytest.raises(ValueError, match=rf'k={k}\b.*\b4$'):
      routing.online_exact(9, k=k).init(4)
    with pytest.raises(ValueError, match=rf'k={k}\b.*\b4$'):
      routing.online_exact(9, k=k).step(None, jnp.zeros(4))


# Regret.


def test_regret_by_hand():
  experts = jnp.array([[0, 1], [0, 2], [1, 0], [0, 1]])
  room = routing.within_capacity(experts, experts=4, capacity=2)
  np.testing.assert_array_equal(
    room, [[True, True], [True, True], [True, False], [False, False]]
  )
  gates = jnp.array([[8.0, 1], [4, 1], [2, 4], [16, 8]])
  choice = routing.Choice(
    experts, gates, jnp.array([4, 3, 1, 0]), jnp.ones((4, 2), bool)
  )
  assert routing.regret(choice, 32.0) == 1 - 44 / 32
  assert routing.regret(choice, 32.0, capacity=2) == 0.5
  assert routing.regret(choice, 32.0, capacity=0) == 1
  assert routing.regret(choice, 32.0, capacity=4) == 1 - 44 / 32


@pytest.mark.parametrize('name', ['plain_1024_16_4', 'skew_1024_16_4'])
def test_within_capacity_no_stream_beats_the_offline_optimum(name):
  golden = golden_data.load('assignment')
  scores = jnp.asarray(golden[f'{name}__scores'])
  optimum = float(golden[f'{name}__lp_optimum'])
  capacity = int(golden[f'{name}__capacity_ceil'])
  regrets = {}
  for paced in (False, True):
    rule = routing.online_exact(1024, k=4, paced=paced)
    choice, _ = assign(rule, scores)
    regrets[paced] = routing.regret(choice, optimum, capacity=capacity)
    assert regrets[paced] >= -1e-6
    assert routing.regret(choice, optimum) <= regrets[paced]
  plain = routing.choose(scores, jnp.zeros(16), k=4)
  greedy = routing.regret(plain, optimum, capacity=capacity)
  # Where no expert is preferred plain top-k is hard to beat.
  assert regrets[True] < (greedy if 'skew' in name else 0.05)
