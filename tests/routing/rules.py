"""Every rule, for tests of what all of them must do; and one step of a rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing

_UNPRICED = routing.unbalanced()._replace(loss=None)

RULES = {
  'unbalanced': routing.unbalanced(),
  'loss_controlled': routing.loss_controlled(),
  'loss_free': routing.loss_free(0.01),
  'loss_free_proportional': routing.loss_free(
    0.01, rule='proportional', centre=True
  ),
  'bip': routing.bip(2),
  'bip_unclipped': routing.bip(2, clip=False),
  'bip_cold': routing.bip(2, warm=False),
  'bip_lag': routing.bip(2, lag=True),
  'bip_shard': routing.bip(2, scope='shard'),
  'midpoint': routing.midpoint(2),
  'midpoint_lag': routing.midpoint(2, lag=True),
  'midpoint_lag_shard': routing.midpoint(2, lag=True, scope='shard'),
  'quantile': routing.quantile(ema=0.25),
  'quantile_histogram': routing.quantile(ema=0.25, estimator='histogram'),
  'quantile_shard_mean': routing.quantile(ema=0.25, estimator='shard_mean'),
  'sinkhorn': routing.sinkhorn(2),
  'threshold': routing.threshold(ema=0.25),
}

# The quick suite tries one rule of each kind.
_QUICK = (
  'loss_free',
  'bip',
  'midpoint_lag',
  'quantile_histogram',
)

# Prices from sums of floats, whose last bits depend on the order of the terms.
BY_SUMS = ('sinkhorn',)

# Prices from loads, which ties make uneven and which know no c.
BY_LOADS = [
  name
  for name, rule in RULES.items()
  if rule.observe == routing.loss_free().observe
]

# q of these never moves.
UNPRICED = [
  name for name, rule in RULES.items() if rule._replace(loss=None) == _UNPRICED
]

# q of these is the same, bit for bit, however tokens are spread over devices.
BY_COUNTING = [
  name
  for name, rule in RULES.items()
  if name not in BY_SUMS and not rule.per_shard
]

# q of these moves once a step, however many microbatches it has.
BY_STEPS = [
  name
  for name in BY_COUNTING
  if name not in UNPRICED
  and RULES[name].additive
  and RULES[name].solve == _UNPRICED.solve
]


def each(names=RULES):
  """Tries the rules of these names; in the quick suite, one of each kind."""
  return pytest.mark.parametrize(
    'name',
    [
      name if name in _QUICK else pytest.param(name, marks=pytest.mark.long)
      for name in names
    ],
  )


# Four tokens, three experts, k = 1. Without q: 0, 0, 1, 0.
SCORES = np.array(
  [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.4, 0.3, 0.3]],
  np.float32,
)


def step(balancer, state, scores_TxE, *, k, mask_T=None, axis_name=None):
  """Solves, chooses, observes and updates, as an optimizer step does.

  Returns:
    The new state, the q that priced the choice, and the choice.
  """
  q_E, state = balancer.solve(
    state, scores_TxE, k=k, mask_T=mask_T, axis_name=axis_name
  )
  choice = routing.choose(scores_TxE, q_E, k=k, mask_T=mask_T)
  seen = balancer.observe(
    state, q_E, scores_TxE, choice, k=k, mask_T=mask_T, axis_name=axis_name
  )
  return balancer.update(state, seen, k=k), q_E, choice


@functools.cache
def jitted_step(name, k):
  return jax.jit(functools.partial(step, RULES[name], k=k))


def skewed_scores(tokens, experts, seed=0, skew=1.0, dtype=jnp.float32):
  """Softmax of Gaussian logits, some experts in greater demand."""
  of_token, of_expert = jax.random.split(jax.random.key(seed))
  logits = jax.random.normal(of_token, (tokens, experts))
  logits += skew * jax.random.normal(of_expert, (experts,))
  return jax.nn.softmax(logits).astype(dtype)
