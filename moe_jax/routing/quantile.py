"""Quantile Balancing: the dual iteration without clips, for the next batch.

Shape letters: T tokens, E experts, N bins, R and C rows and columns of bins.
"""

import math

import jax
from jax import lax
import jax.numpy as jnp

from . import balancer as base
from .bip import dual_iterations
from .order_statistic import (
  histogram,
  kth_and_next_of_row,
  kth_largest,
  total,
)
from .selection import check_k, rankable

# For those that average, the rank of a part's quantile beyond its c.
_AVERAGED = {'shard_mean': 0, 'microbatch_mean': 1}
_ESTIMATORS = ('exact', 'histogram', *_AVERAGED)


def quantile(
  *, ema: float = 0.0, estimator: str = 'exact', bins: int = 1000
) -> base.Balancer:
  """Builds Quantile Balancing: one iteration a step, applied to the next step.

      p_i = (k+1)-th largest over experts of s_ij - q_j
      q_j = (c+1)-th largest over tokens  of s_ij - p_i,    c = floor(n k / E)

  and then q is centred. Choices use the q of the step before.

  Args:
    ema: how much of the old q is kept, from 0 to below 1.
    estimator: 'exact' selects the order statistic of all shards' tokens; it
      does not add up over microbatches, so a step must have one only.
      'histogram' counts margins in bins, integers that add up over shards and
      microbatches, and interpolates; its error is at most about a bin's
      width, (2 + max q - min q) / bins. It takes scores in [0, 1].
      'shard_mean' and 'microbatch_mean' are what others compute in place of
      the quantile, to measure what that costs: the mean over devices and
      microbatches of the quantile of each one's own tokens, their c-th and
      (c+1)-th largest.
    bins: of the histogram; the more, the smaller its error.

  A mean of quantiles depends on how tokens are split and is not the quantile of
  all of them. Every device with a token counts alike, however many it has; one
  with fewer choices than experts, c = 0, counts with the q that it has.

  References:
    Su, kexue.fm/archives/11619 (2026); the histogram: Kimi K3 report (2026),
    section 2.3.3 and appendices C and D, and pytorch/torchtitan#4577
    (September 2026). 'shard_mean': marin-community/marin, experiments/grug/moe
    (2026), a mean over devices in each forward pass; later versions weight it
    by tokens, or count a histogram. 'microbatch_mean': NVIDIA/Megatron-LM#5349
    (July 2026), `qb_dual_update` of a data-parallel rank's microbatch, averaged
    over microbatches and then over ranks; #6637 (August 2026) adds a histogram
    of the global batch.
  """
  base.check_fraction(ema=ema)
  base.check_known(_ESTIMATORS, estimator=estimator)
  base.check_at_least(2, bins=bins)

  if estimator == 'histogram':
    return base.Balancer(
      observe=base.bound(_observe_histogram, bins=bins),
      update=base.bound(_update_by_histogram, ema=ema),
      bounded_scores=True,
    )
  if estimator in _AVERAGED:
    return base.Balancer(
      observe=base.bound(_observe_own, beyond=_AVERAGED[estimator]),
      update=base.bound(_update_by_mean, ema=ema),
      per_shard=True,
    )
  return base.Balancer(
    observe=_observe_price,
    update=base.bound(_update_by_price, ema=ema),
    additive=False,
  )


def _observe_price(
  state, q_E, scores_TxE, choice, *, k, mask_T=None, axis_name=None
):
  q_E = dual_iterations(
    scores_TxE,
    q_E,
    k=k,
    iterations=1,
    clip=False,
    mask_T=mask_T,
    axis_name=axis_name,
  )
  # All shards hold the same q, which is their mean. Shards without a token
  # must not keep the others from it.
  prices = base.observe_prices(q_E, choice, None)
  if axis_name is None:
    return prices
  return prices._replace(total=q_E, count=lax.pmax(prices.count, axis_name))


def _update_by_price(state, prices, *, k, ema):
  # Known in a notebook; in compiled code the caller asks `additive`.
  known = not isinstance(prices.count, jax.core.Tracer)
  if known and int(prices.count) > 1:
    raise ValueError(
      f'{prices.count} observations in a step: a mean of quantiles is not '
      "the quantile; use estimator='histogram' with several microbatches"
    )
  q_E = base.mean_price(prices, otherwise=state.q)
  return _moved(state, q_E, ema)


def _observe_own(
  state, q_E, scores_TxE, choice, *, k, beyond, mask_T=None, axis_name=None
):
  own_E = _quantile_of_one(scores_TxE, q_E, k, mask_T, beyond)
  return base.observe_prices(own_E, choice, axis_name)


def _update_by_mean(state, prices, *, k, ema):
  return _moved(state, base.mean_price(prices, otherwise=state.q), ema)


