"""From logits to scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing

LOGITS = np.array([-200, -90, -30, -20.5, -19.5, -1, 0, 1, 30, 200], np.float32)
EXACT = {
  'softmax': lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum(),
  'sigmoid': lambda z: np.where(z < 0, np.exp(z), 1) / (1 + np.exp(-np.abs(z))),
  'sqrt_softplus': lambda z: np.sqrt(np.logaddexp(0, z)),
}


@pytest.mark.parametrize('name', routing.SCORINGS)
def test_scores_and_slopes_are_exact_and_finite(name):
  scoring, exact = routing.SCORINGS[name], EXACT[name]
  z = np.float64(LOGITS)
  np.testing.assert_allclose(scoring(LOGITS), exact(z), rtol=1e-5, atol=1e-38)
  slope = jax.jacobian(scoring)(jnp.asarray(LOGITS))
  h = 1e-4 * np.eye(len(z))
  expected = np.stack(
    [(exact(z + step) - exact(z - step)) / 2e-4 for step in h], axis=1
  )
  np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-8)


def test_every_scoring_is_in_the_table():
  assert set(routing.SCORINGS) == set(EXACT)
