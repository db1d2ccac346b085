"""Dual iterations of the assignment program: BIP and the midpoint rule."""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from . import balancer as base
from .order_statistic import (
  kth_and_next_largest,
  kth_and_next_of_row,
  kth_largest,
)
from .selection import check_groups, check_k, competing, rankable

_CUTOFFS = ('next', 'midpoint', 'linear', 'kth')
_SCOPES = ('global', 'shard')


def dual_iterations(
  scores_TxE: jax.Array,
  q_E: jax.Array,
  *,
  k: int,
  iterations: int | jax.Array,
  clip: bool = True,
  cutoff: str = 'next',
  warm: bool = True,
  mask_T: jax.Array | None = None,
  groups: int = 1,
  groups_per_token: int = 1,
  axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
  """Improves q by alternating minimisation of the assignment dual.

  With n unmasked tokens and c = floor(n k / E), one iteration is

      p_i = max(0, (k+1)-th largest over experts of s_ij - q_j)
      q_j = max(0, (c+1)-th largest over tokens  of s_ij - p_i)

  With groups, an expert whose group does not compete for a token (`choose`)
  would have to bring it in before it is chosen. So p_i is the (k+1)-th largest
  of those that compete, and

      q_j = max(0, (c+1)-th largest over tokens of s_ij - max(p_i, b_ij))

  where b_ij is what s_ij - q_j must reach so that, with the best other of its
  group, it outdoes the best group that does not compete; -inf where the group
  competes without it. No dual value is known that this lowers. To solve as if
  only the competing experts existed is worse than to ignore the groups: prices
  move tokens to groups that were not looked at.

  q is returned as it came where a (k+1)-th or (c+1)-th largest does not exist
  (k = E) or nothing is to be shared out (n k < E, no token), and so is the
  price of an expert for which scores of -inf leave no finite cutoff.

  Args:
    scores_TxE: router scores [tokens, experts]; taken as float32 constants.
    q_E: prices so far, float32 [experts].
    k: experts per token.
    iterations: T >= 0; may be traced.
    clip: whether p and q are kept at or above 0.
    cutoff: which point is taken of the interval whose every point minimises the
      dual in that coordinate, from the (k+1)-th to the k-th largest of a row
      and from the (c+1)-th to the c-th largest of a column: 'next', the lower
      end, as the paper does; 'kth', the upper end; 'midpoint', the middle;
      'linear', k / E of the way up in a row and c / n in a column. 'linear' is
      the quantile at 1 - k / E and at 1 - c / n as `numpy.quantile`
      interpolates it, 'midpoint' as Hazen does.
    warm: whether iterations start from q_E, else from 0.
    mask_T: bool [tokens]; False excludes a token.
    groups: equal, consecutive parts of the experts.
    groups_per_token: groups whose experts compete for a token.
    axis_name: mesh axes over which tokens are split, inside `jax.shard_map`.

  Returns:
    float32 [experts].

  References:
    Sun, arXiv 2502.15451, Algorithm 1, lines 4-12; 'midpoint': see `midpoint`.
  """
  experts = scores_TxE.shape[-1]
  check_k(k, experts)
  check_groups(k, experts, groups, groups_per_token)
  base.check_known(_CUTOFFS, cutoff=cutoff)
  if isinstance(iterations, int):
    base.check_at_least(0, iterations=iterations)
  n = base.count_tokens(scores_TxE, mask_T, axis_name)
  capacity = base.even_share(n, k, experts)
  nothing = isinstance(capacity, int) and capacity == 0
  if k == experts or nothing or not len(scores_TxE):
    return q_E
  scores_TxE = rankable(scores_TxE)
  q_E = lax.stop_gradient(q_E)
  start_E = q_E if warm else jnp.zeros_like(q_E)
  if axis_name is None:
    # Changes no value, but in `jax.shard_map` the loop below must start from a
    # q that varies over shards if its result does, as in the scope 'shard'.
    start_E = jnp.where(scores_TxE[0] > 0, start_E, start_E)
  where = None if mask_T is None else mask_T[:, None]
  limits = {}
  if groups_per_token < groups:
    limits = {'groups': groups, 'groups_per_token': groups_per_token}

  def clipped(cut):
    return jnp.maximum(cut, 0.0) if clip else cut

  def iterate(_, q_E):
    limited_TxE = scores_TxE
    if limits:
      may_TxE = competing(scores_TxE, q_E, **limits)
      limited_TxE = jnp.where(may_TxE, scores_TxE, -jnp.inf)
    ends_Tx2 = kth_and_next_of_row(limited_TxE, k, minus_E=q_E)
    p_Tx_ = _cut(*ends_Tx2, cutoff, k / experts)[:, None]
    if limits:
      p_Tx_ = jnp.maximum(
        p_Tx_, _to_compete(scores_TxE - q_E, cutoff, **limits)
      )
    adjusted = scores_TxE - clipped(p_Tx_)
    over = {'axis': 0, 'where': where, 'axis_name': axis_name}
    if cutoff in ('next', 'kth'):  # One end is enough.
      rank = capacity + (cutoff == 'next')
      new_E = kth_largest(adjusted, rank, **over)
    else:
      ends_Ex2 = kth_and_next_largest(adjusted, capacity, **over)
      new_E = _cut(*ends_Ex2, cutoff, capacity / jnp.maximum(n, 1))
    new_E = clipped(new_E)
    # Scores of -inf can leave an expert with fewer than c + 1 takers.
    return jnp.where(jnp.isfinite(new_E), new_E, q_E)

  solved_E = lax.fori_loop(0, iterations, iterate, start_E)
  return jnp.where(capacity > 0, solved_E, q_E)


def _cut(kth, following, cutoff: str, way: float | jax.Array) -> jax.Array:
  """Returns a point from `following` up to `kth`; 'linear' goes `way` of it."""
  if cutoff == 'next':
    return following
  if cutoff == 'kth':
    return kth
  if cutoff == 'midpoint':
    return (kth + following) * 0.5
  # Where `following` is -inf, so is the point.
  length = jnp.where(following > -jnp.inf, kth - following, 0.0)
  return following + base.rounded(length * way)


def _to_compete(adjusted_TxE, cutoff, *, groups, groups_per_token):
  """Returns the s - q with which an expert brings its group in.

  -inf where the group competes without it.
  """
  tokens, experts = adjusted_TxE.shape
  adjusted_TxGxP = adjusted_TxE.reshape(tokens, groups, -1)
  size = experts // groups
  best, _ = lax.top_k(adjusted_TxGxP, min(3, size))
  first = best[..., :1]
  # A group of one scores by that one; a group of two has no third.
  second = best[..., 1:2] if size > 1 else jnp.zeros_like(first)
  third = best[..., 2:3] if size > 2 else jnp.full_like(first, -jnp.inf)
  score_TxG = (first + second)[..., 0]
  sorted_Tx_, _ = lax.top_k(score_TxG, groups_per_token + 1)
  enough_T = _cut(
    sorted_Tx_[:, -2], sorted_Tx_[:, -1], cutoff, groups_per_token / groups
  )
  # The two best of the others in the group.
  is_first = adjusted_TxGxP >= first
  other = jnp.where(is_first, second, first)
  next_other = jnp.where(is_first | (adjusted_TxGxP >= second), third, second)
  enough = enough_T[:, None, None]
  least = jnp.where(other + next_other >= enough, -jnp.inf, enough - other)
  return least.reshape(tokens, experts)


class LaggedState(NamedTuple):
  """The prices now in use and the prices of the next step.

  Attributes:
    q: float32 [E], prices this step's choices.
    pending: float32 [E], improved by each batch of the step.
  """

  q: jax.Array
  pending: jax.Array


def bip(
  iterations: int = 4,
  *,
  clip: bool = True,
  cutoff: str = 'next',
  warm: bool = True,
  lag: bool = False,
  scope: str = 'global',
) -> base.Balancer:
  """Builds BIP-Based Balancing: q solved on each batch before its choice.

  q starts at 0, is kept from batch to batch and improved by `iterations` dual
  iterations on the scores about to be routed. Such a q has seen the whole
  batch, later tokens included; evaluation keeps it frozen.

  The options are the differences between BIP and Quantile Balancing, one by
  one: `bip(1, clip=False, lag=True)` is `quantile()`.

  Args:
    iterations: T, dual iterations a batch; the paper uses 2, 4, 8 and 14.
    clip: whether prices are kept at or above 0. Without it, a constant added to
      all prices changes no choice: nor the dual, where E divides n k; elsewhere
      the dual falls without end as prices rise. So q is centred after each
      solve.
    cutoff: which of the prices that minimise the dual in one coordinate is
      taken: 'next', the least, as in the paper; 'midpoint', the middle;
      'linear', interpolated at the quantile; 'kth', the greatest. See
      `dual_iterations`.
    warm: whether a solve starts from the q of the one before, as in the paper,
      else from 0.
    lag: whether a step's choices use the q that the step before ended with.
      Then no token's route depends on later tokens of its own batch.
    scope: 'global' solves for all tokens of all shards together; 'shard' lets
      each shard solve for its own, without communication, from the mean q of
      the step before.

  References:
    Sun, arXiv 2502.15451, Algorithm 1.
  """
  base.check_at_least(0, iterations=iterations)
  base.check_known(_CUTOFFS, cutoff=cutoff)
  base.check_known(_SCOPES, scope=scope)
  improve = base.bound(
    _improve, iterations=iterations, clip=clip, cutoff=cutoff, warm=warm
  )
  if scope == 'shard':
    return base.Balancer(
      solve=base.bound(_solve_shard, improve, lag),
      observe=base.bound(_observe_shard, improve, lag),
      update=_update_shard,
      per_shard=True,
      knows_groups=not lag,  # Then `observe` solves.
    )
  if lag:
    return base.Balancer(
      init=_init_lagged,
      solve=base.bound(_solve_lagged, improve),
      update=_update_lagged,
      knows_groups=True,
    )
  return base.Balancer(
    solve=base.bound(_solve_chained, improve), knows_groups=True
  )


def _improve(q_E, scores_TxE, *, clip, **given):
  """Runs `dual_iterations` with what is given of its arguments."""
  solved_E = dual_iterations(scores_TxE, q_E, clip=clip, **given)
  return solved_E if clip else base.centred(solved_E, unless=q_E)


# One q for all tokens, handed on from microbatch to microbatch.


def _solve_chained(improve, state, scores_TxE, **given):
  q_E = improve(state.q, scores_TxE, **given)
  return q_E, base.State(q_E)


# The q of the step before, while the next one is solved for.


def _init_lagged(experts):
  return LaggedState(*(jnp.zeros(experts, jnp.float32) for _ in range(2)))


def _solve_lagged(improve, state, scores_TxE, **given):
  pending_E = improve(state.pending, scores_TxE, **given)
  return state.q, LaggedState(state.q, pending_E)


def _update_lagged(state, observation, *, k):
  # A copy: outside of compiled code, two leaves would share a buffer.
  return LaggedState(jnp.copy(state.pending), state.pending)


# A q for each shard and microbatch; the state moves to their mean.


def _solve_shard(improve, lag, state, scores_TxE, *, axis_name=None, **given):
  if lag:
    return state.q, state
  return improve(state.q, scores_TxE, **given), state


def _observe_shard(
  improve,
  lag,
  state,
  q_E,
  scores_TxE,
  choice,
  *,
  k,
  mask_T=None,
  axis_name=None,
):
  if lag:
    q_E = improve(state.q, scores_TxE, k=k, mask_T=mask_T)
  return base.observe_prices(q_E, choice, axis_name)


def _update_shard(state, observation, *, k):
  return base.State(base.mean_price(observation, otherwise=state.q))


def midpoint(
  iterations: int = 4, *, lag: bool = False, scope: str = 'global'
) -> base.Balancer:
  """Builds the midpoint rule: `bip` unclipped, cut in the middle.

  Any point between the k-th and the (k+1)-th largest minimises the dual. The
  paper takes one end and can stay stuck at a kink there; the middle moves on.
  Without the clip, idle experts can be given a negative price.

  This is relative-interior coordinate descent, first applied to MoE routing as
  far as we know; its parts are known. Werner and Prusa show that coordinate
  descent on such duals should choose from the relative interior of the set of
  minimisers, as ends can stall where the interior does not. Voracek and Werner
  prove convergence of one such method and warn that a close variant can cycle.
  Su derives the interval, takes an end by convention and drops the clip.

  Args:
    iterations: T, dual iterations a batch.
    lag: whether a step's choices use the q of the step before.
    scope: 'global' or 'shard', as of `bip`.

  References:
    Werner and Prusa, arXiv 1910.09488; Voracek and Werner, arXiv 2403.07004;
    Su, kexue.fm/archives/11619 (2026).
  """
  return bip(iterations, clip=False, cutoff='midpoint', lag=lag, scope=scope)
