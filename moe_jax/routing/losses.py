"""Loss-Controlled balancing: an auxiliary loss that rewards even loads."""

import jax
import jax.numpy as jnp

from . import balancer as base
from .order_statistic import total
from .selection import chosen

_POOLS = ('sequence', 'batch')


def auxiliary_loss(
  scores_BxSxE: jax.Array,
  experts_BxSxK: jax.Array,
  *,
  over: str,
  mask_BxS: jax.Array | None = None,
  axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
  """Computes sum_j f_j P_j, which is 1 at perfect balance.

  f_j = E / (n K) * (choices of expert j), without gradient, and P_j = mean
  score of expert j, over a pool of n unmasked tokens.

  Args:
    scores_BxSxE: router scores, float32 [batch, sequence, experts].
    experts_BxSxK: chosen experts, int32.
    over: 'sequence' makes each sequence a pool and averages the losses of
      those with a token in them; 'batch' makes one pool of all tokens.
    mask_BxS: bool; False for padding.
    axis_name: mesh axes over which the batch is split, inside `jax.shard_map`.

  Returns:
    float32 scalar; 0 where no token is unmasked.

  References:
    Fedus et al., arXiv 2101.03961, equations 4-6; per sequence: DeepSeek-V2,
    arXiv 2405.04434, equations 23-25.
  """
  base.check_known(_POOLS, over=over)
  if mask_BxS is None:
    mask_BxS = jnp.ones(scores_BxSxE.shape[:2], bool)
  experts, k = scores_BxSxE.shape[-1], experts_BxSxK.shape[-1]
  scores_BxSxE = jnp.where(mask_BxS[..., None], scores_BxSxE, 0.0)
  chosen_BxSxE = chosen(experts_BxSxK, experts)
  count_BxE = jnp.sum(chosen_BxSxE & mask_BxS[..., None], axis=1)
  score_BxE = jnp.sum(scores_BxSxE, axis=1)
  tokens_B = jnp.sum(mask_BxS, axis=1)
  if over == 'batch':
    # One pool: the same formula for a single, long sequence.
    count_BxE, score_BxE, tokens_B = (
      total(jnp.sum(x, axis=0), axis_name)[None]
      for x in (count_BxE, score_BxE, tokens_B)
    )
  n_B = jnp.maximum(tokens_B, 1).astype(jnp.float32)
  f_BxE = count_BxE * (experts / k) / n_B[:, None]
  loss_B = jnp.sum(f_BxE * score_BxE / n_B[:, None], axis=-1)
  if over == 'batch':
    return loss_B[0]
  pools = total(jnp.sum(tokens_B > 0), axis_name)
  return total(jnp.sum(loss_B), axis_name) / jnp.maximum(pools, 1)


def loss_controlled(
  alpha: float = 0.1, *, over: str = 'sequence'
) -> base.Balancer:
  """Builds Loss-Controlled balancing: plain top-k plus an auxiliary loss.

  Args:
    alpha: weight of the loss, which is summed over layers.
    over: 'sequence' or 'batch', see `auxiliary_loss`.

  References:
    Lepikhin et al., arXiv 2006.16668; Fedus et al., arXiv 2101.03961.
  """
  base.check_at_least(0, alpha=alpha)
  base.check_known(_POOLS, over=over)

  def loss(scores_BxSxE, choice, *, k, mask_BxS=None, axis_name=None):
    experts_BxSxK = choice.experts.reshape(*scores_BxSxE.shape[:2], k)
    pooled = {'over': over, 'mask_BxS': mask_BxS, 'axis_name': axis_name}
    return alpha * auxiliary_loss(scores_BxSxE, experts_BxSxK, **pooled)

  return base.Balancer(loss=loss)
