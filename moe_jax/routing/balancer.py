"""The protocol of balancing rules, and what several of them share.

Shape letters: T tokens, B batch, S sequence, E experts.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .order_statistic import total
from .selection import Choice, choose


class State(NamedTuple):
  """The least state a balancer has: float32 [E], the price of each expert."""

  q: jax.Array


class LossInputs(NamedTuple):
  """All that a loss may look at, of one microbatch.

  Attributes:
    logits_BxSxE: of the router, float32.
    scores_BxSxE: of the router, float32.
    choice: of the balancer's prices, before any rounding, T = B S.
    mask_BxS: bool, False for padding; None where there is none.
    router_DxE: the router's weight, float32.
    step_load_E: int32, choices of each expert in this optimizer step so far,
      this microbatch included, on all devices.
    k: experts per token; on average, where tokens take different numbers.
    axis_name: mesh axes over which the batch is split, inside `jax.shard_map`.
  """

  logits_BxSxE: jax.Array
  scores_BxSxE: jax.Array
  choice: Choice
  mask_BxS: jax.Array | None
  router_DxE: jax.Array
  step_load_E: jax.Array
  k: int
  axis_name: str | tuple[str, ...] | None = None


class bound(functools.partial):  # Used like a function.
  """`functools.partial` that equals another of the same parts.

  Balancers made of these and of a module's functions are equal if they were
  made alike, so that a model is compiled once; and they can be pickled.
  """

  def __eq__(self, other):
    return type(other) is bound and self._parts == other._parts

  def __hash__(self):
    return hash(self._parts)

  @property
  def _parts(self):
    return self.func, self.args, tuple(sorted(self.keywords.items()))


# The parts of a rule that does nothing at that point.


def zero_prices(experts: int) -> State:
  """Starts from q = 0: plain top-k."""
  return State(jnp.zeros(experts, jnp.float32))


def keep_prices(state, scores_TxE, *, k, mask_T=None, axis_name=None):
  """Solves nothing: the state's q prices the choice."""
  return state.q, state


def observe_nothing(
  state, q_E, scores_TxE, choice, *, k, mask_T=None, axis_name=None
):
  """For rules that move q in `solve`, or never."""
  return ()


def keep_state(state, observation, *, k):
  """For rules that move q in `solve`, or never."""
  return state


def no_loss(inputs: LossInputs) -> jax.Array:
  """For rules that add nothing to the training loss."""
  return jnp.float32(0.0)


def current_price(state) -> jax.Array:
  """A frozen router chooses by the state's q."""
  return state.q


class Balancer(NamedTuple):
  """A rule for q, the price of each expert; pure functions, as in optax.

  A rule gives the parts in which it differs from plain top-k with q = 0.

  Attributes:
    init: `(experts) -> state`, a pytree with a field `q`, float32 [E]. No two
      of its leaves share a buffer, so that it can be donated.
    solve: `(state, scores_TxE, *, k, mask_T=None, axis_name=None) ->
      (q_E, state)`. q_E prices the choice of these very tokens.
    observe: `(state, q_E, scores_TxE, choice, *, k, mask_T=None,
      axis_name=None) -> observation`, a pytree; it does its own collectives
      over `axis_name`.
    update: `(state, observation, *, k) -> state`, once per optimizer step,
      with the sum of the step's observations.
    loss: `(LossInputs) -> scalar`, added to the training loss; the only part
      with a gradient.
    price: `(state) -> q_E`, by which a frozen router chooses, in evaluation and
      generation.
    additive: whether observations add up over microbatches. Callers refuse to
      accumulate several for a rule that says False.
    per_shard: whether each shard has prices of its own, so that a choice
      depends on how tokens are spread over shards.
    bounded_scores: whether the rule takes scores in [0, 1] only.
    knows_groups: whether `solve` also takes `groups` and `groups_per_token`,
      the limits of the choice. Other rules solve as if there were none.
  """

  init: Callable[[int], Any] = zero_prices
  solve: Callable[..., tuple[jax.Array, Any]] = keep_prices
  observe: Callable[..., Any] = observe_nothing
  update: Callable[..., Any] = keep_state
  loss: Callable[[LossInputs], jax.Array] = no_loss
  price: Callable[[Any], jax.Array] = current_price
  additive: bool = True
  per_shard: bool = False
  bounded_scores: bool = False
  knows_groups: bool = False


