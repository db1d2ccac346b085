"""What every balancing method shares: the choice of experts and the protocol.

Shape letters: T tokens, B batch, S sequence, E experts, K chosen per token.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from moe_jax.routing.order_statistic import top_k


class Choice(NamedTuple):
  """The experts of each token.

  Attributes:
    experts: int32 [T, K], best first by price-adjusted score.
    gates: float32 [T, K], raw scores of the chosen; 0 for masked tokens.
    load: int32 [E], unmasked tokens that chose each expert.
  """

  experts: jax.Array
  gates: jax.Array
  load: jax.Array


class State(NamedTuple):
  """The least state a balancer has: float32 [E], the price of each expert."""

  q: jax.Array


class Balancer(NamedTuple):
  """A rule for q, the price of each expert; pure functions, as in optax.

  Attributes:
    init: `(experts) -> state`, a pytree with a field `q`, float32 [E].
    solve: `(state, scores_TxE, *, k, mask_T=None, axis_name=None) ->
      (q_E, state)`. q_E prices the choice of these very tokens.
    observe: `(state, q_E, scores_TxE, choice, *, k, mask_T=None,
      axis_name=None) -> observation`, a pytree of sums over tokens; it does its
      own collectives over `axis_name`.
    update: `(state, observation, *, k) -> state`, once per optimizer step,
      with the sum of the step's observations.
    loss: `(scores_BxSxE, choice, *, k, mask_BxS=None, axis_name=None) ->
      scalar`, added to the training loss; the only part with a gradient.
    additive: whether observations add up over microbatches, so that a step may
      have several. Whoever accumulates refuses a rule that says False.
    per_shard: whether each shard has prices of its own, so that a choice
      depends on how tokens are spread over shards.
  """

  init: Callable[[int], Any]
  solve: Callable[..., tuple[jax.Array, Any]]
  observe: Callable[..., Any]
  update: Callable[..., Any]
  loss: Callable[..., jax.Array]
  additive: bool = True
  per_shard: bool = False


def choose(
  scores_TxE: jax.Array,
  q_E: jax.Array,
  *,
  k: int,
  mask_T: jax.Array | None = None,
) -> Choice:
  """Routes each token to its k best experts by price-adjusted score.

  Args:
    scores_TxE: router scores [tokens, experts]; compared in float32.
    q_E: price of each expert, float32 [experts]. It shifts the choice, not the
      gates, and receives no gradient.
    k: experts per token, 1 <= k <= experts.
    mask_T: bool [tokens]; False for padding, which gets gates of 0 and adds no
      load, whatever its scores hold.

  Returns:
    The chosen experts, their gates and each expert's load. Equal adjusted
    scores go to the lower expert index.

  References:
    Sun, arXiv 2502.15451, Algorithm 1, lines 13-14.
  """
  experts = scores_TxE.shape[-1]
  check_k(k, experts)
  scores_TxE = scores_TxE.astype(jnp.float32)
  if mask_T is not None:
    scores_TxE = jnp.where(mask_T[:, None], scores_TxE, 0.0)
  experts_TxK = checkpoint_name(
    top_k(adjusted_scores(scores_TxE, q_E), k), 'experts'
  )
  gates = jnp.take_along_axis(scores_TxE, experts_TxK, axis=-1)
  valid_T = jnp.ones(len(scores_TxE), bool) if mask_T is None else mask_T
  load = lax.platform_dependent(
    experts_TxK,
    valid_T,
    # Adding one by one takes 1 ms for 131,072 tokens, 256 experts, 8 chosen;
    # comparing takes 42 ms, but is what vector hardware does well.
    cpu=lambda experts_TxK, valid_T: (
      jnp.zeros(experts, jnp.int32).at[experts_TxK].add(valid_T[:, None])
    ),
    default=lambda experts_TxK, valid_T: jnp.sum(
      jnp.any(experts_TxK[..., None] == jnp.arange(experts), axis=1)
      & valid_T[:, None],
      axis=0,
      dtype=jnp.int32,
    ),
  )
  return Choice(experts_TxK, gates, load)


def adjusted_scores(scores_TxE: jax.Array, q_E: jax.Array) -> jax.Array:
  """Returns s - q as constants whose order is that of choice."""
  adjusted = rankable(scores_TxE) - lax.stop_gradient(q_E)
  adjusted = jnp.where(adjusted == 0, 0.0, adjusted)  # -0.0 equals 0.0
  # A score of -inf is last, even if its expert's price is -inf as well.
  return jnp.where(jnp.isnan(adjusted), -jnp.inf, adjusted)


def rankable(scores_TxE: jax.Array) -> jax.Array:
  """Returns scores as constants to compare, NaN as -inf: last.

  The select has a second use, see `rounded`: the product that a softmax ends
  with, joined with the subtraction of q, parts experts that `bip` makes equal.
  """
  scores_TxE = lax.stop_gradient(scores_TxE.astype(jnp.float32))
  return jnp.where(jnp.isnan(scores_TxE), -jnp.inf, scores_TxE)


def rounded(x: jax.Array) -> jax.Array:
  """Returns x, a product, so that it is rounded before it is added to.

  On CPU, XLA joins a product and a sum in one rounding in some programs and
  not in others, and neither `reduce_precision` nor an optimization barrier
  stops it. This does, so that q has the same bits in all programs.
  """
  return jnp.where(jnp.isnan(x), jnp.nan, x)


def check_k(k: int, experts: int) -> None:
  """Raises ValueError unless 1 <= k <= experts."""
  if not 1 <= k <= experts:
    raise ValueError(
      f'k={k} experts per token: must lie between 1 and the number of '
      f'experts, {experts}'
    )


def count_tokens(
  scores_TxE: jax.Array,
  mask_T: jax.Array | None,
  axis_name: str | tuple[str, ...] | None,
) -> int | jax.Array:
  """Counts unmasked tokens over all shards; a Python int where it is known."""
  count = scores_TxE.shape[0] if mask_T is None else jnp.sum(mask_T, dtype=int)
  return count if axis_name is None else lax.psum(count, axis_name)


def even_share(n: int | jax.Array, k: int, experts: int) -> int | jax.Array:
  """Returns floor(n k / E), also where n k does not fit into an int32."""
  return n // experts * k + n % experts * k // experts


def zero_observation(balancer: Balancer, experts: int, k: int) -> Any:
  """Returns the observation of no tokens, the start of a step's sum."""

  def observe():
    state = balancer.init(experts)
    scores = jnp.zeros((1, experts))
    choice = choose(scores, state.q, k=k)
    return balancer.observe(state, state.q, scores, choice, k=k)

  return jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(observe)
  )


