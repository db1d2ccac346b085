"""The protocol: what the parts of a rule take, return and refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from tests.routing.rules import SCORES


@pytest.mark.parametrize(
  ('build', 'words'),
  [
    (lambda: routing.bip(-1), ['iterations=-1', '0 or more']),
    (lambda: routing.bip(cutoff='mid'), ["cutoff='mid'", 'next', 'midpoint']),
    (lambda: routing.loss_free(-0.5), ['rate=-0.5', '0 or more']),
    (lambda: routing.loss_controlled(-1.0), ['alpha=-1.0', '0 or more']),
    (
      lambda: routing.loss_controlled(over='token'),
      ["over='token'", 'sequence', 'batch'],
    ),
    (
      lambda: routing.auxiliary_loss(0.1, over='token'),
      ["over='token'", 'sequence', 'batch'],
    ),
    (
      lambda: routing.dual_iterations(
        SCORES, jnp.zeros(3), k=1, iterations=1, cutoff='mid'
      ),
      ["cutoff='mid'", 'next', 'midpoint'],
    ),
  ],
)
def test_errors_name_option_value_and_what_would_work(build, words):
  with pytest.raises(ValueError) as error:
    build()
  assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
  'balancer',
  [
    routing.unbalanced(),
    routing.bip(2),
    routing.loss_free(),
    routing.loss_controlled(),
  ],
  ids=['unbalanced', 'bip', 'loss_free', 'loss_controlled'],
)
def test_protocol(balancer, scores):
  """A state with q, observations of one shape that add up, a scalar loss."""
  state = balancer.init(8)
  assert state.q.shape == (8,) and state.q.dtype == jnp.float32
  q, solved = balancer.solve(state, scores, k=2)
  choice = routing.choose(scores, q, k=2)
  seen = balancer.observe(solved, q, scores, choice, k=2)
  nothing = routing.zero_observation(balancer, 8, 2)
  total = jax.tree.map(jnp.add, nothing, seen)
  jax.tree.map(np.testing.assert_array_equal, total, seen)
  moved = balancer.update(solved, total, k=2)
  for new in (solved, moved):
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert new.q.dtype == jnp.float32
  scores_BxSxE = scores.reshape(4, 64, 8)
  loss = balancer.loss(
    routing.LossInputs(
      jnp.log(scores_BxSxE),
      scores_BxSxE,
      choice,
      None,
      jnp.eye(8),
      choice.load,
      2,
    )
  )
  assert loss.shape == () and loss.dtype == jnp.float32


def test_unbalanced_is_plain_top_k(scores):
  balancer = routing.unbalanced()
  q, state = balancer.solve(balancer.init(8), scores, k=2)
  state = balancer.update(state, (), k=2)
  np.testing.assert_array_equal((q, state.q), np.zeros((2, 8)))
  choice = routing.choose(scores, q, k=2)
  np.testing.assert_array_equal(choice.gates, -np.sort(-scores)[:, :2])
