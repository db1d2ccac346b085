"""Causal prices: by hand, causal, the same in parts, and more even."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.routing import causal

BATCH, LENGTH, EXPERTS, K = 4, 128, 8, 2


def test_prices_by_hand():
  """Two experts, k = 1; a load of twice the even one costs 4 t / (t + 20)."""
  experts = jnp.array([[[0], [0], [1], [0]]])
  q, counts = causal.causal_prices(experts, jnp.array([1.0, 0.0]), strength=4.0)
  # Excess over even loads, E load - k t: 0 0 | 1 -1 | 2 -2 | 1 -1.
  rise = 4 * np.array([0 / 20, 1 / 21, 2 / 22, 1 / 23])
  np.testing.assert_allclose(q[0], np.stack([1 + rise, -rise], 1), rtol=1e-6)
  np.testing.assert_array_equal(counts.load, [[3, 1]])
  np.testing.assert_array_equal(counts.tokens, [4])


def test_even_loads_and_no_strength_leave_q():
  experts = jnp.tile(jnp.array([[0, 1], [2, 3]]), (6, 1))[None]
  q = jnp.array([0.1, -0.2, 0.3, 0.7])
  prices, _ = causal.causal_prices(experts, q, strength=1.0)
  # Before each pair of tokens.
  np.testing.assert_array_equal(prices[0, ::2], np.tile(q, (6, 1)))
  prices, _ = causal.causal_prices(experts, q, strength=0.0)
  np.testing.assert_array_equal(prices[0], np.tile(q, (12, 1)))


@pytest.fixture(scope='module')
def sequences():
  """Scores, of which each sequence prefers some; their experts; a mask."""
  random = np.random.default_rng(0)
  logits = random.normal(size=(BATCH, LENGTH, EXPERTS))
  logits += random.normal(size=(BATCH, 1, EXPERTS))
  scores = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
  q = routing.dual_iterations(
    scores.reshape(-1, EXPERTS), jnp.zeros(EXPERTS), k=K, iterations=8
  )
  choice = routing.choose(scores.reshape(-1, EXPERTS), q, k=K)
  experts = choice.experts.reshape(BATCH, LENGTH, K)
  return scores, q, experts, random.random((BATCH, LENGTH)) < 0.8


@functools.cache
def _prices():
  return jax.jit(functools.partial(causal.causal_prices, strength=0.05))


def test_later_tokens_change_no_price(sequences):
  _, q, experts, _ = sequences
  prices, _ = _prices()(experts, q)
  for t in (0, 1, 50):
    other, _ = _prices()(experts.at[:, t:].set(jnp.array([6, 7])), q)
    np.testing.assert_array_equal(other[:, : t + 1], prices[:, : t + 1])
    assert np.any(other[:, t + 1 :] != prices[:, t + 1 :])


def test_parts_and_single_tokens_have_the_same_bits(sequences):
  _, q, experts, mask = sequences
  prices, counts = _prices()(experts, q, mask_BxS=mask)
  for size in (1, 32):
    seen, parts = None, []
    for t in range(0, 64, size):
      part = slice(t, t + size)
      price, seen = _prices()(
        experts[:, part], q, mask_BxS=mask[:, part], before=seen
      )
      parts.append(price)
    np.testing.assert_array_equal(np.concatenate(parts, 1), prices[:, :64])
  rest, seen = _prices()(experts[:, 64:], q, mask_BxS=mask[:, 64:], before=seen)
  np.testing.assert_array_equal(rest, prices[:, 64:])
  jax.tree.map(np.testing.assert_array_equal, seen, counts)


@pytest.mark.long
def test_padding_is_not_counted(sequences):
  _, q, experts, mask = sequences
  prices, counts = _prices()(experts, q, mask_BxS=mask)
  for b in range(BATCH):
    left = np.flatnonzero(mask[b])
    expected, alone = causal.causal_prices(
      experts[b : b + 1, left], q, strength=0.05
    )
    np.testing.assert_array_equal(prices[b, left], expected[0])
    np.testing.assert_array_equal(counts.load[b], alone.load[0])


def test_sequences_are_more_even_for_little_score(sequences):
  scores, q, experts, _ = sequences

  def measured(adjusted):
    experts = jax.lax.top_k(adjusted, K)[1]
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    load = jnp.sum(jax.nn.one_hot(experts, EXPERTS), axis=(1, 2))
    return np.mean(routing.max_violation(load)), float(jnp.sum(gates))

  even, score = measured(scores - q)
  prices, _ = _prices()(experts, q)
  more_even, less_score = measured(scores - prices)
  assert more_even < 0.9 * even
  assert 0.97 * score < less_score < score


def test_no_token_and_bad_input():
  q, counts = causal.causal_prices(
    jnp.zeros((3, 0, 2), int), jnp.zeros(4), strength=1.0
  )
  assert q.shape == (3, 0, 4)
  np.testing.assert_array_equal(counts.load, np.zeros((3, 4)))
  with pytest.raises(ValueError, match=r'strength=-1\.0: must be 0 or more'):
    causal.causal_prices(jnp.zeros((3, 1, 2), int), jnp.zeros(4), strength=-1.0)
