"""The choice of experts: what turns scores and prices into routes.

Shape letters: T tokens, E experts, K chosen per token, G groups of experts.
"""

from typing import NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from .order_statistic import top_k


class Choice(NamedTuple):
  """The experts of each token.

  Attributes:
    experts: int32 [T, K], best first by price-adjusted score.
    gates: float32 [T, K], raw scores of the chosen; 0 for masked tokens and
      slots that are not used.
    load: int32 [E], unmasked tokens that chose each expert.
    active: bool [T, K]; False where a slot is not used, whatever expert it
      names. All True where every token takes K experts.
  """

  experts: jax.Array
  gates: jax.Array
  load: jax.Array
  active: jax.Array


def choose(
  scores_TxE: jax.Array,
  q_E: jax.Array,
  *,
  k: int,
  mask_T: jax.Array | None = None,
  groups: int = 1,
  groups_per_token: int = 1,
) -> Choice:
  """Routes each token to its k best experts by price-adjusted score.

  Args:
    scores_TxE: router scores [tokens, experts]; compared in float32.
    q_E: price of each expert, float32 [experts]. It shifts the choice, not the
      gates, and receives no gradient.
    k: experts per token, 1 <= k <= experts.
    mask_T: bool [tokens]; False for padding, which gets gates of 0 and adds no
      load, whatever its scores hold.
    groups: G, equal, consecutive parts of the experts.
    groups_per_token: groups whose experts compete for a token, see `competing`.

  Returns:
    The chosen experts, their gates and each expert's load. Equal adjusted
    scores go to the lower expert index.

  Raises:
    ValueError: `k` is out of range, or no token could have k experts of so
      many groups.

  References:
    Sun, arXiv 2502.15451, Algorithm 1, lines 13-14; groups: DeepSeek-V3, arXiv
    2412.19437, section 2.1.2.
  """
  check_k(k, scores_TxE.shape[-1])
  check_groups(k, scores_TxE.shape[-1], groups, groups_per_token)
  scores_TxE = _unmasked(scores_TxE, mask_T)
  adjusted_TxE = adjusted_scores(scores_TxE, q_E)
  if groups > 1:
    may_TxE = competing(
      scores_TxE, q_E, groups=groups, groups_per_token=groups_per_token
    )
    adjusted_TxE = jnp.where(may_TxE, adjusted_TxE, -jnp.inf)
  experts_TxK = checkpoint_name(top_k(adjusted_TxE, k), 'experts')
  return _choice(scores_TxE, experts_TxK, mask_T)


def choose_above(
  scores_TxE: jax.Array,
  q_E: jax.Array,
  *,
  k_max: int,
  mask_T: jax.Array | None = None,
) -> Choice:
  """Routes each token to every expert whose price its score exceeds.

  Tokens take different numbers of experts (dynamic activation). With the prices
  of `threshold`, they take k on average, and every expert the same number of
  tokens.

  Args:
    scores_TxE: as of `choose`.
    q_E: price of each expert, float32 [experts].
    k_max: K, most experts of a token; the best by price-adjusted score are
      taken.
    mask_T: as of `choose`.

  References:
    Su, kexue.fm/archives/11626 (2026); Expert Threshold, arXiv 2603.11535.
  """
  check_k(k_max, scores_TxE.shape[-1], 'k_max')
  scores_TxE = _unmasked(scores_TxE, mask_T)
  q_E = lax.stop_gradient(q_E)
  above_TxE = rankable(scores_TxE) > q_E
  adjusted_TxE = jnp.where(
    above_TxE, adjusted_scores(scores_TxE, q_E), -jnp.inf
  )
  return _best_of(above_TxE, adjusted_TxE, scores_TxE, k_max, mask_T)