def _quantile_of_one(scores_TxE, q_E, k: int, mask_T, beyond: int):
  """Selects the margin of rank c + beyond of one part's tokens; else q_E."""
  experts = scores_TxE.shape[-1]
  check_k(k, experts)
  if k == experts or not len(scores_TxE):
    return q_E
  scores_TxE, q_E = rankable(scores_TxE), lax.stop_gradient(q_E)
  n = base.count_tokens(scores_TxE, mask_T, None)
  capacity = jnp.int32(base.even_share(n, k, experts))
  _, p_T = kth_and_next_of_row(scores_TxE, k, minus_E=q_E)
  where = None if mask_T is None else mask_T[:, None]
  margin_TxE = scores_TxE - p_T[:, None]
  own_E = kth_largest(margin_TxE, capacity + beyond, axis=0, where=where)
  return jnp.where((capacity > 0) & jnp.isfinite(own_E), own_E, q_E)


def _observe_histogram(
  state, q_E, scores_TxE, choice, *, k, bins, mask_T=None, axis_name=None
):
  return total(_histogram(scores_TxE, q_E, k, bins, mask_T), axis_name)


def _update_by_histogram(state, count_ExN, *, k, ema):
  return _moved(state, _price(count_ExN, state.q, k), ema)


def _moved(state: base.State, q_E: jax.Array, ema: float) -> base.State:
  mixed_E = base.rounded(ema * state.q) + base.rounded((1 - ema) * q_E)
  mixed_E = jnp.where(q_E == state.q, q_E, mixed_E)
  return base.State(base.centred(mixed_E, unless=state.q))


def _range(q_E: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the greatest margin that scores in [0, 1] can have, and the span.

  p_i = s_ij - q_j for some j, so no margin s_ij - p_i is further than 1 from
  some q_j.
  """
  top = jnp.max(q_E) + 1
  return top, top - (jnp.min(q_E) - 1)


def _histogram(scores_TxE, q_E, k: int, bins: int, mask_T) -> jax.Array:
  """Counts the margins s_ij - p_i of each expert, the greatest in bin 0.

  Returns int32 [E, N]; all 0 where k = E, as no margin exists.
  """
  experts = scores_TxE.shape[-1]
  check_k(k, experts)
  if k == experts:
    return jnp.zeros((experts, bins), jnp.int32)
  scores_TxE, q_E = rankable(scores_TxE), lax.stop_gradient(q_E)
  _, p_T = kth_and_next_of_row(scores_TxE, k, minus_E=q_E)
  top, span = _range(q_E)
  depth_TxE = (top - (scores_TxE - p_T[:, None])) * (bins / span)
  depth_TxE = jnp.where(jnp.isnan(depth_TxE), bins, depth_TxE)  # last
  bin_TxE = jnp.clip(depth_TxE.astype(jnp.int32), 0, bins - 1)
  if mask_T is not None:
    bin_TxE = jnp.where(mask_T[:, None], bin_TxE, _NO_BIN)
  # A scatter is slow on accelerators, the matrix product on CPUs.
  return lax.platform_dependent(
    bin_TxE,
    cpu=lambda bin_TxE: _count_by_scatter(bin_TxE, bins),
    default=lambda bin_TxE: _count_by_product(bin_TxE, bins),
  )


_NO_BIN = 2**30  # beyond every histogram: counted nowhere


def _count_by_scatter(bin_TxE: jax.Array, bins: int) -> jax.Array:
  """Counts each column's values below `bins`; int32 [E, bins]."""
  experts = bin_TxE.shape[1]
  count_ExN = jnp.zeros((experts, bins), jnp.int32)
  return count_ExN.at[jnp.arange(experts), bin_TxE].add(1, mode='drop')


def _count_by_product(bin_TxE: jax.Array, bins: int) -> jax.Array:
  """The same by products of one-hot matrices."""
  side = math.isqrt(bins - 1) + 1  # a bin is a cell of a square of this side
  return histogram(bin_TxE.T.astype(jnp.uint32), side)[:, :bins]


def _price(count_ExN, q_E, k: int) -> jax.Array:
  """Estimates the (c+1)-th largest margin, c = floor(n k / E).

  Counts are of all tokens of a step and q_E prices that set their range, which
  is returned where c is 0.
  """
  experts, bins = count_ExN.shape
  capacity = base.even_share(jnp.sum(count_ExN[0]), k, experts)
  through_ExN = jnp.cumsum(count_ExN, axis=1)  # count from above
  bin_E = jnp.argmax(through_ExN > capacity, axis=1)
  inside_E, through_E = (
    jnp.take_along_axis(x, bin_E[:, None], axis=1)[:, 0]
    for x in (count_ExN, through_ExN)
  )
  # Of the values in the bin, taken as evenly spread, the one of rank c + 1.
  rank_E = (capacity - (through_E - inside_E)) + 0.5
  depth_E = bin_E + rank_E / jnp.maximum(inside_E, 1)
  top, span = _range(q_E)
  # Not `span / bins`, which compiled programs compute as this product.
  price_E = top - base.rounded(depth_E * (span * (1 / bins)))
  return jnp.where(capacity > 0, price_E, q_E)
