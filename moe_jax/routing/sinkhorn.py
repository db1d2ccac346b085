"""Sinkhorn balancing: prices of the assignment program with entropy added."""

import math

import jax
from jax import lax
import jax.numpy as jnp

from . import balancer as base
from .order_statistic import total
from .selection import check_k


def sinkhorn(
  iterations: int = 8, *, temperature: float = 0.02
) -> base.Balancer:
  """Builds Sinkhorn balancing: q solved on each batch, by soft maxima.

  Where `bip` takes order statistics, each iteration takes soft ones that make
  the soft assignment x_ij = exp((s_ij - p_i - q_j) / temperature) have rows
  that sum to k and columns that sum to n k / E:

      p_i = temperature (logsumexp over experts of (s_ij - q_j) / temperature
                         - log k)
      q_j = temperature (logsumexp over tokens of (s_ij - p_i) / temperature
                         - log(n k / E))

  q starts from that of the batch before. Nothing bounds x_ij by 1, so for k > 1
  the choice can be less even than x, and even less than plain top-k. The sums
  are floats, so q may differ in the last bits from one topology to another.

  Args:
    iterations: of both sums, a batch.
    temperature: in units of the score; the nearer to 0, the nearer the soft
      assignment is to the hard one, and the slower the iteration.

  References:
    Clark et al., arXiv 2202.01169, section 2.1 and appendix B (S-BASE).
  """
  base.check_at_least(0, iterations=iterations)
  if not temperature > 0:
    raise ValueError(f'temperature={temperature}: must be greater than 0')

  return base.Balancer(
    solve=base.bound(_solve, iterations=iterations, temperature=temperature)
  )


def _solve(
  state,
  scores_TxE,
  *,
  k,
  iterations,
  temperature,
  mask_T=None,
  axis_name=None,
):
  experts = scores_TxE.shape[-1]
  check_k(k, experts)
  if k == experts or not len(scores_TxE):
    return state.q, state
  scores_TxE = lax.stop_gradient(scores_TxE.astype(jnp.float32))
  n = base.count_tokens(scores_TxE, mask_T, axis_name)
  share = jnp.log(jnp.maximum(n, 1) * (k / experts))
  valid_T = jnp.ones(len(scores_TxE), bool) if mask_T is None else mask_T

  def iterate(_, q_E):
    row_T = jax.nn.logsumexp((scores_TxE - q_E) / temperature, axis=1)
    p_T = temperature * (row_T - math.log(k))
    column_E = _logsumexp_of_tokens(
      (scores_TxE - p_T[:, None]) / temperature,
      valid_T & jnp.isfinite(p_T),  # No NaN, and not all -inf.
      axis_name,
    )
    # No price can attract tokens that score -inf.
    return jnp.where(
      jnp.isfinite(column_E), temperature * (column_E - share), q_E
    )

  q_E = lax.fori_loop(0, iterations, iterate, lax.stop_gradient(state.q))
  q_E = jnp.where(n > 0, q_E, state.q)
  q_E = base.centred(q_E, unless=state.q)
  return q_E, base.State(q_E)


def _logsumexp_of_tokens(x_TxE, valid_T, axis_name):
  x_TxE = jnp.where(valid_T[:, None], x_TxE, -jnp.inf)
  top_E = jnp.max(x_TxE, axis=0)
  if axis_name is not None:
    top_E = lax.pmax(top_E, axis_name)
  top_E = jnp.where(jnp.isfinite(top_E), top_E, 0.0)
  sum_E = total(jnp.sum(jnp.exp(x_TxE - top_E), axis=0), axis_name)
  return top_E + jnp.log(sum_E)
