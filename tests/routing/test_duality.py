"""The benchmark of duality gaps: its rules are ours, its auction is right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import duality
from moe_jax import routing
from tests.routing import rules

SCORES = np.asarray(rules.skewed_scores(96, 8, 5))


@pytest.mark.parametrize('rule', duality.RULES)
def test_iterations_in_numpy_have_the_bits_of_ours(rule):
  options = duality.RULES[rule]
  solve = jax.jit(
    functools.partial(routing.dual_iterations, k=3, iterations=1, **options)
  )
  q = np.zeros(8, np.float32)
  for _ in range(3):
    expected = np.asarray(solve(SCORES, q))
    q = duality.iterate(SCORES, q, 3, **options)
    np.testing.assert_array_equal(q, expected)


def test_a_cycle_is_found():
  """A rule that turns three prices round, from the second iteration on."""
  turned = [np.float32([1, 2, 3]), np.float32([3, 1, 2]), np.float32([2, 3, 1])]
  states = iter([np.float32([9, 9, 9]), *(turned * 3)])
  original, duality.iterate = duality.iterate, lambda *_, **__: next(states)
  try:
    path = duality.follow(np.zeros((4, 3), np.float32), 1, 10)
  finally:
    duality.iterate = original
  assert (path.period, path.since) == (3, 2)
  for t in range(2, 11):
    np.testing.assert_array_equal(path.after(t), turned[(t - 2) % 3])
  np.testing.assert_array_equal(path.after(1), [9, 9, 9])


@pytest.mark.parametrize('tokens', [96, 93])  # 93 x 3 / 8 is not whole.
def test_auction_is_feasible_and_near_the_optimum(tokens):
  scores, k = SCORES[:tokens], 3
  sold = duality.auction(scores, k)
  assert np.all(sold.assignment.sum(axis=1) == k)
  assert np.max(sold.assignment.sum(axis=0)) <= -(-tokens * k // 8)
  best = routing.lp_optimum(scores, k, rows_equal=True).value
  value = scores[sold.assignment].sum(dtype=np.float64)
  epsilon = duality.SCALES[-1] * scores.max()
  assert best - (tokens + 1) * 8 * epsilon <= value <= best + 1e-6
  # Its prices prove it.
  bound = routing.optimality(scores, sold.q, k).rows_equal_dual_value
  assert bound <= best + (tokens + 1) * 8 * epsilon


def test_competing_experts_are_those_of_the_choice():
  q = np.linspace(0, 0.1, 8, dtype=np.float32)
  marked = duality.competing(SCORES, q, 4, 2)
  limits = {'groups': 4, 'groups_per_token': 2}
  choice = routing.choose(SCORES, jnp.asarray(q), k=3, **limits)
  expected = routing.choose(
    np.where(marked, SCORES, np.float32(-np.inf)), jnp.asarray(q), k=3
  )
  np.testing.assert_array_equal(choice.experts, expected.experts)


@pytest.mark.long
def test_midpoint_neither_cycles_nor_stays_far_from_the_optimum():
  """To T = 1,000, on the golden instances and a fresh one of each skew."""
  found = duality.instances([(512, 16, 4)], seeds=1)
  assert len(found) == 7 + len(duality.SKEWS)
  for name, instance in found.items():
    (row,) = (
      row
      for row in duality.measure(name, instance, 1000)
      if row['rule'] == 'midpoint'
    )
    assert row['period'] <= 1, row
    assert row['gap_1000'] < 0.01, row
