"""Token -> expert -> token: three backends.

All lay the (token, chosen expert) pairs out in rows ordered by expert, apply
the experts to the rows and mix the results by the gates. They differ in the
layout: `grouped` packs the rows, `capacity` gives each expert a fixed buffer,
`in_rounds` fills such buffers as often as it takes.
Where the experts are split over a mesh axis, rows travel, see exchange.py.

Shape letters: T tokens, D model, F hidden, E experts, K chosen, N rows,
C capacity.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from moe_jax.parallel import exchange
from moe_jax.parallel.grouped_matmul import TILE, grouped_matmul
from moe_jax.routing import Choice


class ExpertWeights(NamedTuple):
  """SwiGLU experts: down(silu(gate(x)) * up(x)), all of the compute dtype."""

  gate_ExDxF: jax.Array
  up_ExDxF: jax.Array
  down_ExFxD: jax.Array


class Mixed(NamedTuple):
  """What the experts make of the tokens.

  Attributes:
    y: [T, D] of the dtype of the input.
    dropped: int32 scalar, (token, expert) pairs that found no room.
  """

  y: jax.Array
  dropped: jax.Array


def swiglu(
  gate: jax.Array, up: jax.Array, down: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """Returns down(silu(gate) * up).

  The backward pass keeps gate and up only: the product is cheap to do again,
  and autodiff alone would keep it, silu(gate) and sigmoid(gate) as well.
  """
  return jax.checkpoint(lambda gate, up: down(jax.nn.silu(gate) * up))(gate, up)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def take_rows(
  x_MxD: jax.Array,
  index_N: jax.Array,
  inverse_MxJ: jax.Array,
  full: bool = False,
) -> jax.Array:
  """Gathers x[index], where `inverse` says which outputs each row went to.

  Knowing the inverse turns the gradient, a scatter of wide rows, into a
  gather as well: both are fast on every backend and have a fixed order of sums.

  Args:
    x_MxD: rows to gather from.
    index_N: int32; M or more yields a row of zeros.
    inverse_MxJ: int32, the positions in the output that hold each row; N or
      more stands for none.
    full: whether nothing stands for none, so that no row need be cleared.

  Returns:
    [N, D].
  """
  return _rows_at(x_MxD, index_N, full)


def _rows_at(x_MxD, index_N, full):
  if full:
    return x_MxD.at[index_N].get(mode='clip')
  return x_MxD.at[index_N].get(mode='fill', fill_value=0)


def _take_rows_forward(x_MxD, index_N, inverse_MxJ, full):
  return take_rows(x_MxD, index_N, inverse_MxJ, full), inverse_MxJ


def _take_rows_backward(full, inverse_MxJ, dy_NxD):
  # A loop over the few J fuses; a sum over a gathered [M, J, D] does not.
  dx_MxD = sum(_rows_at(dy_NxD, index_M, full) for index_M in inverse_MxJ.T)
  return dx_MxD, None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


class _Pairs(NamedTuple):
  """All pairs of a token and one of its slots, by expert, group, rank, token.

  Attributes:
    token_N: int32.
    rank_N: int32, which of the choices of the token it is.
    queue_N: int32, expert * groups + group; pairs that are masked or not
      active, which come last, have E * groups.
    place_N: int32, in its queue.
  """

  token_N: jax.Array
  rank_N: jax.Array
  queue_N: jax.Array
  place_N: jax.Array


def _sort_pairs(
  choice: Choice, mask_T: jax.Array | None, groups: int = 1
) -> _Pairs:
  """Orders the pairs.

  Groups are equal, consecutive parts of the tokens with queues of their own.
  """
  tokens, k = choice.experts.shape
  queues = choice.load.shape[0] * groups
  group_T = jnp.arange(tokens, dtype=jnp.int32) // (tokens // groups)
  queue_TxK = choice.experts * groups + group_T[:, None]
  valid_TxK = choice.active
  if mask_T is not None:
    valid_TxK &= mask_T[:, None]
  queue_TxK = jnp.where(valid_TxK, queue_TxK, queues)
  queue_KT = queue_TxK.T.reshape(-1)
  order = jnp.argsort(queue_KT, stable=True).astype(jnp.int32)
  queue_N = queue_KT[order]
  start_Q = jnp.searchsorted(queue_N, jnp.arange(queues))
  place_N = jnp.arange(tokens * k) - start_Q.at[queue_N].get(mode='clip')
  return _Pairs(order % tokens, order // tokens, queue_N, place_N)


class _Layout(NamedTuple):
  """Which pair, counted as T K, each row holds, and which row each pair has.

  The number of pairs stands for none, and so does that of rows. In a `full`
  layout, none is without the other.
  """

  pair_of_row: jax.Array
  row_of_pair: jax.Array
  full: bool = False


def _lay_out(choice: Choice, pairs: _Pairs, row_N, rows: int) -> _Layout:
  """Puts pair n into row `row_N[n]` (none: >= `rows`)."""
  tokens, k = choice.experts.shape
  token_N, rank_N, _, _ = pairs
  pair_of_row = jnp.full(rows, tokens * k, jnp.int32)
  pair_of_row = pair_of_row.at[row_N].set(token_N * k + rank_N, mode='drop')
  row_of_pair = jnp.full((tokens, k), rows, jnp.int32)
  return _Layout(pair_of_row, row_of_pair.at[token_N, rank_N].set(row_N))


def _to_rows(x_TxD: jax.Array, layout: _Layout) -> jax.Array:
  k = layout.row_of_pair.shape[1]
  return take_rows(
    x_TxD, layout.pair_of_row // k, layout.row_of_pair, layout.full
  )


def _to_pairs(y_NxD: jax.Array, layout: _Layout) -> jax.Array:
  """Returns [T, K, D]; 0 for a pair without a row."""
  shape = (*layout.row_of_pair.shape, y_NxD.shape[1])
  row_TK = layout.row_of_pair.reshape(-1)
  y_TKxD = take_rows(y_NxD, row_TK, layout.pair_of_row[:, None], layout.full)
  return y_TKxD.reshape(shape)


def _split_over(axis_name: str | None) -> int:
  return 1 if axis_name is None else lax.axis_size(axis_name)


@jax.named_scope('dispatch')
def grouped(
  x_TxD: jax.Array,
  choice: Choice,
  weights: ExpertWeights,
  mask_T: jax.Array | None = None,
  *,
  axis_name: str | None = None,
) -> Mixed:
  """Applies the experts without dropping: rows packed, grouped products.

  Args:
    x_TxD: tokens, of the dtype of the weights.
    choice: experts, gates and load of each token.
    weights: the experts; with `axis_name`, those of this device.
    mask_T: bool; False leaves a token out of all experts, y is 0 there.
    axis_name: mesh axis over which experts are split, inside `jax.shard_map`.
      Then a device makes room for all tokens of all devices of the axis.
  """
  (tokens, k), experts = choice.experts.shape, choice.load.shape[0]
  pairs = _sort_pairs(choice, mask_T)
  rows = tokens * k + TILE  # grouped_matmul wants spare rows
  row_N = jnp.where(
    pairs.queue_N < experts, jnp.arange(tokens * k, dtype=jnp.int32), rows
  )

  def apply(x_NxD, load_E):
    gate_NxF = grouped_matmul(x_NxD, weights.gate_ExDxF, load_E)
    up_NxF = grouped_matmul(x_NxD, weights.up_ExDxF, load_E)
    return swiglu(
      gate_NxF,
      up_NxF,
      lambda hidden_NxF: grouped_matmul(hidden_NxF, weights.down_ExFxD, load_E),
    )

  def apply_anywhere(x_NxD):
    devices = _split_over(axis_name)
    if devices == 1:
      return apply(x_NxD, choice.load)
    most = devices * tokens * min(k, experts // devices) + TILE
    return exchange.ragged(
      x_NxD, choice.load, apply, most=most, axis_name=axis_name
    )

  layout = _lay_out(choice, pairs, row_N, rows)
  with jax.named_scope('experts'):
    y_NxD = apply_anywhere(_to_rows(x_TxD, layout))
  y_TxKxD = _to_pairs(y_NxD, layout).astype(jnp.float32)
  y_TxD = jnp.einsum('tkd,tk->td', y_TxKxD, choice.gates)
  return Mixed(y_TxD.astype(x_TxD.dtype), jnp.int32(0))


@jax.named_scope('dispatch')
def capacity(
  x_TxD: jax.Array,
  choice: Choice,
  weights: ExpertWeights,
  mask_T: jax.Array | None = None,
  *,
  capacity: int,
  groups: int = 1,
  full: bool = False,
  axis_name: str | None = None,
) -> Mixed:
  """Applies the experts to static buffers of `capacity` tokens each.

  Pairs beyond an expert's capacity are dropped and counted. Better choice
  ranks have precedence, then lower token indices.

  Args:
    x_TxD: tokens, of the dtype of the weights.
    choice: experts, gates and load of each token.
    weights: the experts; with `axis_name`, those of this device.
    mask_T: bool; False leaves a token out: no buffer space, and y is 0 there.
    capacity: tokens per expert of each group, C >= 1.
    groups: equal, consecutive parts of the tokens with buffers of their own.
    full: whether loads are known to fill all buffers exactly.
    axis_name: mesh axis over which experts are split, inside `jax.shard_map`.
  """
  queues = choice.load.shape[0] * groups
  pairs = _sort_pairs(choice, mask_T, groups)
  row_N = _row_of_pair(pairs, queues, capacity)
  layout = _lay_out(choice, pairs, row_N, queues * capacity)
  layout = layout._replace(full=full)
  y_TxKxD = _apply_in_buffers(x_TxD, choice, weights, layout, axis_name)
  dropped = (pairs.queue_N < queues) & (row_N == queues * capacity)
  return Mixed(_sum(y_TxKxD), jnp.sum(dropped, dtype=jnp.int32))


@jax.named_scope('dispatch')
def in_rounds(
  x_TxD: jax.Array,
  choice: Choice,
  weights: ExpertWeights,
  mask_T: jax.Array | None = None,
  *,
  capacity: int,
  axis_names: tuple[str, ...],
) -> Mixed:
  """Applies the experts without dropping, in memory that no load can exceed.

  A round serves `capacity` tokens of each expert, and there are as many as the
  fullest expert of any device needs: one, if its load is no more than that.
  For evaluation: it has no gradient, which a loop without a known end cannot
  have.

  Args:
    x_TxD: tokens, of the dtype of the weights.
    choice: experts, gates and load of each token.
    weights: the experts of this device.
    mask_T: bool; False leaves a token out of all experts, y is 0 there.
    capacity: tokens per expert in a round, C >= 1.
    axis_names: all axes of the mesh, inside `jax.shard_map`; experts are split
      over the last.

  Raises:
    ValueError: a gradient is asked for.
  """
  x_TxD, weights = _without_gradient((x_TxD, weights))
  queues = choice.load.shape[0]
  pairs = _sort_pairs(choice, mask_T)

  def add_round(i, y_TxKxD):
    later = pairs._replace(place_N=pairs.place_N - i * capacity)
    row_N = _row_of_pair(later, queues, capacity)
    layout = _lay_out(choice, pairs, row_N, queues * capacity)
    # Of each pair, all rounds but its own add zeros.
    return y_TxKxD + _apply_in_buffers(
      x_TxD, choice, weights, layout, axis_names[-1]
    )

  shape = (*choice.experts.shape, x_TxD.shape[1])
  rounds = lax.pmax(-(-jnp.max(choice.load) // capacity), axis_names)
  y_TxKxD = jnp.zeros_like(x_TxD, shape=shape)  # Varies as the tokens do.
  y_TxKxD = lax.fori_loop(0, rounds, add_round, y_TxKxD)
  return Mixed(_sum(y_TxKxD), jnp.int32(0))


@jax.custom_vjp
def _without_gradient(arrays):
  return arrays


def _refuse_gradient(arrays):
  raise ValueError(
    'train=False: has no gradient on a mesh where there is a capacity or '
    'rounding; take train=True, or a layer without them'
  )


_without_gradient.defvjp(_refuse_gradient, _refuse_gradient)


def _row_of_pair(pairs: _Pairs, queues: int, capacity: int) -> jax.Array:
  """Returns each pair's row of the buffers, [N]; their number for none."""
  place_N = pairs.place_N
  fits_N = (pairs.queue_N < queues) & (0 <= place_N) & (place_N < capacity)
  return jnp.where(
    fits_N, pairs.queue_N * capacity + place_N, queues * capacity
  )


