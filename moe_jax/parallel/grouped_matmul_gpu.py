"""Grouped matrix products on GPU, by Triton kernels.

On NVIDIA GPUs `lax.ragged_dot` is a dense product with E times the work.

Shape letters: N rows, E experts, D and F the two sides of a weight; a program
computes a block of M rows or of BLOCK x BLOCK entries in steps of S.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

BLOCK = 128
_PARAMETERS = triton.CompilerParams(num_warps=8, num_stages=3)


def matmul(
  rows_NxD: jax.Array,
  weights_ExDxF: jax.Array,
  load_E: jax.Array,
  *,
  contract: int,
  interpret: bool = False,
) -> jax.Array:
  """Contracts rows with axis `contract` of their group's weight.

  Args:
    rows_NxD: groups one after the other, spare rows last.
    weights_ExDxF: one matrix per group; [E, F, D] if `contract` is 1.
    load_E: int32, rows in each group; sum(load_E) <= N.
    contract: 0 or 1.
    interpret: whether to emulate the kernel, on any backend.

  Returns:
    [N, F] of the dtype of the rows, zero in the spare rows.
  """
  rows, width = rows_NxD.shape
  experts, columns = weights_ExDxF.shape[0], weights_ExDxF.shape[2 - contract]
  # A block is of one group; the spare rows are the last group.
  load = jnp.append(load_E, rows - jnp.sum(load_E))
  blocks = -(-load // BLOCK)
  end = jnp.cumsum(blocks)
  block = jnp.arange(rows // BLOCK + experts + 1, dtype=jnp.int32)
  group = jnp.minimum(jnp.searchsorted(end, block, side='right'), experts)
  skipped = (block - (end - blocks)[group]) * BLOCK
  start = (jnp.cumsum(load) - load)[group] + skipped
  count = jnp.clip(load[group] - skipped, 0, BLOCK)
  return _call(
    functools.partial(_matmul_kernel, width, columns, experts, contract),
    (block.size, pl.cdiv(columns, BLOCK)),
    (rows, columns),
    (group, start, count, rows_NxD, weights_ExDxF),
    interpret,
  )


def outer(
  rows_NxD: jax.Array,
  dy_NxF: jax.Array,
  load_E: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Sums x y^T over the rows of each group: [E, D, F], arguments as above."""
  width, columns = rows_NxD.shape[1], dy_NxF.shape[1]
  shape = (load_E.shape[0], width, columns)
  return _call(
    functools.partial(_outer_kernel, width, columns),
    (shape[0], pl.cdiv(width, BLOCK), pl.cdiv(columns, BLOCK)),
    shape,
    (jnp.cumsum(load_E) - load_E, load_E, rows_NxD, dy_NxF),
    interpret,
  )


def _call(kernel, grid, shape, operands, interpret):
  # Zeros like the rows: of their dtype, and varying over the same mesh axes.
  result = functools.partial(jnp.zeros_like, shape=shape)
  return pl.pallas_call(
    kernel,
    grid=grid,
    out_shape=jax.eval_shape(result, operands[-2]),
    compiler_params=_PARAMETERS,
    interpret=interpret,
  )(*operands)


def _matmul_kernel(
  width, columns, experts, contract, group, start, count, x_ref, w_ref, y_ref
):
  block, first = pl.program_id(0), pl.program_id(1) * BLOCK
  expert = group[block]
  row = pl.ds(start[block], BLOCK)
  inside_M = jnp.arange(BLOCK) < count[block]
  inside_F = first + jnp.arange(BLOCK) < columns
  size = _step(x_ref)

  def step(i, sum_MxF):
    inner = pl.ds(i * size, size)
    inside_S = i * size + jnp.arange(size) < width
    x_MxS = _load(x_ref.at[row, inner], inside_M, inside_S)
    if contract == 0:
      w = w_ref.at[expert, inner, pl.ds(first, BLOCK)]
      w_SxF = _load(w, inside_S, inside_F)
    else:
      w = w_ref.at[expert, pl.ds(first, BLOCK), inner]
      w_SxF = _load(w, inside_F, inside_S).T
    return sum_MxF + triton.dot(x_MxS, w_SxF)

  steps = (expert < experts).astype(jnp.int32) * pl.cdiv(width, size)
  y_MxF = lax.fori_loop(0, steps, step, jnp.zeros((BLOCK, BLOCK), jnp.float32))
  triton.store(
    y_ref.at[row, pl.ds(first, BLOCK)],
    y_MxF.astype(y_ref.dtype),
    mask=inside_M[:, None] & inside_F,
  )


def _outer_kernel(width, columns, start, load, x_ref, dy_ref, dw_ref):
  expert = pl.program_id(0)
  d, f = (pl.ds(pl.program_id(axis) * BLOCK, BLOCK) for axis in (1, 2))
  inside_D = d.start + jnp.arange(BLOCK) < width
  inside_F = f.start + jnp.arange(BLOCK) < columns
  size = _step(x_ref)

  def step(i, sum_DxF):
    row = pl.ds(start[expert] + i * size, size)
    inside_S = i * size + jnp.arange(size) < load[expert]
    x_SxD = _load(x_ref.at[row, d], inside_S, inside_D)
    dy_SxF = _load(dy_ref.at[row, f], inside_S, inside_F)
    return sum_DxF + triton.dot(x_SxD.T, dy_SxF)

  zero = jnp.zeros((BLOCK, BLOCK), jnp.float32)
  dw_DxF = lax.fori_loop(0, pl.cdiv(load[expert], size), step, zero)
  triton.store(
    dw_ref.at[expert, d, f],
    dw_DxF.astype(dw_ref.dtype),
    mask=inside_D[:, None] & inside_F,
  )


def _step(x_ref):
  """Steps of 128 bytes: three stages of two operands take 96 KiB."""
  return 128 // x_ref.dtype.itemsize


def _load(ref, inside_row, inside_column):
  return triton.load(ref, mask=inside_row[:, None] & inside_column, other=0)
