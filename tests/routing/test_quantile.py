"""Quantile Balancing: its estimators by hand and on the host."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from tests.routing import rules

# The package has a function of the module's name.
quantile = importlib.import_module('moe_jax.routing.quantile')


def test_a_product_counts_as_a_scatter_does():
  """CPUs count by scatter, accelerators by product; 7 bins fill no square."""
  bins = np.random.default_rng(0).integers(0, 9, size=(50, 3), dtype=np.int32)
  bins[:5] = quantile._NO_BIN
  expected = [np.bincount(column[column < 7], minlength=7) for column in bins.T]
  for count in (quantile._count_by_scatter, quantile._count_by_product):
    np.testing.assert_array_equal(count(bins, 7), expected)


# By hand: two experts, k = 1, so that p is the lesser score of a token and the
# margins are d and 0, or 0 and -d, with d the first score minus the second.
# d = .8 .6 .4 .2 on one device; -.1 -.5 and two of padding on the other.
DIFFERENCES = np.array([[0.8, 0.6, 0.4, 0.2], [-0.1, -0.5, 0.9, 0.9]])
PARTS = np.float32(np.stack([0.5 + DIFFERENCES / 2, 0.5 - DIFFERENCES / 2], 2))
MASKS = np.array([[True] * 4, [True, True, False, False]])
WORKED = {
  # c = 3: the fourth of .8 .6 .4 .2 0 0 and of .5 .1 0 0 0 0.
  'exact': (0.2, 0.0),
  # c = 2 and 1: the second of .8 .6 .4 .2 and the first of 0 0, averaged; the
  # second of 0 0 0 0 and the first of .5 .1.
  'shard_mean': (0.3, 0.25),
  # The third and the second of the same.
  'microbatch_mean': (0.2, 0.05),
}


def _step(balancer, state, scores, mask, axis_name=None):
  choice = routing.choose(scores, state.q, k=1, mask_T=mask)
  return balancer.observe(
    state, state.q, scores, choice, k=1, mask_T=mask, axis_name=axis_name
  )


@pytest.mark.parametrize('estimator', WORKED)
def test_estimators_by_hand(estimator):
  """Over two devices with unlike numbers of tokens."""
  balancer = routing.quantile(estimator=estimator)
  state = balancer.init(2)
  seen = jax.vmap(
    functools.partial(_step, balancer, state, axis_name='device'),
    axis_name='device',
    out_axes=None,
  )(PARTS, MASKS)
  q = balancer.update(state, seen, k=1).q
  expected = np.array(WORKED[estimator])
  np.testing.assert_allclose(q, expected - expected.mean(), atol=1e-7)


@pytest.mark.parametrize('estimator', ['shard_mean', 'microbatch_mean'])
def test_means_of_quantiles_add_up_over_microbatches(estimator):
  """Two microbatches on one device are as two devices are."""
  balancer = routing.quantile(estimator=estimator)
  assert balancer.additive and balancer.per_shard
  state = balancer.init(2)
  seen = [
    _step(balancer, state, *part) for part in zip(PARTS, MASKS, strict=True)
  ]
  q = balancer.update(state, jax.tree.map(jnp.add, *seen), k=1).q
  expected = np.array(WORKED[estimator])
  np.testing.assert_allclose(q, expected - expected.mean(), atol=1e-7)


@pytest.mark.long
def test_the_mean_of_one_part_is_the_exact_quantile():
  scores = rules.skewed_scores(96, 8)
  seen = []
  for estimator in ('exact', 'microbatch_mean'):
    balancer = routing.quantile(estimator=estimator)
    state = routing.State(0.01 * jnp.arange(8.0))
    choice = routing.choose(scores, state.q, k=3)
    observation = balancer.observe(state, state.q, scores, choice, k=3)
    seen.append(balancer.update(state, observation, k=3).q)
  np.testing.assert_array_equal(*seen)
  assert np.any(seen[0])


@pytest.mark.long
@pytest.mark.parametrize('estimator', ['shard_mean', 'microbatch_mean'])
def test_nothing_to_share_out_leaves_q(estimator):
  balancer = routing.quantile(estimator=estimator)
  state = routing.State(0.5 * jnp.arange(4.0))
  for tokens, k in ((6, 4), (1, 3), (0, 2)):  # k = E; c = 0; no token.
    scores = rules.skewed_scores(6, 4)[:tokens]
    choice = routing.choose(scores, state.q, k=k)
    seen = balancer.observe(state, state.q, scores, choice, k=k)
    np.testing.assert_array_equal(balancer.update(state, seen, k=k).q, state.q)


@pytest.mark.parametrize('ema', [0.0, 0.25])
def test_compiled_and_eager_prices_have_the_same_bits(ema):
  balancer = routing.quantile(ema=ema, estimator='histogram')

  def observe(q, scores, choice):
    return balancer.observe(routing.State(q), q, scores, choice, k=3)

  def update(q, seen):
    return balancer.update(routing.State(q), seen, k=3).q

  def whole(q, scores, choice):
    return update(q, observe(q, scores, choice))

  compiled = [jax.jit(f) for f in (observe, update, whole)]
  choose = jax.jit(functools.partial(routing.choose, k=3))
  for seed in range(4):
    scores = np.asarray(rules.skewed_scores(96, 12, seed))
    q = np.random.default_rng(seed).normal(size=12).astype(np.float32) / 9
    choice = choose(scores, q)
    seen = observe(q, scores, choice)
    jax.tree.map(
      np.testing.assert_array_equal, compiled[0](q, scores, choice), seen
    )
    expected = update(q, seen)
    np.testing.assert_array_equal(compiled[1](q, seen), expected)
    np.testing.assert_array_equal(compiled[2](q, scores, choice), expected)


@pytest.mark.parametrize('bins', [7, 1000])
def test_compiled_and_eager_histograms_give_the_same_prices(bins):
  """A span divided by a constant is a product in compiled programs only."""
  price = jax.jit(functools.partial(quantile._price, k=3))
  for seed in range(20):
    random = np.random.default_rng(seed)
    count = random.multinomial(96, np.ones(bins) / bins, size=12)
    count = count.astype(np.int32)
    q = random.normal(size=12).astype(np.float32) / 9
    np.testing.assert_array_equal(
      price(count, q), quantile._price(count, q, 3), err_msg=str(seed)
    )
