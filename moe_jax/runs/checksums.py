"""Checksums of arrays that may be spread over many devices and hosts."""

import hashlib
import json
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np


def digest(tree: Any) -> str:
  """Hashes the values and positions of all numbers of a tree of arrays."""
  sums = list(checksums(tree).values())
  return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def checksums(tree: Any) -> dict[str, int]:
  """Returns a checksum of every array of a tree, by its name.

  Arrays have numbers of at most 32 bits.

  Which device has which part does not matter. Each adds up its own, modulo
  2^32: an array need not fit into one host. A change of a single element always
  changes the sum, any other one does but for one chance in 2^32.
  """
  names = [
    jax.tree_util.keystr(path, simple=True, separator='.')
    for path, _ in jax.tree.leaves_with_path(tree)
  ]
  sums = jax.device_get(_checksums(jax.tree.leaves(tree)))
  return dict(zip(names, map(int, sums), strict=True))


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
  return [_checksum(leaf) for leaf in leaves]


def _checksum(x: jax.Array) -> jax.Array:
  """Adds up what is mixed of stacked arrays, one after the other.

  XLA on CPU keeps what is mixed, which is as large as the array.
  """
  if x.ndim < 3 or not x.size:
    return _mixed_sum(x, jnp.uint32(0))

  def add(i, total):
    part = lax.dynamic_index_in_dim(x, i, keepdims=False)
    return total + _mixed_sum(part, i.astype(jnp.uint32))

  return lax.fori_loop(0, x.shape[0], add, jnp.uint32(0))


def _mixed_sum(x: jax.Array, place: jax.Array) -> jax.Array:
  """Mixes values and positions of that part of a stack."""
  bits = lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')
  bits = bits.astype(jnp.uint32)
  position = jnp.full(x.shape, place)
  for axis, size in enumerate(x.shape):
    index = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    position = position * np.uint32(size) + index
  # Multiplications and shifts that mix well: those of MurmurHash3.
  mixed = (bits ^ position) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
