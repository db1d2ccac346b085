"""The price of dynamic activation: a quantile of each expert's scores alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import balancer as base
from .order_statistic import kth_largest
from .selection import check_k, rankable


class ThresholdState(NamedTuple):
  """The prices now in use and those of the next step.

  Attributes:
    q: float32 [E], prices this step's choices.
    pending: float32 [E], moved by each batch of the step.
    known: int32 scalar, 1 once a batch was seen.
  """

  q: jax.Array
  pending: jax.Array
  known: jax.Array


def threshold(*, ema: float = 0.0, lag: bool = True) -> base.Balancer:
  """Builds the rule whose price admits n k / E of n tokens to each expert.

      q_j = (c+1)-th largest over tokens of s_ij,    c = floor(n k / E)

  It belongs to the selection `choose_above`, where a token takes every expert
  whose price its score exceeds: k on average. There is no cutoff of the token,
  hence nothing to iterate.

  Args:
    ema: how much of the old q is kept by each batch, from 0 to below 1; the
      first one keeps nothing.
    lag: whether a step's choices use the q of the step before, so that no route
      depends on later tokens. Then the first step has no prices: every token
      takes as many experts as it may.

  References:
    Su, kexue.fm/archives/11626 (2026); Expert Threshold, arXiv 2603.11535.
  """
  base.check_fraction(ema=ema)
  return base.Balancer(
    init=_init,
    solve=base.bound(_solve, ema=ema, lag=lag),
    update=_update if lag else base.keep_state,
  )


def _init(experts):
  q_E, pending_E = (jnp.zeros(experts, jnp.float32) for _ in range(2))
  return ThresholdState(q_E, pending_E, jnp.int32(0))


def _solve(state, scores_TxE, *, k, ema, lag, mask_T=None, axis_name=None):
  experts = scores_TxE.shape[-1]
  check_k(k, experts)
  n = base.count_tokens(scores_TxE, mask_T, axis_name)
  capacity = jnp.asarray(base.even_share(n, k, experts))
  found_E = kth_largest(
    rankable(scores_TxE),
    capacity + 1,
    axis=0,
    where=None if mask_T is None else mask_T[:, None],
    axis_name=axis_name,
  )
  mixed_E = base.rounded(ema * state.pending) + base.rounded(
    (1 - ema) * found_E
  )
  mixed_E = jnp.where(state.known > 0, mixed_E, found_E)
  # Scores of -inf, or k = E, can leave fewer than c + 1 takers.
  moves_E = jnp.isfinite(found_E) & (capacity > 0)
  pending_E = jnp.where(moves_E, mixed_E, state.pending)
  known = jnp.maximum(state.known, (capacity > 0).astype(jnp.int32))
  # A copy: outside of compiled code, two leaves would share a buffer.
  q_E = state.q if lag else jnp.copy(pending_E)
  return q_E, ThresholdState(q_E, pending_E, known)


def _update(state, observation, *, k):
  # As in `_solve`.
  return state._replace(q=jnp.copy(state.pending))
