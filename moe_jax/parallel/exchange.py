"""Expert parallelism: rows travel to the devices that hold their experts.

All of this runs inside `jax.shard_map`, on the tokens of one device. The
collectives of an MoE layer, all over the mesh axis `expert`, are

    static     2 all-to-all of [E, C, D] forward, 2 backward, and 1 each way of
               gates, float32 [E, C];
    ragged     1 all-gather of loads, int32 [E], and 2 ragged all-to-all of the
               chosen rows forward; 2 ragged all-to-all backward. On CPU each
               is 2 all-to-all: padded rows and where they go.

Those of the router, over both axes, are all-reduces of numbers per expert and
never grow with the tokens: 8 of [15, E] for each of the T dual iterations (and
two of [E] with cutoff 'midpoint'), on TPUs 4 of [E, 256] (and one), none with
scope 'shard', and the sums that are reported. The gradients of weights are
summed over the axes over which the weights are not split.
tests/parallel/test_collectives.py counts all of them.

Shape letters: N rows sent, M rows received, D model, E experts, L experts of
one device, P devices along the axis, C capacity.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp


def static(
  rows: tuple[jax.Array, ...],
  apply: Callable[..., jax.Array],
  *,
  axis_name: str,
) -> jax.Array:
  """Applies the experts to C rows for each, from every device.

  Args:
    rows: arrays [E, C, ...], this device's rows for all experts of the axis.
    apply: `(*rows [L, P C, ...]) -> [L, P C, D]`, this device's experts.
    axis_name: mesh axis over which experts are split, in order.

  Returns:
    [E, C, D], what the experts made of this device's rows.
  """
  there = functools.partial(lax.all_to_all, axis_name=axis_name, tiled=True)
  received = (there(x, split_axis=0, concat_axis=1) for x in rows)
  return there(apply(*received), split_axis=1, concat_axis=0)


def ragged(
  rows_NxD: jax.Array,
  load_E: jax.Array,
  apply: Callable[[jax.Array, jax.Array], jax.Array],
  *,
  most: int,
  axis_name: str,
) -> jax.Array:
  """Applies the experts to as many rows as there are, from every device.

  Args:
    rows_NxD: this device's rows, ordered by expert; spare rows last.
    load_E: int32, rows for each expert of the axis.
    apply: `(rows [M, D], load [L]) -> [M, D]`, this device's experts on rows
      ordered by expert; spare rows are zeros.
    most: M, rows that a device has room for. What goes beyond is undefined.
    axis_name: mesh axis over which experts are split, in order.

  Returns:
    [N, D], what the experts made of this device's rows; zeros in spare rows.
  """
  load_PxE = lax.all_gather(load_E, axis_name)
  there, back = _routes(load_PxE, lax.axis_index(axis_name))
  rows_MxD = _move(rows_NxD, there, back, most, axis_name)
  load_L = jnp.sum(back.send_sizes.reshape(len(load_PxE), -1), axis=0)
  y_MxD = apply(rows_MxD, load_L)
  return _move(y_MxD, back, there, len(rows_NxD), axis_name)


class _Route(NamedTuple):
  """Arguments of `lax.ragged_all_to_all`: one slice per device and expert.

  Of each slice, where it begins here, its size, where it begins there, and the
  size of what comes from there.
  """

  input_offsets: jax.Array
  send_sizes: jax.Array
  output_offsets: jax.Array
  receive_sizes: jax.Array


def _routes(load_PxE: jax.Array, me: jax.Array) -> tuple[_Route, _Route]:
  """Computes where slices go and where they come back to.

  Senders order rows by expert. Receivers order them by expert, then sender.
  """
  devices = len(load_PxE)
  load_PxPxL = load_PxE.reshape(devices, devices, -1)  # sender, receiver
  before_PxE = jnp.cumsum(load_PxE, axis=1) - load_PxE
  sent_PxPxL = before_PxE.reshape(load_PxPxL.shape)
  total_PxL = jnp.sum(load_PxPxL, axis=0)
  received_PxPxL = (
    (jnp.cumsum(total_PxL, axis=1) - total_PxL)
    + jnp.cumsum(load_PxPxL, axis=0)
    - load_PxPxL
  )
  there = _Route(
    sent_PxPxL[me], load_PxPxL[me], received_PxPxL[me], load_PxPxL[:, me]
  )
  back = _Route(
    received_PxPxL[:, me], load_PxPxL[:, me], sent_PxPxL[:, me], load_PxPxL[me]
  )
  return jax.tree.map(jnp.ravel, (there, back))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _move(rows_NxD, there, back, rows, axis_name):
  """Sends slices of rows into [rows, D] arrays that are 0 elsewhere.

  The way back is the transpose of the way there.
  """
  ragged = functools.partial(_move_ragged, rows=rows, axis_name=axis_name)
  dense = functools.partial(_move_dense, rows=rows, axis_name=axis_name)
  # XLA on CPU has no ragged all-to-all.
  return lax.platform_dependent(rows_NxD, there, cpu=dense, default=ragged)


def _move_forward(rows_NxD, there, back, rows, axis_name):
  y_MxD = _move(rows_NxD, there, back, rows, axis_name)
  return y_MxD, (there, back, len(rows_NxD))


def _move_backward(rows, axis_name, residuals, dy_MxD):
  there, back, rows = residuals
  return _move(dy_MxD, back, there, rows, axis_name), None, None


_move.defvjp(_move_forward, _move_backward)


def _move_ragged(rows_NxD, route, *, rows, axis_name):
  empty_MxD = jnp.zeros_like(rows_NxD, shape=(rows, rows_NxD.shape[1]))
  return lax.ragged_all_to_all(rows_NxD, empty_MxD, *route, axis_name=axis_name)


def _move_dense(rows_NxD, route, *, rows, axis_name):
  """Does the same by an all-to-all of blocks that could hold all rows.

  No device has more than N or M rows for another, whichever is less.
  """
  devices, slots = lax.axis_size(axis_name), min(len(rows_NxD), rows)
  slot_S = jnp.arange(slots)

  def pack(start_L, size_L, target_L):
    """Returns the rows for one device and where it wants them."""
    offset_SxL = slot_S[:, None] - (jnp.cumsum(size_L) - size_L)
    inside_SxL = (offset_SxL >= 0) & (offset_SxL < size_L)

    def place(first_L, nowhere):
      place_S = jnp.sum(jnp.where(inside_SxL, first_L + offset_SxL, 0), axis=1)
      return jnp.where(jnp.any(inside_SxL, axis=1), place_S, nowhere)

    source_S = place(start_L, len(rows_NxD))
    block_SxD = rows_NxD.at[source_S].get(mode='fill', fill_value=0)
    return block_SxD, place(target_L, rows)

  packed = jax.vmap(pack)(*(x.reshape(devices, -1) for x in route[:3]))
  block_PxSxD, target_PxS = (
    lax.all_to_all(x, axis_name, 0, 0, tiled=True) for x in packed
  )
  block_NxD = block_PxSxD.reshape(-1, rows_NxD.shape[1])
  source_M = jnp.full(rows, len(block_NxD))
  source_M = source_M.at[target_PxS.reshape(-1)].set(
    jnp.arange(len(block_NxD)), mode='drop'
  )
  return block_NxD.at[source_M].get(mode='fill', fill_value=0)
