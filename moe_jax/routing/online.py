"""Tokens that arrive one by one: the assignment program solved online.

Online matching and recommendation: users (tokens) arrive one at a time, and
each is given k of E items (experts) at once and for good. A rule prices the
experts by what has arrived so far, the newcomer included.

A recommender calls a rule's `step`, under `jax.jit`, for each arrival;
`assign_stream` scans the same function.

Shape letters: N arrivals, E experts, K chosen, R ranks kept, B blocks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from . import selection
from .balancer import check_at_least, even_share


class StreamState(NamedTuple):
  """The memory of a rule between arrivals.

  Attributes:
    q: float32 [E], the prices that the last arrival chose by.
    memory: of the margins s - p of all arrivals: float32 [E, R], the largest
      ones in descending order, or int32 [E, B], the number at or above the
      lower edge of each block.
    seen: int32, the number of arrivals.
  """

  q: jax.Array
  memory: jax.Array
  seen: jax.Array


class StreamRule(NamedTuple):
  """An online rule: pure functions, as in `Balancer`.

  Attributes:
    init: `(experts) -> state`, before the first arrival.
    step: `(state, scores_E) -> (state, experts_K)`: chooses for one arrival,
      best expert first by price-adjusted score, ties to the lower index.
  """

  init: Callable[[int], Any]
  step: Callable[[Any, jax.Array], tuple[Any, jax.Array]]


def assign_stream(
  rule: StreamRule, scores_NxE: jax.Array, state: Any = None
) -> tuple[selection.Choice, Any]:
  """Chooses for each arrival in turn: a scan of `rule.step`.

  Args:
    rule: for example `online_exact(...)`.
    scores_NxE: scores in order of arrival [arrivals, experts].
    state: after an earlier part of the stream; by default that of the start.

  Returns:
    The choice, whose gates are raw scores and whose load nothing limits (see
    `within_capacity`), and the state after the last arrival.
  """
  state = rule.init(scores_NxE.shape[-1]) if state is None else state
  state, experts_NxK = lax.scan(rule.step, state, scores_NxE)
  return selection.replay(scores_NxE, experts_NxK), state


def online_exact(
  horizon: int, *, k: int, iterations: int = 2, paced: bool = False
) -> StreamRule:
  """Builds the online rule that keeps each expert's c + 1 largest margins.

  With c = floor(horizon k / E), each arrival with scores s repeats

      p   = max(0, (k+1)-th largest over experts of s_j - q_j)
      q_j = max(0, (c+1)-th largest of all margins s_ij - p_i so far,
                   with s_j - p as the newcomer's)

  then chooses the top k of s - q, and its last margins are kept. Until c + 1
  margins of an expert are known its price is 0. Where nothing is to be shared
  out (c = 0) or everyone takes every expert (k = E), prices stay 0 and nothing
  is kept.

  Prices never fall, and never pass the point that `dual_iterations` reaches
  from q = 0 on the whole stream. They come late: no price leaves 0 before its
  expert has c choices, as a margin is positive at price 0 only where the expert
  is chosen, and no load is bounded. If full experts were barred, this would be
  greedy top-k. See `paced`.

  Memory is O(E c). So is the work per arrival, but as one vectorised pass over
  a sorted array, which XLA does faster than the gathers and scatters of a heap.
  A long horizon calls for `online_histogram`.

  Args:
    horizon: number of arrivals expected, known in advance. It only sets c:
      there may be fewer or more.
    k: experts per arrival.
    iterations: T >= 1, of the above per arrival.
    paced: whether c grows with the stream, floor(t k / E) at arrival t, up to
      the horizon's; ours. With the paper's fixed c an expert in demand takes
      every arrival until it is full, then each that is among its best c so
      far: in random order up to about 1 + ln(E / k) times its share in the
      end. Paced prices balance the load from the start, and may fall.

  Raises:
    ValueError: for an argument out of its range; for k, in `init` and `step`.

  References:
    Sun, arXiv 2502.15451, the online algorithm with a heap per expert.
  """

  def init(experts, capacity):
    return jnp.full((experts, capacity + 1), -jnp.inf, jnp.float32)

  def price(largest_ExR, margin_E, capacity):
    # With the newcomer, the (c+1)-th largest is the old one, the newcomer, or
    # the old c-th largest.
    before_E, last_E = largest_ExR[:, capacity - 1], largest_ExR[:, capacity]
    return jnp.clip(margin_E, last_E, before_E)

  def insert(largest_ExR, margin_E):
    # Sorted insertion: margins below the newcomer move down by one.
    above_ExR = jnp.pad(
      largest_ExR[:, :-1], ((0, 0), (1, 0)), constant_values=jnp.inf
    )
    return jnp.maximum(largest_ExR, jnp.minimum(above_ExR, margin_E[:, None]))

  return _stream_rule(horizon, k, iterations, paced, init, price, insert)


def online_histogram(
  horizon: int,
  *,
  k: int,
  iterations: int = 2,
  paced: bool = False,
  bins: int = 1000,
  lower: float = 0.0,
  upper: float = 1.0,
) -> StreamRule:
  """Builds the online rule of constant space: a histogram of margins.

  As `online_exact`, but the (c+1)-th largest margin is read off `bins` equal
  blocks of [lower, upper): in the block where the count from above passes c,
  margins are taken as evenly spread. Memory and work per arrival are
  O(E bins), whatever the horizon; within that range prices are less than a
  block from the exact ones for the same margins.

  Args:
    horizon: see `online_exact`.
    k: experts per arrival.
    iterations: T >= 1.
    paced: see `online_exact`.
    bins: number of blocks.
    lower: margins below count for nothing, and a price that would lie below
      is 0. Prices are never negative, so a negative one wastes blocks.
    upper: margins from here on count in the last block. No margin exceeds
      its score: the default suits softmax and sigmoid scores.

  Raises:
    ValueError: for an argument out of its range; for k, in `init` and `step`.

  References:
    Sun, arXiv 2502.15451, the approximate online algorithm.
  """
  check_at_least(1, bins=bins)
  if not lower < upper:
    raise ValueError(f'lower={lower}: must be below upper={upper}')
  width = (upper - lower) / bins
  # Below, nothing is added to a product: compilers may or may not round in
  # between, and the same arrivals could get different prices.
  offset = lower / width

  def block_of(margin_E):
    block_E = jnp.floor((margin_E - lower) * (1 / width))
    return jnp.clip(block_E, -1, bins - 1).astype(jnp.int32)

  def init(experts, capacity):
    return jnp.zeros((experts, bins), jnp.int32)

  def price(count_ExB, margin_E, capacity):
    # The newcomer, if it counts, can move the block up to where c were
    # already, no further than its own.
    newcomer_E = block_of(margin_E)
    old_E = jnp.sum(count_ExB > capacity, axis=1) - 1
    most_E = jnp.sum(count_ExB >= capacity, axis=1) - 1
    block_E = jnp.maximum(old_E, jnp.minimum(newcomer_E, most_E))

    def count_from(edge_E):
      count_Ex1 = jnp.take_along_axis(
        count_ExB, edge_E[:, None], axis=1, mode='fill', fill_value=0
      )
      return count_Ex1[:, 0] + (edge_E <= newcomer_E)

    # Half way between the c-th and the (c+1)-th, both being optimal.
    above_E = count_from(block_E + 1)
    inside_E = count_from(jnp.maximum(block_E, 0)) - above_E
    depth_E = (capacity - above_E + 0.5) / jnp.maximum(inside_E, 1)
    q_E = (offset + (block_E + 1) - depth_E) * width
    return jnp.where(block_E < 0, 0.0, q_E)

  def insert(count_ExB, margin_E):
    return count_ExB + (jnp.arange(bins) <= block_of(margin_E)[:, None])

  return _stream_rule(horizon, k, iterations, paced, init, price, insert)


def _stream_rule(horizon, k, iterations, paced, init_memory, price, insert):
  """Builds a rule from how it remembers margins and prices by them."""
  check_at_least(1, horizon=horizon, iterations=iterations)

  def capacity_of(experts):
    selection.check_k(k, experts)
    return 0 if k == experts else horizon * k // experts

  def init(experts):
    capacity = capacity_of(experts)
    memory = init_memory(experts, capacity)
    return StreamState(
      q=jnp.zeros(experts, jnp.float32),
      memory=memory if capacity else memory[:, :0],
      seen=jnp.int32(0),
    )

  def step(state, scores_E):
    experts = scores_E.shape[0]
    capacity = capacity_of(experts)
    scores_E = selection.rankable(scores_E)
    q_E, memory, seen = state
    seen += 1
    if capacity:
      share = capacity
      if paced:
        share = jnp.minimum(even_share(seen, k, experts), capacity)
      for _ in range(iterations):
        best_K, _ = lax.top_k(scores_E - q_E, k + 1)
        margin_E = scores_E - jnp.maximum(best_K[k], 0.0)
        q_E = jnp.maximum(price(memory, margin_E, share), 0.0)
        q_E = jnp.where(share > 0, q_E, 0.0)  # paced, before anyone's share
      memory = insert(memory, margin_E)
    experts_1xK = selection.choose(scores_E[None], q_E, k=k).experts
    return StreamState(q_E, memory, seen), experts_1xK[0]

  return StreamRule(init, step)


def within_capacity(
  experts_NxK: jax.Array, *, experts: int, capacity: int
) -> jax.Array:
  """Marks the choices that find room: each expert's first `capacity` ones.

  Args:
    experts_NxK: chosen experts in order of arrival, distinct in a row.
    experts: number of experts.
    capacity: arrivals that an expert can serve.

  Returns:
    bool [arrivals, K].
  """
  chosen_NxE = selection.chosen(experts_NxK, experts)
  place_NxE = jnp.cumsum(chosen_NxE, axis=0, dtype=jnp.int32)
  return jnp.take_along_axis(place_NxE, experts_NxK, axis=1) <= capacity


def regret(
  choice: selection.Choice,
  optimum: float | jax.Array,
  *,
  capacity: int | None = None,
) -> jax.Array:
  """Computes the share of the offline optimum that a stream did not earn.

  Args:
    choice: of the whole stream, in order of arrival.
    optimum: value of the best assignment in hindsight, the linear program's.
    capacity: choices of an expert beyond this number earn nothing. By default
      all choices earn, and the regret of uneven loads can be negative.

  Returns:
    float32 scalar, 1 - earned / optimum.
  """
  gates_NxK = choice.gates
  if capacity is not None:
    room_NxK = within_capacity(
      choice.experts, experts=choice.load.shape[0], capacity=capacity
    )
    gates_NxK = jnp.where(room_NxK, gates_NxK, 0.0)
  return 1 - jnp.sum(gates_NxK) / optimum
