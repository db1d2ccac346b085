"""From prices to an assignment: no expert above capacity, no token dropped."""

import functools

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from . import selection
from .order_statistic import top_k


def round_to_capacity(
  scores_TxE: jax.Array,
  q_E: jax.Array,
  *,
  k: int,
  capacity: int | None = None,
  mask_T: jax.Array | None = None,
) -> selection.Choice:
  """Routes each token to k experts, none of which gets more than `capacity`.

  Starts from `choose` and moves choices, the cheapest first, from experts above
  capacity to experts with room. Prices decide how good the result is; it is
  feasible for any. Where `choose` keeps within capacity, that is the result.

  Args:
    scores_TxE: router scores [tokens, experts]; compared in float32. -inf is
      the last resort of a move, but no chain of moves is sought to avoid it.
    q_E: price of each expert, float32 [experts], of any rule. It receives no
      gradient.
    k: experts per token, 1 <= k <= experts.
    capacity: most tokens of an expert, a Python int; at least, and by default,
      ceil(tokens * k / experts), masked tokens counted, which holds them all.
    mask_T: bool [tokens]; False for padding, which gets gates of 0 and takes
      no capacity, whatever its scores hold.

  Returns:
    The choice; its experts are distinct and best first by price-adjusted score.

  Raises:
    ValueError: where not all tokens would fit, or `k` is out of range.

  References:
    The constraints of Sun, arXiv 2502.15451, problem (BIP), met exactly.
  """
  tokens, experts = scores_TxE.shape
  selection.check_k(k, experts)
  least = -(-tokens * k // experts)
  capacity = least if capacity is None else capacity
  if capacity < least:
    raise ValueError(
      f'capacity={capacity}: {experts} experts have too little room for '
      f'{tokens} tokens x k={k}; it takes {least} or more'
    )
  choice = selection.choose(scores_TxE, q_E, k=k, mask_T=mask_T)
  if mask_T is None:
    mask_T = jnp.ones(tokens, bool)
  scores_TxE = jnp.where(mask_T[:, None], scores_TxE.astype(jnp.float32), 0.0)
  # Finite, so that a difference is never NaN.
  limit = jnp.finfo(jnp.float32).max
  adjusted_TxE = jnp.clip(
    selection.adjusted_scores(scores_TxE, q_E), -limit, limit
  )
  chosen_TxE = selection.chosen(choice.experts, experts)

  # This ends. An expert f above capacity has more tokens than an expert e with
  # room, and while there is an f there is an e, so some token of f can go to e:
  # each round makes a move. No token is ever short of experts, so none can get
  # stuck. A round fills an e, relieves an f, or moves every token that can
  # move; k of the last kind in a row leave none. So (k + 1) E rounds suffice;
  # two to five are usual.
  def unfinished(carry):
    _, load_E = carry
    return jnp.any(load_E > capacity)

  def move(carry):
    chosen_TxE, load_E = carry
    chosen_TxE = _move_cheapest(
      adjusted_TxE, chosen_TxE, load_E - capacity, mask_T
    )
    valid_TxE = chosen_TxE & mask_T[:, None]
    return chosen_TxE, jnp.sum(valid_TxE, axis=0, dtype=jnp.int32)

  chosen_TxE, load_E = lax.while_loop(
    unfinished, move, (chosen_TxE, choice.load)
  )
  experts_TxK = checkpoint_name(
    top_k(jnp.where(chosen_TxE, adjusted_TxE, -jnp.inf), k), 'experts'
  )
  gates_TxK = jnp.take_along_axis(scores_TxE, experts_TxK, axis=-1)
  return choice._replace(experts=experts_TxK, gates=gates_TxK, load=load_E)


def _move_cheapest(adjusted_TxE, chosen_TxE, excess_E, mask_T):
  """Moves one choice of each token at most, as far as excess and room go."""
  # A token loses least by a move from the worst of its experts above capacity
  # to the best of the others with room.
  from_TxE = jnp.where(chosen_TxE & (excess_E > 0), adjusted_TxE, jnp.inf)
  to_TxE = jnp.where(~chosen_TxE & (excess_E < 0), adjusted_TxE, -jnp.inf)
  from_T, to_T = jnp.argmin(from_TxE, axis=1), jnp.argmax(to_TxE, axis=1)
  least_T, best_T = jnp.min(from_TxE, axis=1), jnp.max(to_TxE, axis=1)
  moves_T = mask_T & (least_T < jnp.inf) & (best_T > -jnp.inf)
  for group_T, quota_E in ((from_T, excess_E), (to_T, -excess_E)):
    moves_T = _cheapest(least_T - best_T, group_T, quota_E, moves_T)
  experts = jnp.arange(excess_E.shape[0])
  either_TxE = (from_T[:, None] == experts) | (to_T[:, None] == experts)
  return chosen_TxE ^ (moves_T[:, None] & either_TxE)


def _cheapest(cost_T, group_T, quota_E, where_T):
  """Marks the quota_j cheapest tokens of each group j; ties to the first."""
  tokens, experts = cost_T.shape[0], quota_E.shape[0]
  group_T = jnp.where(where_T, group_T, experts)
  group_T, _, order_T = lax.sort(
    (group_T, cost_T, jnp.arange(tokens)), num_keys=2
  )

  def first(group_T, method):
    return jnp.searchsorted(group_T, jnp.arange(experts), method=method)

  # Bisection is 14 steps for 8,192 tokens, each to be started by itself.
  start_E = lax.platform_dependent(
    group_T,
    cpu=functools.partial(first, method='scan'),
    default=functools.partial(first, method='compare_all'),
  )
  last_T = (start_E + quota_E).at[group_T].get(mode='fill', fill_value=0)
  return where_T.at[order_T].set(jnp.arange(tokens) < last_T)
