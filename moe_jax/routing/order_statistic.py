"""Exact order statistics by counting: no sort, any sharding, same bits.

Shape letters: T tokens, E experts, K largest.
"""

import jax
from jax import lax
import jax.numpy as jnp

# XLA's CPU code for a long reduction passes through memory 32 elements at a
# time; short axes first become vector code. Counting 32 times in 33.5 M
# numbers takes 0.14 s of processor time this way and 0.6 s without.
_SLICES = 8
_TOKENS_IN_CACHE = 1024


def _is_local(axis_name) -> bool:
  """Tells whether arrays lie on one device, so that any reshape is free.

  That is known inside of `jax.shard_map` and where there is just one device.
  Elsewhere a reshape of a sharded axis may cost an all-gather.
  """
  return axis_name is not None or jax.device_count() == 1


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


def _count_at_least(threshold, keys, axis, axis_name) -> jax.Array:
  """Counts on this shard, per slice along `axis`."""
  n = keys.shape[axis]
  threshold = jnp.expand_dims(threshold, axis)
  if not _is_local(axis_name) or n % _SLICES:
    return jnp.sum(keys >= threshold, axis, dtype=jnp.int32)
  split = (*keys.shape[:axis], _SLICES, n // _SLICES, *keys.shape[axis + 1 :])
  at_least = keys.reshape(split) >= jnp.expand_dims(threshold, axis)
  few = jnp.sum(at_least, axis, dtype=jnp.uint16)
  return jnp.sum(few, axis, dtype=jnp.int32)


def _kth_largest_16_bits(keys, k, axis, axis_name, bits) -> jax.Array:
  """Selects from uint16, `bits` bits a pass; 0 where there are fewer than k."""
  digits = jnp.arange(1, 1 << bits, dtype=jnp.uint16)

  def narrow(step, low):
    shift = (16 - bits * (step + 1)).astype(jnp.uint16)
    count = jnp.stack(
      [
        _count_at_least(low + (digit << shift), keys, axis, axis_name)
        for digit in digits
      ]
    )
    if axis_name is not None:
      count = lax.psum(count, axis_name)
    # Counts fall as the digit rises, so this is the greatest that has k.
    return low + (jnp.sum(count >= k, 0, dtype=jnp.uint16) << shift)

  # The first step comes before the loop: in `jax.shard_map` its result, unlike
  # plain zeros, is known to differ over the same mesh axes as all the others.
  shape = keys.shape[:axis] + keys.shape[axis + 1 :]
  low = narrow(jnp.int32(0), jnp.zeros(shape, jnp.uint16))
  return lax.fori_loop(1, 16 // bits, narrow, low)


def kth_largest(
  x: jax.Array,
  k: int | jax.Array,
  *,
  axis: int,
  where: jax.Array | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  bits_per_pass: int = 1,
) -> jax.Array:
  """Selects the exact k-th largest value, counting duplicates.

  The answer is built bit by bit, the upper 16 first: 32 times, count the
  elements at or above a threshold. A count is an integer, so the result has
  the same bits however `axis` is sharded. With b = `bits_per_pass`, a call
  costs 32 / b all-reduces of 2^b - 1 int32 counts for each value of the result
  (b = 1: 32 of one; 2: 16 of 3; 4: 8 of 15; 8: 4 of 255), and as many
  comparisons of each element: b > 1 pays where latency is what costs.

  Args:
    x: values, any float dtype; compared in float32. NaN orders below -inf.
    k: rank from 1, the same for every slice; may be traced.
    axis: the axis to select along.
    where: False leaves an element out; broadcasts against `x`.
    axis_name: mesh axes over which `axis` is split, inside `jax.shard_map`.
    bits_per_pass: 1, 2, 4 or 8.

  Returns:
    float32, the shape of `x` without `axis`. -inf where fewer than k elements
    take part.
  """
  if bits_per_pass not in (1, 2, 4, 8):
    raise ValueError(f'bits_per_pass={bits_per_pass}: must be 1, 2, 4 or 8')
  axis %= x.ndim
  keys = _sortable(x.astype(jnp.float32))
  if where is not None:
    keys = jnp.where(where, keys, jnp.uint32(0))

  # Half the bits are half the memory to read, and twice the lanes.
  def search(keys):
    return _kth_largest_16_bits(keys, k, axis, axis_name, bits_per_pass)

  upper = (keys >> 16).astype(jnp.uint16)
  high = search(upper)
  among = jnp.expand_dims(high, axis)
  lower = jnp.where(upper > among, jnp.uint16(0xFFFF), jnp.uint16(0))
  lower = jnp.where(upper == among, keys.astype(jnp.uint16), lower)
  low = search(lower)
  key = high.astype(jnp.uint32) << 16 | low
  return jnp.where(key == 0, -jnp.inf, _from_sortable(key))


def kth_and_next_largest(
  x: jax.Array,
  k: int | jax.Array,
  *,
  axis: int,
  where: jax.Array | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  bits_per_pass: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Selects the k-th and (k+1)-th largest, for one pass more than the k-th.

  Args and values as of `kth_largest`; two more all-reduces of one number for
  each value of a result.
  """
  axis %= x.ndim
  kth = kth_largest(
    x,
    k,
    axis=axis,
    where=where,
    axis_name=axis_name,
    bits_per_pass=bits_per_pass,
  )
  keys = _sortable(x.astype(jnp.float32))
  if where is not None:
    keys = jnp.where(where, keys, jnp.uint32(0))
  key = _sortable(kth)
  below = jnp.where(keys < jnp.expand_dims(key, axis), keys, jnp.uint32(0))
  below = jnp.max(below, axis)
  count = _count_at_least(key, keys, axis, axis_name)
  if axis_name is not None:
    count = lax.psum(count, axis_name)
    below = lax.pmax(below, axis_name)
  below = jnp.where(below == 0, -jnp.inf, _from_sortable(below))
  return kth, jnp.where(count > k, kth, below)


def largest(x_TxE: jax.Array, k: int) -> jax.Array:
  """Selects each token's k largest values, in order, for a small k.

  One expert after the other is inserted into a sorted list of k, with tokens
  as vector lanes: 2 k operations an element, no communication however tokens
  are sharded.

  Args:
    x_TxE: values, any float dtype; compared in float32. NaN counts as -inf.
    k: 1 <= k <= experts.

  Returns:
    float32 [k, T], largest first.
  """

  def of_block(x_TxE):
    x_TxE = x_TxE.astype(jnp.float32)
    x_TxE = jnp.where(jnp.isnan(x_TxE), -jnp.inf, x_TxE)
    x_ExT = jnp.where(x_TxE == 0, 0.0, x_TxE).T  # -0.0 equals 0.0
    # Row 0, above all, is there so that every row has one before it.
    row = jnp.full_like(x_ExT[0], jnp.inf)
    top = jnp.stack([row] + [-row] * k)

    def insert(expert, top):
      new = jnp.maximum(top[1:], jnp.minimum(top[:-1], x_ExT[expert]))
      return top.at[1:].set(new)

    return lax.fori_loop(0, len(x_ExT), insert, top)[1:]

  tokens, experts = x_TxE.shape
  block = _TOKENS_IN_CACHE
  if jax.device_count() > 1 or tokens % block:
    return of_block(x_TxE)
  top_BxKxT = lax.map(of_block, x_TxE.reshape(-1, block, experts))
  return jnp.moveaxis(top_BxKxT, 0, 1).reshape(k, tokens)