class Prices(NamedTuple):
  """Additive: q summed over the shards and microbatches that solved for one.

  Attributes:
    total: float32 [E].
    count: int32 scalar.
  """

  total: jax.Array
  count: jax.Array


def observe_prices(
  q_E: jax.Array, choice: Choice, axis_name: str | tuple[str, ...] | None
) -> Prices:
  """Sums each shard's q; one without a token solved nothing, has no say."""
  count = (jnp.sum(choice.load) > 0).astype(jnp.int32)
  prices = Prices(jnp.where(count > 0, q_E, 0.0), count)
  return prices if axis_name is None else lax.psum(prices, axis_name)


def mean_price(prices: Prices, *, otherwise: jax.Array) -> jax.Array:
  """Averages q; returns `otherwise` where there was no token at all."""
  mean_E = prices.total / jnp.maximum(prices.count, 1)
  return jnp.where(prices.count > 0, mean_E, otherwise)


def centred(q_E: jax.Array, *, unless: jax.Array) -> jax.Array:
  """Subtracts the mean from q, but leaves it as it is where it did not move.

  A constant added to all of q changes no choice, so unclipped rules drift
  along it. A step without tokens must leave every bit.
  """
  centred_E = q_E - rounded(jnp.mean(q_E))
  return jnp.where(jnp.all(q_E == unless), q_E, centred_E)


# The pieces of a rule that has nothing to do at that point.


def zero_prices(experts: int) -> State:
  """Starts from q = 0: plain top-k."""
  return State(jnp.zeros(experts, jnp.float32))


def keep_prices(state, scores_TxE, *, k, mask_T=None, axis_name=None):
  """Solves nothing: the state's q prices the choice."""
  del scores_TxE, k, mask_T, axis_name
  return state.q, state


def observe_nothing(
  state, q_E, scores_TxE, choice, *, k, mask_T=None, axis_name=None
):
  """For rules that `update` from nothing."""
  del state, q_E, scores_TxE, choice, k, mask_T, axis_name
  return ()


def keep_state(state, observation, *, k):
  """For rules that move q in `solve`, or never."""
  del observation, k
  return state


def no_loss(scores_BxSxE, choice, *, k, mask_BxS=None, axis_name=None):
  """For rules that add nothing to the training loss."""
  del scores_BxSxE, choice, k, mask_BxS, axis_name
  return jnp.float32(0.0)


def unbalanced() -> Balancer:
  """Builds plain top-k routing: q = 0 and no loss, the control group."""
  return Balancer(
    init=zero_prices,
    solve=keep_prices,
    observe=observe_nothing,
    update=keep_state,
    loss=no_loss,
  )