def _apply_in_buffers(x_TxD, choice, weights, layout: _Layout, axis_name):
  """Applies the experts to buffers of equal sizes: y times its gate, [T, K, D].

  The gates travel with the tokens, so that the backward pass does not need what
  came back: recomputing a layer skips that exchange.
  """
  gates_TKx1 = choice.gates.reshape(-1, 1)
  gates_Nx1 = take_rows(
    gates_TKx1,
    layout.pair_of_row,
    layout.row_of_pair.reshape(-1, 1),
    layout.full,
  )

  def apply(x_ExCxD, gates_ExCx1):
    gate_ExCxF = jnp.einsum('ecd,edf->ecf', x_ExCxD, weights.gate_ExDxF)
    up_ExCxF = jnp.einsum('ecd,edf->ecf', x_ExCxD, weights.up_ExDxF)
    hidden_ExCxF = jax.nn.silu(gate_ExCxF) * up_ExCxF
    y_ExCxD = jnp.einsum('ecf,efd->ecd', hidden_ExCxF, weights.down_ExFxD)
    return (y_ExCxD * gates_ExCx1).astype(x_ExCxD.dtype)

  devices = _split_over(axis_name)
  x_NxD = _to_rows(x_TxD, layout)
  with jax.named_scope('experts'):
    rows = tuple(
      x.reshape(devices * len(weights.gate_ExDxF), -1, x.shape[1])
      for x in (x_NxD, gates_Nx1)
    )
    if devices == 1:
      y_ExCxD = apply(*rows)
    else:
      y_ExCxD = exchange.static(rows, apply, axis_name=axis_name)
  return _to_pairs(y_ExCxD.reshape(x_NxD.shape), layout)


def _sum(y_TxKxD: jax.Array) -> jax.Array:
  return jnp.sum(y_TxKxD.astype(jnp.float32), axis=1).astype(y_TxKxD.dtype)
