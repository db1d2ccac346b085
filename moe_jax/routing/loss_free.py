"""Loss-Free Balancing: a bias per expert that follows its overload."""

import jax.numpy as jnp

from . import balancer as base
from .order_statistic import total

_RULES = ('sign', 'proportional')


def loss_free(
  rate: float = 1e-3, *, rule: str = 'sign', centre: bool = False
) -> base.Balancer:
  """Builds Loss-Free Balancing: q_j += rate * sign(load_j - mean load).

  The load is that of the whole optimizer step, over all microbatches and
  shards, and q moves once a step.

  Args:
    rate: u, the change of q per step in units of the score.
    rule: 'sign', or 'proportional' for q_j += rate * (load_j / mean load - 1).
    centre: whether the mean of q is subtracted after each step; it changes no
      choice but keeps q from drifting.

  References:
    Wang et al., arXiv 2408.15664, Algorithm 1 (their bias is -q).
  """
  base.check_at_least(0, rate=rate)
  base.check_known(_RULES, rule=rule)

  update = base.bound(_update, rate=rate, rule=rule, centre=centre)
  return base.Balancer(observe=_observe, update=update)


def _observe(state, q_E, scores_TxE, choice, *, k, mask_T=None, axis_name=None):
  return total(choice.load, axis_name)


def _update(state, load_E, *, k, rate, rule, centre):
  # total / E, rounded down and up; the total may not fit into an int32.
  experts = load_E.shape[0]
  rest = jnp.sum(load_E % experts)
  least = jnp.sum(load_E // experts) + rest // experts
  most = least + (rest % experts > 0)
  if rule == 'sign':
    # Against the mean in integers: exact for any load.
    over_E = (load_E > least) - 1 * (load_E < most)
    move_E = rate * over_E
  else:
    # Not divided by the mean expert by expert: XLA may do that as a product
    # with its inverse, in some programs and not in others.
    mean = least + (rest % experts) / experts
    factor = rate / jnp.where(mean > 0, mean, 1.0)
    move_E = (load_E - mean) * factor
  q_E = state.q + base.rounded(move_E).astype(jnp.float32)
  return base.State(base.centred(q_E, unless=state.q) if centre else q_E)
