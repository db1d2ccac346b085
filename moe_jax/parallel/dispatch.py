"""Token -> expert -> token: two backends of one signature.

Both lay the (token, chosen expert) pairs out in rows ordered by expert, apply
the experts to the rows and mix the results by the gates. They differ in the
layout: `grouped` packs the rows, `capacity` gives each expert a fixed buffer.

Shape letters: T tokens, D model, F hidden, E experts, K chosen, N rows,
C capacity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel.grouped_matmul import TILE
from moe_jax.parallel.grouped_matmul import grouped_matmul
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


@jax.custom_vjp
def take_rows(
  x_MxD: jax.Array, index_N: jax.Array, inverse_MxJ: jax.Array
) -> jax.Array:
  """Gathers x[index], where `inverse` says which outputs each row went to.

  Knowing the inverse turns the gradient, a scatter of wide rows, into a
  gather, too: both are fast on every backend and have a fixed order of sums.

  Args:
    x_MxD: rows to gather from.
    index_N: int32; M or more yields a row of zeros.
    inverse_MxJ: int32, the positions in the output that hold each row; N or
      more stands for none.

  Returns:
    [N, D].
  """
  del inverse_MxJ
  return x_MxD.at[index_N].get(mode='fill', fill_value=0)


def _take_rows_forward(x_MxD, index_N, inverse_MxJ):
  return take_rows(x_MxD, index_N, inverse_MxJ), inverse_MxJ


def _take_rows_backward(inverse_MxJ, dy_NxD):
  # A loop over the few J fuses; a sum over a gathered [M, J, D] does not.
  dx_MxD = sum(
    dy_NxD.at[index_M].get(mode='fill', fill_value=0)
    for index_M in inverse_MxJ.T
  )
  return dx_MxD, None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def _sort_pairs(choice: Choice, mask_T: jax.Array | None):
  """Orders pairs by expert, then choice rank, then token; masked pairs last.

  Returns:
    token [TK] and rank [TK] of each pair in that order, its expert [TK] (E if
    masked), and its place in its expert's queue [TK].
  """
  tokens, k = choice.experts.shape
  experts = choice.load.shape[0]
  expert_TxK = choice.experts
  if mask_T is not None:
    expert_TxK = jnp.where(mask_T[:, None], expert_TxK, experts)
  expert_KT = expert_TxK.T.reshape(-1)
  order = jnp.argsort(expert_KT, stable=True).astype(jnp.int32)
  expert_N = expert_KT[order]
  start_E = jnp.cumsum(choice.load) - choice.load
  place_N = jnp.arange(tokens * k) - start_E.at[expert_N].get(mode='clip')
  return order % tokens, order // tokens, expert_N, place_N


def _mix(x_TxD, choice, rows, apply, *, row_N, token_N, rank_N):
  """Sends pair n to row `row_N[n]` (none: >= `rows`), applies, mixes back."""
  tokens, k = choice.experts.shape
  pair_of_row = jnp.full(rows, tokens * k, jnp.int32)
  pair_of_row = pair_of_row.at[row_N].set(token_N * k + rank_N, mode='drop')
  row_of_pair = jnp.full((tokens, k), rows, jnp.int32)
  row_of_pair = row_of_pair.at[token_N, rank_N].set(row_N)
  token_of_row = pair_of_row // k
  x_NxD = take_rows(x_TxD, token_of_row, row_of_pair)
  with jax.named_scope('experts'):
    y_NxD = apply(x_NxD)
  y_TKxD = take_rows(y_NxD, row_of_pair.reshape(-1), pair_of_row[:, None])
  y_TxKxD = y_TKxD.reshape(tokens, k, -1)
  y_TxD = jnp.einsum('tkd,tk->td', y_TxKxD.astype(jnp.float32), choice.gates)
  return y_TxD.astype(x_TxD.dtype)


@jax.named_scope('dispatch')
def grouped(
  x_TxD: jax.Array,
  choice: Choice,
  weights: ExpertWeights,
  *,
  mask_T: jax.Array | None = None,
) -> Mixed:
  """Applies the experts without dropping: rows packed, grouped products.

  Args:
    x_TxD: tokens, of the dtype of the weights.
    choice: experts, gates and load of each token.
    weights: the experts.
    mask_T: bool; False leaves a token out of all experts, y is 0 there.
  """
  token_N, rank_N, expert_N, _ = _sort_pairs(choice, mask_T)
  rows = token_N.size + TILE  # grouped_matmul wants spare rows
  valid_N = expert_N < choice.load.shape[0]
  row_N = jnp.where(valid_N, jnp.arange(token_N.size, dtype=jnp.int32), rows)

  def apply(x_NxD):
    gate_NxF = grouped_matmul(x_NxD, weights.gate_ExDxF, choice.load)
    up_NxF = grouped_matmul(x_NxD, weights.up_ExDxF, choice.load)

    @jax.checkpoint  # Keeps gate and up only; the product is cheap to redo.
    def down(gate_NxF, up_NxF):
      hidden_NxF = jax.nn.silu(gate_NxF) * up_NxF
      return grouped_matmul(hidden_NxF, weights.down_ExFxD, choice.load)

    return down(gate_NxF, up_NxF)

  y_TxD = _mix(
    x_TxD, choice, rows, apply, row_N=row_N, token_N=token_N, rank_N=rank_N
  )
  return Mixed(y_TxD, jnp.int32(0))


@jax.named_scope('dispatch')
def capacity(
  x_TxD: jax.Array,
  choice: Choice,
  weights: ExpertWeights,
  *,
  mask_T: jax.Array | None = None,
  capacity: int,
) -> Mixed:
  """Applies the experts to static buffers of `capacity` tokens each.

  Pairs beyond an expert's capacity are dropped and counted. Better choice
  ranks have precedence, then lower token indices.

  Args:
    x_TxD: tokens, of the dtype of the weights.
    choice: experts, gates and load of each token.
    weights: the experts.
    mask_T: bool; False leaves a token out: no buffer space, and y is 0 there.
    capacity: tokens per expert, C >= 1.
  """
  experts = choice.load.shape[0]
  token_N, rank_N, expert_N, place_N = _sort_pairs(choice, mask_T)
  rows = experts * capacity
  fits_N = (expert_N < experts) & (place_N < capacity)
  row_N = jnp.where(fits_N, expert_N * capacity + place_N, rows)

  def apply(x_NxD):
    x_ExCxD = x_NxD.reshape(experts, capacity, -1)
    gate_ExCxF = jnp.einsum('ecd,edf->ecf', x_ExCxD, weights.gate_ExDxF)
    up_ExCxF = jnp.einsum('ecd,edf->ecf', x_ExCxD, weights.up_ExDxF)
    hidden_ExCxF = jax.nn.silu(gate_ExCxF) * up_ExCxF
    y_ExCxD = jnp.einsum('ecf,efd->ecd', hidden_ExCxF, weights.down_ExFxD)
    return y_ExCxD.reshape(rows, -1)

  y_TxD = _mix(
    x_TxD, choice, rows, apply, row_N=row_N, token_N=token_N, rank_N=rank_N
  )
  return Mixed(y_TxD, jnp.sum(jnp.maximum(choice.load - capacity, 0)))