def with_losses(
  balancer: Balancer, *losses: Callable[[LossInputs], jax.Array]
) -> Balancer:
  """Returns the balancer with losses added to its own.

  `with_losses(loss_free(), auxiliary_loss(1e-4))`, on sigmoid scores, is
  DeepSeek-V3's recipe (arXiv 2412.19437, section 2.1.2).

  Args:
    balancer: any rule.
    *losses: such as `auxiliary_loss(...)`, or functions of one's own.
  """
  return balancer._replace(loss=bound(_sum_of, (balancer.loss, *losses)))


def _sum_of(losses, inputs: LossInputs) -> jax.Array:
  return sum((loss(inputs) for loss in losses), jnp.float32(0.0))


def zero_observation(balancer: Balancer, experts: int, k: int) -> Any:
  """Returns the observation of no tokens, the start of a step's sum."""

  def observe():
    state = balancer.init(experts)
    scores = jnp.zeros((1, experts))
    choice = choose(scores, state.q, k=k)
    return balancer.observe(state, state.q, scores, choice, k=k)

  return jax.tree.map(jnp.zeros_like, jax.eval_shape(observe))


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
  """Sums each shard's q, except where a shard had no token to solve for."""
  count = (jnp.sum(choice.load) > 0).astype(jnp.int32)
  return total(Prices(jnp.where(count > 0, q_E, 0.0), count), axis_name)


def mean_price(prices: Prices, *, otherwise: jax.Array) -> jax.Array:
  """Averages q; returns `otherwise` where there was no token at all."""
  mean_E = prices.total / jnp.maximum(prices.count, 1)
  return jnp.where(prices.count > 0, mean_E, otherwise)


def centred(q_E: jax.Array, *, unless: jax.Array) -> jax.Array:
  """Subtracts the mean from q, but returns a q that did not move as it is.

  A constant added to all of q changes no choice, so unclipped rules drift
  along it. A step without tokens must leave every bit.
  """
  centred_E = q_E - rounded(jnp.mean(q_E))
  return jnp.where(jnp.all(q_E == unless), q_E, centred_E)


def rounded(x: jax.Array) -> jax.Array:
  """Returns x, a product, so that it is rounded before it is added to.

  On CPU, XLA joins a product and a sum in one rounding in some programs and
  not in others, and neither `reduce_precision` nor an optimization barrier
  stops it. This does, so that q has the same bits in all programs.
  """
  return jnp.where(jnp.isnan(x), jnp.nan, x)


def count_tokens(
  scores_TxE: jax.Array,
  mask_T: jax.Array | None,
  axis_name: str | tuple[str, ...] | None,
) -> int | jax.Array:
  """Counts unmasked tokens over all shards; a Python int where it is known."""
  count = scores_TxE.shape[0] if mask_T is None else jnp.sum(mask_T, dtype=int)
  return total(count, axis_name)


def even_share(n: int | jax.Array, k: int, experts: int) -> int | jax.Array:
  """Returns floor(n k / E), also where n k does not fit into an int32."""
  return n // experts * k + n % experts * k // experts


def check_known(known: tuple[str, ...], **options: str) -> None:
  """Raises ValueError for an option whose value is none of `known`."""
  for name, value in options.items():
    if value not in known:
      raise ValueError(f'{name}={value!r}: must be one of {known}')


def check_at_least(least: int, **options: float) -> None:
  """Raises ValueError for an option below `least`."""
  for name, value in options.items():
    if value < least:
      raise ValueError(f'{name}={value}: must be {least} or more')


def check_fraction(**options: float) -> None:
  """Raises ValueError for an option that is not in [0, 1)."""
  for name, value in options.items():
    if not 0 <= value < 1:
      raise ValueError(f'{name}={value}: must be 0 or more and less than 1')
