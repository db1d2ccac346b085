"""Dual iterations of the assignment program: BIP-Based Balancing."""

import jax
from jax import lax
import jax.numpy as jnp

from moe_jax.routing import balancer as base
from moe_jax.routing.order_statistic import kth_and_next_largest
from moe_jax.routing.order_statistic import kth_and_next_of_row
from moe_jax.routing.order_statistic import kth_largest

_CUTOFFS = ('next', 'midpoint')


def dual_iterations(
  scores_TxE: jax.Array,
  q_E: jax.Array,
  *,
  k: int,
  iterations: int,
  clip: bool = True,
  cutoff: str = 'next',
  mask_T: jax.Array | None = None,
  axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
  """Improves q by alternating minimisation of the assignment dual.

  With n unmasked tokens and c = floor(n k / E), one iteration is

      p_i = max(0, (k+1)-th largest over experts of s_ij - q_j)
      q_j = max(0, (c+1)-th largest over tokens  of s_ij - p_i)

  Where a (k+1)-th or (c+1)-th largest does not exist (k = E) or nothing is to
  be shared out (n k < E, no token), q is returned as it came.

  Args:
    scores_TxE: router scores [tokens, experts]; taken as float32 constants.
    q_E: prices to start from, float32 [experts].
    k: experts per token.
    iterations: T >= 0.
    clip: whether p and q are kept at or above 0.
    cutoff: 'next' takes the (k+1)-th and (c+1)-th largest, as the paper does;
      'midpoint' the mean of these and the ones before them.
    mask_T: bool [tokens]; False leaves a token out.
    axis_name: mesh axes over which tokens are split, inside `jax.shard_map`.

  Returns:
    float32 [experts].

  References:
    Sun, arXiv 2502.15451, Algorithm 1, lines 4-12.
  """
  experts = scores_TxE.shape[-1]
  base.check_k(k, experts)
  if cutoff not in _CUTOFFS:
    raise ValueError(f'cutoff={cutoff!r}: must be one of {_CUTOFFS}')
  if k == experts:
    return q_E
  scores_TxE = base.rankable(scores_TxE)
  q_E = lax.stop_gradient(q_E)
  capacity = base.count_tokens(scores_TxE, mask_T, axis_name) * k // experts
  where = None if mask_T is None else mask_T[:, None]

  def between(before, after):
    cut = (before + after) * 0.5 if cutoff == 'midpoint' else after
    return jnp.maximum(cut, 0.0) if clip else cut

  def iterate(_, q_E):
    p_T = between(*kth_and_next_of_row(scores_TxE, k, minus_E=q_E))
    adjusted = scores_TxE - p_T[:, None]
    over = {'axis': 0, 'where': where, 'axis_name': axis_name}
    if cutoff == 'next':  # The one before is not needed.
      return between(None, kth_largest(adjusted, capacity + 1, **over))
    return between(*kth_and_next_largest(adjusted, capacity, **over))

  solved_E = lax.fori_loop(0, iterations, iterate, q_E)
  return jnp.where(capacity > 0, solved_E, q_E)


def bip(
  iterations: int = 4, *, clip: bool = True, cutoff: str = 'next'
) -> base.Balancer:
  """Builds BIP-Based Balancing: q solved on each batch before its choice.

  q starts at 0, is kept from batch to batch and improved by `iterations` dual
  iterations on the scores about to be routed. Such a q has seen the whole
  batch, later tokens included; evaluation keeps it frozen.

  Args:
    iterations: T, dual iterations a batch; the paper uses 2, 4, 8 and 14.
    clip: see `dual_iterations`. Without it the dual has a direction along
      which nothing changes, so q is centred after each solve.
    cutoff: see `dual_iterations`.

  References:
    Sun, arXiv 2502.15451, Algorithm 1.
  """
  if iterations < 0:
    raise ValueError(f'iterations={iterations}: must be 0 or more')
  if cutoff not in _CUTOFFS:
    raise ValueError(f'cutoff={cutoff!r}: must be one of {_CUTOFFS}')

  def solve(state, scores_TxE, *, k, mask_T=None, axis_name=None):
    q_E = dual_iterations(
      scores_TxE,
      state.q,
      k=k,
      iterations=iterations,
      clip=clip,
      cutoff=cutoff,
      mask_T=mask_T,
      axis_name=axis_name,
    )
    if not clip:
      q_E -= jnp.mean(q_E)
    return q_E, base.State(q_E)

  return base.Balancer(
    init=base.zero_prices,
    solve=solve,
    observe=base.observe_nothing,
    update=base.keep_state,
    loss=base.no_loss,
  )
