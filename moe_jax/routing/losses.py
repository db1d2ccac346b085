"""Losses on routers: functions of `LossInputs`, added to the training loss.

Each `*_loss(weight)` makes one; `with_losses` adds them to a balancer.
"""

import jax
import jax.numpy as jnp

from . import balancer as base
from .order_statistic import total
from .selection import chosen
from .unbalanced import unbalanced

_POOLS = ('sequence', 'batch', 'step')


def auxiliary_loss(alpha: float, *, over: str = 'sequence') -> base.bound:
  """Makes alpha sum_j f_j P_j, which is alpha at perfect balance.

  f_j = E / (n K) * (choices of expert j), without gradient, and P_j = mean
  score of expert j, over a pool of n unmasked tokens. Each token's scores are
  divided by their sum first, as those of a softmax are: a loss of scores that
  can all fall together would make them.

  Args:
    alpha: weight of the loss, which is summed over layers.
    over: 'sequence' makes each sequence a pool and averages the losses of
      those with a token in them; 'batch' makes one pool of all tokens of the
      microbatch; 'step' takes f over the optimizer step so far, earlier
      microbatches included, and P over the microbatch.

  Returns:
    `(LossInputs) -> float32 scalar`; 0 where no token is unmasked.

  References:
    Fedus et al., arXiv 2101.03961, equations 4-6; per sequence: DeepSeek-V2,
    arXiv 2405.04434, equations 23-25; per step: Qiu et al., arXiv 2501.11873.
  """
  base.check_at_least(0, alpha=alpha)
  base.check_known(_POOLS, over=over)
  return base.bound(_auxiliary_loss, alpha, over)


def _auxiliary_loss(alpha: float, over: str, inputs: base.LossInputs):
  scores_BxSxE, choice, mask_BxS = (
    inputs.scores_BxSxE,
    inputs.choice,
    inputs.mask_BxS,
  )
  if mask_BxS is None:
    mask_BxS = jnp.ones(scores_BxSxE.shape[:2], bool)
  batch, sequence, experts = scores_BxSxE.shape
  scores_BxSxE = jnp.where(mask_BxS[..., None], scores_BxSxE, 0.0)
  row_BxSx1 = jnp.sum(scores_BxSxE, axis=-1, keepdims=True)
  score_BxE = jnp.sum(scores_BxSxE / (row_BxSx1 + 1e-20), axis=1)
  tokens_B = jnp.sum(mask_BxS, axis=1)
  chosen_TxE = chosen(choice.experts, experts, choice.active)
  chosen_BxSxE = chosen_TxE.reshape(batch, sequence, experts)
  count_BxE = jnp.sum(chosen_BxSxE & mask_BxS[..., None], axis=1)
  if over != 'sequence':
    # One pool: the same formula for a single, long sequence.
    count_BxE, score_BxE, tokens_B = (
      total(jnp.sum(x, axis=0), inputs.axis_name)[None]
      for x in (count_BxE, score_BxE, tokens_B)
    )
  n_B = jnp.maximum(tokens_B, 1).astype(jnp.float32)
  f_BxE = count_BxE * (experts / inputs.k) / n_B[:, None]
  if over == 'step':
    load_E = inputs.step_load_E.astype(jnp.float32)
    f_BxE = experts * (load_E / jnp.maximum(jnp.sum(load_E), 1.0))[None]
  loss_B = alpha * jnp.sum(f_BxE * score_BxE / n_B[:, None], axis=-1)
  if over != 'sequence':
    return loss_B[0]
  pools = total(jnp.sum(tokens_B > 0), inputs.axis_name)
  return total(jnp.sum(loss_B), inputs.axis_name) / jnp.maximum(pools, 1)


def similarity_loss(weight: float) -> base.bound:
  """Makes weight * mean |R^T R - I|, of the router's matrix R [D, E].

  It keeps the router near to a rotation, so that similar tokens get similar
  scores, and looks at no token. The mean, not the paper's sum, makes the weight
  independent of the number of experts: theirs is this one's over E^2.

  References:
    Omi et al., arXiv 2506.14038 (SimBal).
  """
  base.check_at_least(0, weight=weight)
  return base.bound(_similarity_loss, weight)


def _similarity_loss(weight: float, inputs: base.LossInputs):
  router_DxE = inputs.router_DxE
  gram_ExE = jnp.matmul(
    router_DxE.T, router_DxE, precision=jax.lax.Precision.HIGHEST
  )
  return weight * jnp.mean(jnp.abs(gram_ExE - jnp.eye(len(gram_ExE))))


def z_loss(weight: float) -> base.bound:
  """Makes weight * mean over tokens of logsumexp(logits)^2.

  References:
    Zoph et al., arXiv 2202.08906, equation 5.
  """
  base.check_at_least(0, weight=weight)
  return base.bound(_z_loss, weight)


def _z_loss(weight: float, inputs: base.LossInputs):
  square_BxS = jnp.square(jax.nn.logsumexp(inputs.logits_BxSxE, axis=-1))
  mask_BxS = inputs.mask_BxS
  if mask_BxS is None:
    mask_BxS = jnp.ones(square_BxS.shape, bool)
  square, count = total(
    (jnp.sum(jnp.where(mask_BxS, square_BxS, 0.0)), jnp.sum(mask_BxS)),
    inputs.axis_name,
  )
  return weight * square / jnp.maximum(count, 1)


def loss_controlled(
  alpha: float = 0.1, *, over: str = 'sequence'
) -> base.Balancer:
  """Builds Loss-Controlled balancing: plain top-k plus an auxiliary loss.

  Args:
    alpha: weight of the loss, which is summed over layers.
    over: 'sequence', 'batch' or 'step', see `auxiliary_loss`.

  References:
    Lepikhin et al., arXiv 2006.16668; Fedus et al., arXiv 2101.03961.
  """
  return base.with_losses(unbalanced(), auxiliary_loss(alpha, over=over))
