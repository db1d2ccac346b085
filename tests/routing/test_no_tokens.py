"""No token at all: shapes of 0, as of a shard or a stream without any."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from tests.routing import rules

NOTHING = jnp.zeros((0, 8))


@pytest.mark.parametrize('name', rules.RULES)
@pytest.mark.parametrize('mask', [None, jnp.zeros(0, bool)], ids=['', 'mask'])
def test_no_token_leaves_every_price(name, mask):
  balancer = rules.RULES[name]
  state = balancer.init(8)._replace(q=0.1 * jnp.arange(8.0))
  if hasattr(state, 'pending'):
    state = state._replace(pending=state.q + 0.0)
  after, q, choice = rules.step(balancer, state, NOTHING, k=3, mask_T=mask)
  np.testing.assert_array_equal(after.q, state.q)
  np.testing.assert_array_equal(q, state.q)
  assert choice.experts.shape == choice.gates.shape == (0, 3)
  np.testing.assert_array_equal(choice.load, np.zeros(8))


def test_rounding_gives_an_empty_choice():
  for capacity in (None, 5):
    choice = routing.round_to_capacity(
      NOTHING, jnp.zeros(8), k=3, capacity=capacity
    )
    assert choice.experts.shape == choice.gates.shape == (0, 3)
    np.testing.assert_array_equal(choice.load, np.zeros(8))


@pytest.mark.parametrize(
  'build', [routing.online_exact, routing.online_histogram]
)
def test_an_empty_stream_leaves_the_state(build):
  rule = build(16, k=3)
  choice, state = routing.assign_stream(rule, NOTHING)
  assert choice.experts.shape == choice.gates.shape == (0, 3)
  np.testing.assert_array_equal(choice.load, np.zeros(8))
  assert state.seen == 0 and not np.any(state.q)
