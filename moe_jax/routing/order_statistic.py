"""Exact order statistics by counting: no sort, any sharding, same bits."""

import jax
from jax import lax
import jax.numpy as jnp


def _sortable(x: jax.Array) -> jax.Array:
  """Maps float32 to uint32 so that integers order as the floats do.

  -0.0 becomes 0.0 first. NaN maps to 0, below -inf, which no other value does.
  """
  bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
  negative = bits >> 31 == 1
  key = jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))
  return jnp.where(jnp.isnan(x), jnp.uint32(0), key)


def _from_sortable(key: jax.Array) -> jax.Array:
  positive = key >> 31 == 1
  bits = jnp.where(positive, key & jnp.uint32((1 << 31) - 1), ~key)
  return lax.bitcast_convert_type(bits, jnp.float32)


def kth_largest(
  x: jax.Array,
  k: int | jax.Array,
  *,
  axis: int,
  where: jax.Array | None = None,
  axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
  """Selects the exact k-th largest value, counting duplicates.

  The answer is built bit by bit: 32 times, count the elements at or above a
  threshold. A count is an integer, so the result has the same bits however
  `axis` is sharded; each pass costs one all-reduce of int32 counts, of the
  size of the result.

  Args:
    x: values, any float dtype; compared in float32. NaN orders below -inf.
    k: rank from 1, the same for every slice; may be traced.
    axis: the axis to select along.
    where: False leaves an element out; broadcasts against `x`.
    axis_name: mesh axes over which `axis` is split, inside `jax.shard_map`.

  Returns:
    float32, the shape of `x` without `axis`. -inf where fewer than k elements
    take part.
  """
  keys = _sortable(x.astype(jnp.float32))
  if where is not None:
    keys = jnp.where(where, keys, jnp.uint32(0))

  def narrow(step, low):
    threshold = low | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
    count = jnp.sum(
      keys >= jnp.expand_dims(threshold, axis), axis=axis, dtype=jnp.int32
    )
    if axis_name is not None:
      count = lax.psum(count, axis_name)
    return jnp.where(count >= k, threshold, low)

  # The first step comes before the loop: in `jax.shard_map` its result, unlike
  # plain zeros, is known to differ over the same mesh axes as all the others.
  shape = keys.shape[:axis] + keys.shape[axis:][1:]
  low = narrow(jnp.int32(0), jnp.zeros(shape, jnp.uint32))
  low = lax.fori_loop(1, 32, narrow, low)
  return jnp.where(low == 0, -jnp.inf, _from_sortable(low))
