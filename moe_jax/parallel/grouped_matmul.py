"""Matrix products of consecutive groups of rows, each with its own weights.

Shape letters: N rows, E experts, D and F the two sides of a weight.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp

from moe_jax import jax_privates
from moe_jax.parallel import grouped_matmul_gpu, grouped_matmul_tpu

# CPU tiles: a group is cut into tiles of TILE rows, and its last, short tile
# is rounded up to one of these sizes, so that little work is wasted whatever
# the loads are. Smaller tiles do not keep the cores busy.
TILE = 256
_SIZES = (16, 32, 48, 64, 96, 128, 160, 192, 224, TILE)


def check_compiler(platform: str) -> None:
  """Raises ValueError where gradients would have E times their FLOPs.

  Args:
    platform: 'cpu', 'gpu' or 'tpu', of the devices compiled for.
  """
  if platform == 'tpu':
    grouped_matmul_tpu.check_compiler()


def grouped_matmul(
  rows_NxD: jax.Array, weights_ExDxF: jax.Array, load_E: jax.Array
) -> jax.Array:
  """Multiplies the e-th group of rows by the e-th weight matrix.

  What `lax.ragged_dot` does, on each backend without E times its work: on CPU
  by a loop over experts and tiles; on NVIDIA GPUs by a Triton kernel; on TPU by
  the kernel that `lax.ragged_dot` becomes if the program is compiled with
  `compilers.compiler_options`, and by E times the work if not.

  In a `jax.shard_map`, rows may vary over more mesh axes than weights do; the
  gradient of the weights is then summed over these axes, in their dtype. To sum
  in another, or once for several products, cast weights to vary before:
  `lax.pcast(weights, axes, to='varying')`.

  Args:
    rows_NxD: groups one after the other, spare rows of zeros last.
    weights_ExDxF: one matrix per group, of the dtype of the rows.
    load_E: int32, rows in each group; sum(load_E) + TILE <= N.

  Returns:
    [N, F] of the dtype of the rows, zero in the spare rows. Differentiable in
    both operands if the cotangents of spare rows are also zero.

  Raises:
    ValueError: a gradient is asked for where `check_compiler` refuses.
  """
  operands = (rows_NxD, weights_ExDxF, load_E)
  varying = [jax_privates.varying_axes(x) for x in operands]
  axes = frozenset.union(*varying)
  # The rule for gradients wants all to vary alike.
  return _grouped_matmul(
    *(
      lax.pcast(x, tuple(sorted(axes - own)), to='varying')
      for x, own in zip(operands, varying, strict=True)
    )
  )


@jax.custom_vjp
def _grouped_matmul(rows_NxD, weights_ExDxF, load_E):
  return _matmul(rows_NxD, weights_ExDxF, load_E, contract=0)


def _forward(rows_NxD, weights_ExDxF, load_E):
  y_NxF = _grouped_matmul(rows_NxD, weights_ExDxF, load_E)
  return y_NxF, (rows_NxD, weights_ExDxF, load_E)


def _backward(residuals, dy_NxF):
  check_compiler(jax.default_backend())
  rows_NxD, weights_ExDxF, load_E = residuals
  drows_NxD = _matmul(dy_NxF, weights_ExDxF, load_E, contract=1)
  dweights_ExDxF = _outer(rows_NxD, dy_NxF, load_E)
  return drows_NxD, dweights_ExDxF, None


_grouped_matmul.defvjp(_forward, _backward)


# `lax.platform_dependent` traces what every platform would do; `jit` keeps that
# for each shape.
@functools.partial(jax.jit, static_argnames='contract')
def _matmul(rows_NxD, weights_ExDxF, load_E, *, contract):
  """Contracts rows with axis `contract` of their group's weight."""
  return lax.platform_dependent(
    rows_NxD,
    weights_ExDxF,
    load_E,
    cpu=functools.partial(_matmul_cpu, contract=contract),
    cuda=functools.partial(grouped_matmul_gpu.matmul, contract=contract),
    default=functools.partial(grouped_matmul_tpu.matmul, contract=contract),
  )


