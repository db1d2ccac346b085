"""Measures of balance, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing


def test_violations_by_hand():
  load = jnp.array([[8, 4, 4, 0], [4, 4, 4, 4], [0, 0, 0, 0]])
  np.testing.assert_array_equal(routing.max_violation(load), [1, 0, 0])
  np.testing.assert_array_equal(routing.min_violation(load), [-1, 0, 0])


def test_violation_of_a_load_that_leaves_dropped_tokens_out():
  # 20 choices of 4 experts are 5 each; 4 of them were dropped.
  load = jnp.array([6, 5, 3, 2])
  assert routing.max_violation(load, total=20) == pytest.approx(0.2)
  assert routing.min_violation(load, total=20) == pytest.approx(-0.6)
