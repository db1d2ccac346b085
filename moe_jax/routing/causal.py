"""Prices that follow each sequence, from its earlier tokens only.

Shape letters: B batch, S sequence, E experts, K chosen per token.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from .balancer import check_at_least, rounded
from .selection import chosen

_PRIOR = 20  # tokens with even loads, which each sequence seems to begin with


class Counts(NamedTuple):
  """What is known of each sequence so far.

  Attributes:
    load: int32 [B, E], choices of each expert, all by the same prices.
    tokens: int32 [B].
  """

  load: jax.Array
  tokens: jax.Array


def causal_prices(
  experts_BxSxK: jax.Array,
  q_E: jax.Array,
  *,
  strength: float,
  mask_BxS: jax.Array | None = None,
  before: Counts | None = None,
) -> tuple[jax.Array, Counts]:
  """Raises the prices of experts that a sequence has used more than others.

  Of the t tokens before a token in its sequence, load_j would choose expert j
  at the prices q. At this token, j costs

      q_j + strength (load_j / (t k / E) - 1) t / (t + 20)

  so that a load of twice the even one costs `strength`. Loads are those of q,
  not of the prices returned. So they are cumulative sums, no token waits for
  the choice of the one before, and all counts are integers: token by token with
  `before`, in parts or all at once, prices have the same bits.

  It evens out each sequence, and costs score: the optimum of the whole batch
  does not ask for it. A strength above about 0.4 standard deviations of a
  token's scores overcorrects, as loads are not those of the raised prices.

  Args:
    experts_BxSxK: experts chosen by the scores minus q, int32, distinct for
      each token.
    q_E: the prices by which they are, float32 [experts].
    strength: in units of the score; 0 returns q.
    mask_BxS: bool; False for padding, which is not counted.
    before: the counts returned for the earlier part of the sequences; by
      default there is none.

  Returns:
    Prices, float32 [batch, sequence, experts], to subtract from the scores
    before the choice that is made; and the counts, all tokens included.

  References:
    In place of an auxiliary loss over a sequence. Related, with averages of
    scores: Chang, jonathanc.net/blog/causal-routing-bias (March 2026); with
    histograms of scores: Su, kexue.fm/archives/11760 (May 2026).
  """
  check_at_least(0, strength=strength)
  experts, k = q_E.shape[0], experts_BxSxK.shape[-1]
  if mask_BxS is None:
    mask_BxS = jnp.ones(experts_BxSxK.shape[:2], bool)
  if before is None:
    batch = experts_BxSxK.shape[0]
    before = Counts(
      jnp.zeros((batch, experts), jnp.int32), jnp.zeros(batch, jnp.int32)
    )
  chosen_BxSxE = chosen(experts_BxSxK, experts) & mask_BxS[..., None]
  # Through each token, and without it.
  load_BxSxE = before.load[:, None] + jnp.cumsum(chosen_BxSxE, axis=1)
  tokens_BxS = before.tokens[:, None] + jnp.cumsum(mask_BxS, axis=1)
  earlier_BxSxE = load_BxSxE - chosen_BxSxE
  t_BxSx1 = (tokens_BxS - mask_BxS)[..., None]
  # E load - k t in integers, so that even loads leave q as it is.
  excess_BxSxE = experts * earlier_BxSxE - k * t_BxSx1
  factor_BxSx1 = (strength / k) / (t_BxSx1 + _PRIOR).astype(jnp.float32)
  q_BxSxE = lax.stop_gradient(q_E) + rounded(excess_BxSxE * factor_BxSx1)
  # The last column, also of no token at all.
  counts = Counts(
    before.load + jnp.sum(chosen_BxSxE, axis=1, dtype=jnp.int32),
    before.tokens + jnp.sum(mask_BxS, axis=1, dtype=jnp.int32),
  )
  return q_BxSxE, counts
