"""Loss-Free Balancing against values worked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from tests.routing.rules import SCORES


def test_loss_free_by_hand():
  balancer = routing.loss_free(0.25)
  choice = routing.choose(SCORES, jnp.zeros(3), k=1)
  np.testing.assert_array_equal(choice.load, [3, 1, 0])
  state = balancer.init(3)
  q, solved = balancer.solve(state, SCORES, k=1)
  np.testing.assert_array_equal((q, solved.q), np.zeros((2, 3)))
  seen = balancer.observe(state, q, SCORES, choice, k=1)
  # Mean load 4/3: above, below, below.
  state = balancer.update(state, seen, k=1)
  np.testing.assert_array_equal(state.q, [0.25, -0.25, -0.25])
  state = balancer.update(state, jnp.array([0, 6, 3]), k=1)
  np.testing.assert_array_equal(state.q, [0.0, 0.0, -0.25])


@pytest.mark.long
def test_loss_free_moves_once_a_step_from_summed_loads(scores):
  balancer = routing.loss_free(1e-2)

  def step(state, microbatches):
    seen = routing.zero_observation(balancer, 8, 2)
    for batch in microbatches:
      q, state = balancer.solve(state, batch, k=2)
      choice = routing.choose(batch, q, k=2)
      seen += balancer.observe(state, q, batch, choice, k=2)
    return balancer.update(state, seen, k=2)

  # A split into microbatches with unlike loads.
  order = jnp.argsort(scores[:, 3])
  states = [balancer.init(8)] * 2
  for _ in range(3):
    states = [
      step(states[0], [scores]),
      step(states[1], [scores[order[:32]], scores[order[32:]]]),
    ]
  np.testing.assert_array_equal(states[0].q, states[1].q)
  assert states[0].q[3] == pytest.approx(3e-2)


def test_loss_free_takes_the_sign_of_any_load():
  """Loads whose product with the number of experts is beyond int32."""
  load = jnp.full(64, 2**24).at[5].set(2**26)
  state = routing.loss_free(1.0).update(routing.State(jnp.zeros(64)), load, k=1)
  np.testing.assert_array_equal(state.q, 2 * np.eye(64)[5] - 1)
  # One token more or less than even is enough; even itself stays.
  load = jnp.full(64, 2**24).at[:2].add(jnp.array([1, -1]))
  state = routing.loss_free(1.0).update(routing.State(jnp.zeros(64)), load, k=1)
  np.testing.assert_array_equal(state.q, np.eye(64)[0] - np.eye(64)[1])
