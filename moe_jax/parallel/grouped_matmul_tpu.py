"""Grouped matrix products on TPU, by XLA's kernel for `lax.ragged_dot`.

The kernel wants `compilers.compiler_options`; without, all of this is a
dense product with E times the work. So is `outer` by compilers that
`check_compiler` refuses. Other backends ignore the tiling.

Shape letters: N rows, E experts, D and F the two sides of a weight.
"""

from collections.abc import Sequence
import contextlib
import importlib.metadata
import math
import re

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
import jax.numpy as jnp

# Rows of a tile: a group begins and ends within one, so larger ones, which few
# loads fill, waste more. Columns are also cut in multiples of it.
_UNIT = 128
# Bytes of fast memory for the largest block, and of a row of a block. The v5e
# compiler refuses about twice as much of the former.
_BLOCK = 2**23
_ROW = 2**14

# The oldest compiler that is known to make a kernel of `outer`.
_LIBTPU = (0, 0, 50)


def check_compiler() -> None:
  """Raises ValueError where the compiler would make a dense product of `outer`.

  To be called before it is traced for TPUs.
  """
  try:
    version = importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    version = 'of unknown version'
  if tuple(map(int, re.findall(r'\d+', version)[:3])) < _LIBTPU:
    raise ValueError(
      f'libtpu {version}: may compute gradients of dropless experts with many '
      'times the work; take Python 3.12 or later with requirements-tpu.txt, or '
      'model.round_to_capacity=True, which drops nothing either'
    )


def matmul(
  rows_NxD: jax.Array,
  weights_ExDxF: jax.Array,
  load_E: jax.Array,
  *,
  contract: int,
) -> jax.Array:
  """Contracts rows with axis `contract` of their group's weight: [N, F]."""
  if contract == 1:
    weights_ExDxF = weights_ExDxF.swapaxes(1, 2)
  size = rows_NxD.dtype.itemsize
  # Of the weights, the next block is fetched while one is in use.
  with _tiles(weights_ExDxF.shape[1:], size, bytes_per_entry=2 * size, cut=[1]):
    y_NxF = lax.ragged_dot(_whole_tiles(rows_NxD), weights_ExDxF, load_E)
  # The kernel leaves spare rows as it finds them in memory.
  spare_N = jnp.arange(rows_NxD.shape[0]) >= jnp.sum(load_E)
  return jnp.where(spare_N[:, None], 0, y_NxF[: spare_N.size])


def outer(
  rows_NxD: jax.Array, dy_NxF: jax.Array, load_E: jax.Array
) -> jax.Array:
  """Sums x y^T over the rows of each group: [E, D, F]."""
  sides, size = (rows_NxD.shape[1], dy_NxF.shape[1]), rows_NxD.dtype.itemsize
  # Sums are of float32; a block of results is stored while the next is made.
  with _tiles(sides, size, bytes_per_entry=4 + 2 * size, cut=[0, 1]):
    return lax.ragged_dot_general(
      _whole_tiles(rows_NxD),
      _whole_tiles(dy_NxF),
      load_E,
      lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
      ),
    )


def _whole_tiles(rows_NxD: jax.Array) -> jax.Array:
  """Adds spare rows: tiles of 1128 rows would be of 8, those of 1152 of 128."""
  return jnp.pad(rows_NxD, ((0, -rows_NxD.shape[0] % _UNIT), (0, 0)))


def _tiles(
  sides: Sequence[int], size: int, *, bytes_per_entry: int, cut: Sequence[int]
) -> contextlib.AbstractContextManager:
  """Tiles what is traced inside by even parts of the two sides of a weight.

  The compiler's own choice does not divide sides: of [512, 1408] weights, it
  computes the gradient in two blocks of 512 x 1152, 1.6 times the work.

  Args:
    sides: D and F.
    size: bytes of an entry of a row.
    bytes_per_entry: of a block, in fast memory.
    cut: which sides may be cut, the longer block first. If that does not
      suffice, the compiler chooses.
  """
  parts = [1, 1]
  while True:
    block = [
      _UNIT * -(-side // (_UNIT * part))
      for side, part in zip(sides, parts, strict=True)
    ]
    fits = math.prod(block) * bytes_per_entry <= _BLOCK
    if fits and max(block) * size <= _ROW:
      tiling = ','.join(map(str, (_UNIT, *block)))
      return set_xla_metadata(ragged_dot_tiling=tiling)
    longer = max(cut, key=lambda side: block[side])
    if block[longer] == _UNIT:
      return contextlib.nullcontext()
    parts[longer] += 1