def choose_by_experts(
  scores_TxE: jax.Array,
  *,
  k: int,
  k_max: int,
  mask_T: jax.Array | None = None,
) -> Choice:
  """Lets each expert choose its floor(n k / E) best of n unmasked tokens.

  Loads are even but for what `k_max` cuts off. Whether an expert takes a token
  depends on all others, later ones of its sequence included: a reference, not
  for models that predict the next token.

  Args:
    scores_TxE: as of `choose`. Equal scores go to the lower token index.
    k: experts per token on average.
    k_max: K, most experts of a token; the best by score are kept.
    mask_T: as of `choose`.

  References:
    Zhou et al., arXiv 2202.09368, section 3.2.
  """
  tokens, experts = scores_TxE.shape
  check_k(k, experts)
  check_k(k_max, experts, 'k_max')
  scores_TxE = _unmasked(scores_TxE, mask_T)
  ranked_TxE = rankable(scores_TxE)
  n = tokens
  if mask_T is not None:
    ranked_TxE = jnp.where(mask_T[:, None], ranked_TxE, -jnp.inf)
    n = jnp.sum(mask_T)
  order_TxE = jnp.argsort(ranked_TxE, axis=0, stable=True, descending=True)
  place_TxE = jnp.argsort(order_TxE, axis=0)
  taken_TxE = (place_TxE < n * k // experts) & (ranked_TxE > -jnp.inf)
  best_TxE = jnp.where(taken_TxE, ranked_TxE, -jnp.inf)
  return _best_of(taken_TxE, best_TxE, scores_TxE, k_max, mask_T)


def choose_evenly(
  scores_TxE: jax.Array,
  *,
  k: int,
  key: jax.Array,
  mask_T: jax.Array | None = None,
) -> Choice:
  """Routes each token to k experts at random, with even loads.

  The loads of two experts differ by 1 at most, whatever the scores: what
  balance can buy in time, at its best.

  Args:
    scores_TxE: they set the gates alone.
    k: experts per token, 1 <= k <= experts.
    key: of the permutations of tokens and experts, see `jax.random`.
    mask_T: as of `choose`.
  """
  tokens, experts = scores_TxE.shape
  check_k(k, experts)
  of_tokens, of_experts = jax.random.split(key)
  # Whoever is nth of the unmasked tokens takes the nth k experts of a circle.
  place_T = jax.random.permutation(of_tokens, tokens)
  if mask_T is not None:
    last_T = jnp.where(mask_T, place_T, tokens)
    place_T = jnp.argsort(jnp.argsort(last_T))
  circle_TxK = (place_T % experts)[:, None] * k + jnp.arange(k)
  experts_TxK = jax.random.permutation(of_experts, experts)[
    circle_TxK % experts
  ].astype(jnp.int32)
  experts_TxK = checkpoint_name(experts_TxK, 'experts')
  return _choice(_unmasked(scores_TxE, mask_T), experts_TxK, mask_T)


def replay(
  scores_TxE: jax.Array,
  experts_TxK: jax.Array,
  *,
  mask_T: jax.Array | None = None,
) -> Choice:
  """Routes each token to the experts given, with gates from these scores.

  Args:
    scores_TxE: as of `choose`.
    experts_TxK: int32, distinct for each token; below 0 for a slot that is not
      used.
    mask_T: as of `choose`.
  """
  active_TxK = experts_TxK >= 0
  experts_TxK = jnp.maximum(experts_TxK, 0).astype(jnp.int32)
  return _choice(_unmasked(scores_TxE, mask_T), experts_TxK, mask_T, active_TxK)


def competing(
  scores_TxE: jax.Array,
  q_E: jax.Array,
  *,
  groups: int,
  groups_per_token: int,
) -> jax.Array:
  """Marks the experts of each token's best groups.

  A group's score is the sum of its two best price-adjusted scores. Equal ones
  go to the lower group.

  Args:
    scores_TxE: router scores [tokens, experts].
    q_E: price of each expert, float32 [experts].
    groups: G, equal, consecutive parts of the experts.
    groups_per_token: how many are marked.

  Returns:
    bool [tokens, experts].
  """
  tokens, experts = scores_TxE.shape
  size = experts // groups
  adjusted_TxGxP = adjusted_scores(scores_TxE, q_E).reshape(
    tokens, groups, size
  )
  best, _ = lax.top_k(adjusted_TxGxP, min(2, size))
  best_TxM = top_k(jnp.sum(best, axis=-1), groups_per_token)
  return jnp.repeat(chosen(best_TxM, groups), size, axis=-1)


def with_gates(
  choice: Choice, scores_TxE: jax.Array, mask_T: jax.Array | None = None
) -> Choice:
  """Returns the choice with gates from other scores, as of its experts."""
  scores_TxE = _unmasked(scores_TxE, mask_T)
  gates_TxK = jnp.take_along_axis(scores_TxE, choice.experts, axis=-1)
  return choice._replace(gates=jnp.where(choice.active, gates_TxK, 0.0))


def load_of(
  experts_TxK: jax.Array, valid_TxK: jax.Array, experts: int
) -> jax.Array:
  """Counts the valid slots of each expert; int32 [E]."""
  return lax.platform_dependent(
    experts_TxK,
    valid_TxK,
    # Adding one by one takes 1 ms for 131,072 tokens, 256 experts, 8 chosen;
    # comparing takes 42 ms, but is what vector hardware does well.
    cpu=lambda experts_TxK, valid_TxK: (
      jnp.zeros(experts, jnp.int32).at[experts_TxK].add(valid_TxK)
    ),
    default=lambda experts_TxK, valid_TxK: jnp.sum(
      chosen(experts_TxK, experts, valid_TxK), axis=0, dtype=jnp.int32
    ),
  )


def chosen(
  experts_xK: jax.Array, experts: int, active_xK: jax.Array | None = None
) -> jax.Array:
  """Marks the chosen experts: [..., K] indices become bool [..., E]."""
  marked = experts_xK[..., None] == jnp.arange(experts)
  if active_xK is not None:
    marked &= active_xK[..., None]
  return jnp.any(marked, axis=-2)


def adjusted_scores(scores_TxE: jax.Array, q_E: jax.Array) -> jax.Array:
  """Returns s - q as constants whose order is that of choice."""
  adjusted = rankable(scores_TxE) - lax.stop_gradient(q_E)
  adjusted = jnp.where(adjusted == 0, 0.0, adjusted)  # -0.0 equals 0.0
  # A score of -inf is last, even if its expert's price is -inf as well.
  return jnp.where(jnp.isnan(adjusted), -jnp.inf, adjusted)


def rankable(scores_TxE: jax.Array) -> jax.Array:
  """Returns scores as constants to compare, NaN as -inf: last.

  The select has a second use, see `balancer.rounded`: the product that a
  softmax ends with, joined with the subtraction of q, parts experts that `bip`
  makes equal.
  """
  scores_TxE = lax.stop_gradient(scores_TxE.astype(jnp.float32))
  return jnp.where(jnp.isnan(scores_TxE), -jnp.inf, scores_TxE)


def check_k(k: int, experts: int, name: str = 'k') -> None:
  """Raises ValueError unless 1 <= k <= experts."""
  if not 1 <= k <= experts:
    raise ValueError(
      f'{name}={k} experts per token: must lie between 1 and the number of '
      f'experts, {experts}'
    )


def check_groups(
  k: int, experts: int, groups: int, groups_per_token: int
) -> None:
  """Raises ValueError unless a token's groups hold k experts or more."""
  if groups < 1 or experts % groups:
    fits = [str(n) for n in range(1, experts + 1) if experts % n == 0]
    raise ValueError(
      f'groups={groups}: must divide the {experts} experts: {", ".join(fits)}'
    )
  least = -(-k * groups // experts)
  if not least <= groups_per_token <= groups:
    raise ValueError(
      f'groups_per_token={groups_per_token}: must lie between {least}, which '
      f'hold k={k} experts, and groups={groups}'
    )


def _unmasked(scores_TxE, mask_T):
  """Returns float32 scores; 0 for masked tokens, whatever they hold."""
  scores_TxE = scores_TxE.astype(jnp.float32)
  if mask_T is None:
    return scores_TxE
  return jnp.where(mask_T[:, None], scores_TxE, 0.0)


def _choice(scores_TxE, experts_TxK, mask_T, active_TxK=None) -> Choice:
  """Adds gates and loads to the experts; a slot is active by default."""
  gates_TxK = jnp.take_along_axis(scores_TxE, experts_TxK, axis=-1)
  if active_TxK is None:
    active_TxK = jnp.ones(experts_TxK.shape, bool)
  else:
    gates_TxK = jnp.where(active_TxK, gates_TxK, 0.0)
  valid_TxK = active_TxK if mask_T is None else active_TxK & mask_T[:, None]
  load_E = load_of(experts_TxK, valid_TxK, scores_TxE.shape[-1])
  return Choice(experts_TxK, gates_TxK, load_E, active_TxK)


def _best_of(may_TxE, ranked_TxE, scores_TxE, k_max: int, mask_T) -> Choice:
  """Takes the best of the experts that may be taken, at most `k_max`."""
  experts_TxK = checkpoint_name(top_k(ranked_TxE, k_max), 'experts')
  active_TxK = jnp.take_along_axis(may_TxE, experts_TxK, axis=-1)
  active_TxK = checkpoint_name(active_TxK, 'experts')
  return _choice(scores_TxE, experts_TxK, mask_T, active_TxK)
