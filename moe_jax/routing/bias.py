"""Loss-Free Balancing: a bias per expert, moved by the sign of its overload."""

from jax import lax
import jax.numpy as jnp

from moe_jax.routing import balancer as base


def loss_free(rate: float = 1e-3) -> base.Balancer:
  """Builds Loss-Free Balancing: q_j += rate * sign(load_j - mean load).

  The load is that of the whole optimizer step, over all microbatches and
  shards, and q moves once a step.

  Args:
    rate: u, the change of q per step in units of the score.

  References:
    Wang et al., arXiv 2408.15664, Algorithm 1 (their bias is -q).
  """
  if rate < 0:
    raise ValueError(f'rate={rate}: must be 0 or more')

  def observe(
    state, q_E, scores_TxE, choice, *, k, mask_T=None, axis_name=None
  ):
    del state, q_E, scores_TxE, k, mask_T
    load_E = choice.load
    return load_E if axis_name is None else lax.psum(load_E, axis_name)

  def update(state, load_E, *, k):
    del k
    # Against the mean in integers, floor and ceiling: exact for any load.
    total, experts = jnp.sum(load_E), load_E.shape[0]
    sign_E = (load_E > total // experts) - 1 * (load_E < -(-total // experts))
    return base.State(state.q + rate * sign_E)

  return base.Balancer(
    init=base.zero_prices,
    solve=base.keep_prices,
    observe=observe,
    update=update,
    loss=base.no_loss,
  )