@jax.jit
def _outer(rows_NxD, dy_NxF, load_E):
  """Sums the outer products of rows and cotangents of each group."""
  return lax.platform_dependent(
    rows_NxD,
    dy_NxF,
    load_E,
    cpu=_outer_cpu,
    cuda=grouped_matmul_gpu.outer,
    default=grouped_matmul_tpu.outer,
  )


def _fold_tiles(load: jax.Array, body: Callable, carry):
  """Folds `body(carry, first_row, rows)` over the tiles of one group.

  `rows` counts the group's rows from the tile's first on: short if < TILE.
  """
  return lax.fori_loop(
    0,
    -(-load // TILE),
    lambda i, carry: body(carry, i * TILE, load - i * TILE),
    carry,
  )


def _by_size(rows: jax.Array, product: Callable, *operands):
  """Calls `product(size, *operands)` with the least static size >= rows."""
  branches = [functools.partial(product, size) for size in _SIZES]
  index = jnp.sum(jnp.minimum(rows, TILE) > jnp.array(_SIZES))
  return lax.switch(index, branches, *operands)


def _in_float32(function: Callable) -> Callable:
  """Computes in float32 what has the dtype of the first operand.

  On CPU, a loop that writes into an array of bfloat16 would convert all of it
  to float32 and back at every turn.
  """

  def wrapped(a, b, load_E, **options):
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    y = function(a.astype(dtype), b.astype(dtype), load_E, **options)
    return y.astype(a.dtype)

  return wrapped


@_in_float32
def _matmul_cpu(rows_NxD, weights_ExDxF, load_E, *, contract):
  start_E = jnp.cumsum(load_E) - load_E

  def product(size, x, weight):
    y = lax.dot_general(x[:size], weight, (((1,), (contract,)), ((), ())))
    return jnp.pad(y, ((0, TILE - size), (0, 0)))

  def group(expert, out_NxF):
    weight = weights_ExDxF[expert]

    def tile(out_NxF, row, rows):
      row += start_E[expert]
      x = lax.dynamic_slice_in_dim(rows_NxD, row, TILE)
      y = _by_size(rows, product, x, weight)
      # What a short tile writes past its group, the next group overwrites.
      return lax.dynamic_update_slice_in_dim(out_NxF, y, row, 0)

    return _fold_tiles(load_E[expert], tile, out_NxF)

  shape = (rows_NxD.shape[0], weights_ExDxF.shape[2 - contract])
  out_NxF = jnp.zeros_like(rows_NxD, shape=shape)  # Varies as the rows do.
  return lax.fori_loop(0, load_E.shape[0], group, out_NxF)


@_in_float32
def _outer_cpu(rows_NxD, dy_NxF, load_E):
  start_E = jnp.cumsum(load_E) - load_E
  shape = (rows_NxD.shape[1], dy_NxF.shape[1])

  def product(size, rows, x, dy):
    # Both: next to a zero, an infinity of another group would be a NaN.
    inside = jnp.arange(size)[:, None] < rows
    x, dy = (jnp.where(inside, a[:size], 0) for a in (x, dy))
    return jnp.dot(x.T, dy)

  def group(expert, out_ExDxF):
    def tile(out_ExDxF, row, rows):
      row += start_E[expert]
      x = lax.dynamic_slice_in_dim(rows_NxD, row, TILE)
      dy = lax.dynamic_slice_in_dim(dy_NxF, row, TILE)
      return out_ExDxF.at[expert].add(_by_size(rows, product, rows, x, dy))

    return _fold_tiles(load_E[expert], tile, out_ExDxF)

  out_ExDxF = jnp.zeros_like(rows_NxD, shape=(load_E.shape[0], *shape))
  return lax.fori_loop(0, load_E.shape[0], group, out_ExDxF)
