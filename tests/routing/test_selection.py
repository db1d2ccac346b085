"""The choice of experts, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from tests.routing.rules import SCORES


def test_choose_by_hand():
  choice = routing.choose(SCORES, jnp.array([0.15, 0.0, 0.0]), k=2)
  # Token 1 ties at 0.35 < 0.4, token 3 turns to experts 1 and 2.
  np.testing.assert_array_equal(
    choice.experts, [[0, 1], [1, 0], [1, 2], [1, 2]]
  )
  np.testing.assert_array_equal(
    choice.gates,
    np.array([[0.6, 0.3], [0.4, 0.5], [0.7, 0.1], [0.3, 0.3]], np.float32),
  )
  np.testing.assert_array_equal(choice.load, [2, 4, 2])
  assert choice.experts.dtype == choice.load.dtype == jnp.int32


def test_ties_go_to_the_lower_index():
  choice = routing.choose(jnp.full((5, 8), 0.125), jnp.zeros(8), k=3)
  np.testing.assert_array_equal(choice.experts, [[0, 1, 2]] * 5)
  scores = jnp.array([[0.0, 0.5, -0.0, 0.5]])
  choice = routing.choose(scores, jnp.zeros(4), k=3)
  np.testing.assert_array_equal(choice.experts, [[1, 3, 0]])


def test_choose_ignores_masked_rows_whatever_they_hold():
  rows = np.concatenate([SCORES, np.full((2, 3), np.nan, np.float32)])
  rows[5] = [np.inf, -np.inf, np.nan]
  rows = rows[[4, 0, 1, 5, 2, 3]]
  mask = jnp.array([False, True, True, False, True, True])
  choice = routing.choose(rows, jnp.zeros(3), k=2, mask_T=mask)
  alone = routing.choose(SCORES, jnp.zeros(3), k=2)
  np.testing.assert_array_equal(choice.load, alone.load)
  np.testing.assert_array_equal(choice.experts[mask], alone.experts)
  np.testing.assert_array_equal(choice.gates[mask], alone.gates)
  np.testing.assert_array_equal(choice.gates[~mask], 0)


def test_gradient_flows_through_gates_only():
  mask = jnp.array([True, True, False, True])

  def weighted(scores, q):
    gates = routing.choose(scores, q, k=1, mask_T=mask).gates
    return jnp.sum(gates[:, 0] * jnp.array([1.0, 2, 4, 8]))

  scores = jnp.asarray(SCORES).at[2].set(jnp.nan)
  for_scores, for_q = jax.grad(weighted, argnums=(0, 1))(
    scores, jnp.array([0.2, 0.0, 0.0])
  )
  np.testing.assert_array_equal(
    for_scores, [[1, 0, 0], [0, 2, 0], [0, 0, 0], [0, 8, 0]]
  )
  np.testing.assert_array_equal(for_q, 0)


@pytest.mark.parametrize('k', [0, 4, -1])
def test_choose_refuses_k(k):
  with pytest.raises(ValueError, match=rf'k={k}\b.*\b3$'):
    routing.choose(SCORES, jnp.zeros(3), k=k)
  with pytest.raises(ValueError, match=rf'k={k}\b.*\b3$'):
    routing.dual_iterations(SCORES, jnp.zeros(3), k=k, iterations=1)


def test_nan_scores_are_chosen_last():
  scores = jnp.array([[0.5, jnp.nan, 0.1], [jnp.nan, 0.2, jnp.nan]])
  choice = routing.choose(scores, jnp.zeros(3), k=2)
  np.testing.assert_array_equal(choice.experts, [[0, 2], [1, 0]])
