"""Exact order statistics by counting: no sort, any sharding, same bits.

Shape letters: T tokens, E experts, K largest.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

# XLA's CPU code passes a long reduction through memory, 32 elements at a time.
# Slices reduced element by element first are vector code: kth_largest of the
# columns of a [131072, 256] takes 0.22 s of processor time, without them 0.71.
_SLICES = 8
_BLOCK = 1024  # Tokens; 1 MB of scores at 256 experts.


def _slices(x: jax.Array, axis: int, split: bool) -> list[jax.Array]:
  """Splits `axis` into even parts, or into one where that is impossible."""
  even = split and x.shape[axis] % _SLICES == 0
  return jnp.split(x, _SLICES if even else 1, axis)


def _is_local(axis_name) -> bool:
  """Tells whether arrays lie on one device, so that splitting them is free.

  This is known inside `jax.shard_map` and where there is one device only.
  Elsewhere, splitting a sharded axis may cost an all-gather.
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
  """Inverts `_sortable`; 0, which stands for nothing, becomes -inf."""
  positive = key >> 31 == 1
  bits = jnp.where(positive, key & jnp.uint32((1 << 31) - 1), ~key)
  value = lax.bitcast_convert_type(bits, jnp.float32)
  return jnp.where(key == 0, -jnp.inf, value)


def _keys(x: jax.Array, where: jax.Array | None) -> jax.Array:
  keys = _sortable(x.astype(jnp.float32))
  return keys if where is None else jnp.where(where, keys, jnp.uint32(0))


def _count_at_least(thresholds, keys, axis, axis_name) -> jax.Array:
  """Counts on this shard, for a stack of thresholds of each slice."""
  if len(thresholds) == 1:
    parts = _slices(keys, axis, _is_local(axis_name))
    at_least = [part >= jnp.expand_dims(thresholds[0], axis) for part in parts]
    few = sum(part.astype(jnp.uint16) for part in at_least)
    return jnp.sum(few, axis, dtype=jnp.int32)[None]
  # One operation for all of them: on accelerators, starting it is what costs.
  at_least = keys >= jnp.expand_dims(thresholds, axis + 1)
  return jnp.sum(at_least, axis + 1, dtype=jnp.int32)


def total(x, axis_name: str | tuple[str, ...] | None):
  """Adds a pytree up over all shards; `axis_name` is None outside of them."""
  return x if axis_name is None else lax.psum(x, axis_name)


def _kth_largest_16_bits(keys, k, axis, axis_name, bits) -> jax.Array:
  """Selects from uint16, `bits` bits a pass; 0 where there are fewer than k."""
  digits = jnp.arange(1, 1 << bits, dtype=jnp.uint16)
  digits = digits.reshape(-1, *(1,) * (keys.ndim - 1))

  def narrow(step, low):
    shift = (16 - bits * (step + 1)).astype(jnp.uint16)
    thresholds = low + (digits << shift)
    count = total(_count_at_least(thresholds, keys, axis, axis_name), axis_name)
    # Counts fall as the digit rises, so this is the greatest that has k.
    return low + (jnp.sum(count >= k, 0, dtype=jnp.uint16) << shift)

  # The first step comes before the loop: in `jax.shard_map` its result, unlike
  # plain zeros, is known to differ over the same mesh axes as all the others.
  shape = keys.shape[:axis] + keys.shape[axis + 1 :]
  low = narrow(jnp.int32(0), jnp.zeros(shape, jnp.uint16))
  return lax.fori_loop(1, 16 // bits, narrow, low)


def _select_by_comparisons(
  keys, k, *, axis, axis_name, bits=None, following=False
) -> tuple[jax.Array, ...]:
  """Selects from uint32, as `_select`, `bits` a pass."""
  if bits is None:
    bits = 4 if axis_name is not None and lax.axis_size(axis_name) > 1 else 1
  # Half the bits are half the memory to read, and twice the lanes.
  upper = (keys >> 16).astype(jnp.uint16)
  high = _kth_largest_16_bits(upper, k, axis, axis_name, bits)
  among = jnp.expand_dims(high, axis)
  lower = jnp.where(upper > among, jnp.uint16(0xFFFF), jnp.uint16(0))
  lower = jnp.where(upper == among, keys.astype(jnp.uint16), lower)
  low = _kth_largest_16_bits(lower, k, axis, axis_name, bits)
  key = high.astype(jnp.uint32) << 16 | low
  if not following:
    return (key,)
  (count,) = _count_at_least(key[None], keys, axis, axis_name)
  count = total(count, axis_name)
  parts = _slices(keys, axis, _is_local(axis_name))
  at = jnp.expand_dims(key, axis)
  below = functools.reduce(
    jnp.maximum, [jnp.where(part < at, part, jnp.uint32(0)) for part in parts]
  )
  below = _greatest(jnp.max(below, axis), axis_name)
  return key, jnp.where(count > k, key, below)


def _greatest(x, axis_name):
  """Takes the maximum over all shards."""
  return x if axis_name is None else lax.pmax(x, axis_name)


def histogram(values: jax.Array, side: int) -> jax.Array:
  """Counts each of the numbers below side^2 along the last axis.

  By a product of one-hot halves, as of two digits: of 8,192 numbers below 256
  of 64 experts, the compiler of v5e takes 17 microseconds for these 256 counts,
  and for 15 counts by comparisons 54.

  Args:
    values: uint32 [..., T]; those of side^2 and more are counted nowhere.
    side: of the square of counts.

  Returns:
    int32 [..., side^2].
  """

  def one_hot(digit):
    numbers = jnp.arange(side, dtype=jnp.uint32)[:, None]
    return (digit[..., None, :] == numbers).astype(jnp.int8)

  counts = jnp.einsum(
    '...ut,...lt->...ul',
    one_hot(values // side),
    one_hot(values % side),
    preferred_element_type=jnp.int32,
  )
  return counts.reshape(*values.shape[:-1], side**2)


def _sum_where(condition, count):
  return jnp.sum(jnp.where(condition, count, 0), -1, keepdims=True)


# Traced once for all passes.
@functools.partial(jax.jit, static_argnames='axis_name')
def _next_digit(keys, key, rank, shift, axis_name):
  """Finds the next 8 bits of the key of that rank, of keys that begin alike."""
  begins = lax.shift_right_logical(keys, shift + 8) == key  # By 32, it is 0.
  digits = jnp.where(begins, keys >> shift & 255, 256)
  count = total(histogram(digits, 16), axis_name)
  at_least = lax.cumsum(count, count.ndim - 1, reverse=True)
  digit = jnp.sum(at_least[..., 1:] >= rank, -1, keepdims=True)
  rank = rank - _sum_where(jnp.arange(256) > digit, count)
  return digit, key << 8 | digit.astype(jnp.uint32), rank, count


def _select_by_histograms(
  keys, k, *, axis, axis_name, following=False
) -> tuple[jax.Array, ...]:
  """Selects from uint32, as `_select`, by histograms of 8 bits."""
  keys = jnp.moveaxis(keys, axis, -1)
  key = jnp.zeros((*keys.shape[:-1], 1), jnp.uint32)
  rank = jnp.full(key.shape, k, jnp.int32)
  for shift in (24, 16, 8, 0):
    start = key
    digit, key, rank, count = _next_digit(
      keys, key, rank, jnp.uint32(shift), axis_name
    )
  if not following:
    return (key[..., 0],)
  # The next one may begin otherwise; this maximum waits for no last count.
  below = jnp.where(keys >> 8 < start, keys, jnp.uint32(0))
  below = _greatest(jnp.max(below, -1, keepdims=True), axis_name)
  value = jnp.arange(256)
  smaller = jnp.where((value < digit) & (count > 0), value, -1)
  smaller = jnp.max(smaller, -1, keepdims=True)
  below = jnp.where(smaller < 0, below, start << 8 | smaller.astype(jnp.uint32))
  equal = _sum_where(value == digit, count)
  return key[..., 0], jnp.where(equal > rank, key, below)[..., 0]


def _select(keys, k, *, bits=None, **given) -> tuple[jax.Array, ...]:
  """Selects the k-th largest and, if `following`, the (k+1)-th.

  From uint32; 0 where there are fewer.
  """
  if bits not in (None, 1, 2, 4, 8):
    raise ValueError(f'bits_per_pass={bits}: must be 1, 2, 4 or 8')
  if isinstance(k, int) and k < 1:
    raise ValueError(f'k={k}: ranks are counted from 1')
  if bits == 8 or (bits is None and _for_tpus()):
    return _select_by_histograms(keys, k, **given)
  return _select_by_comparisons(keys, k, bits=bits, **given)


def _for_tpus() -> bool:
  """Tells what is being traced for: the devices of the mesh, or the default.

  `lax.platform_dependent` would trace both ways of selection, which takes a
  second of a train step's time to its first step.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (device.platform if device else jax.default_backend()) == 'tpu'


def kth_largest(
  x: jax.Array,
  k: int | jax.Array,
  *,
  axis: int,
  where: jax.Array | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  bits_per_pass: int | None = None,
) -> jax.Array:
  """Selects the exact k-th largest value, counting duplicates.

  The answer is built from its first bit on: 32 times, count the elements at or
  above a threshold. A count is an integer, so the result has the same bits
  however `axis` is sharded. With b = `bits_per_pass`, a call costs 32 / b
  all-reduces of 2^b - 1 int32 counts for each value of the result (b = 1: 32 of
  one; 2: 16 of 3; 4: 8 of 15), and as many comparisons of each element: b > 1
  pays where latency is what costs. With b = 8, 4 histograms of 256 counts are
  made by products of one-hot matrices instead.

  Args:
    x: values, any float dtype; compared in float32. NaN orders below -inf.
      Where the backend flushes subnormal numbers, below 1.2e-38, to 0 (CPUs
      do), they count as 0 and 0 is returned for them.
    k: rank from 1, the same for every slice; may be traced.
    axis: the axis to select along.
    where: False excludes an element; broadcasts against `x`.
    axis_name: mesh axes over which `axis` is split, inside `jax.shard_map`.
    bits_per_pass: 1, 2, 4 or 8; by default 8 on TPUs, and elsewhere 4 where
      all-reduces are needed, else 1.

  Returns:
    float32, the shape of `x` without `axis`. -inf where fewer than k elements
    take part.
  """
  axis %= x.ndim
  keys = _keys(x, where)
  (key,) = _select(keys, k, axis=axis, axis_name=axis_name, bits=bits_per_pass)
  return _from_sortable(key)


def kth_and_next_largest(
  x: jax.Array,
  k: int | jax.Array,
  *,
  axis: int,
  where: jax.Array | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  bits_per_pass: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Selects the k-th and (k+1)-th largest, for one pass more than the k-th.

  Args and values are those of `kth_largest`. Two more all-reduces of one
  number for each value of a result; by histograms one, beside the last.
  """
  axis %= x.ndim
  found = _select(
    _keys(x, where),
    k,
    axis=axis,
    axis_name=axis_name,
    bits=bits_per_pass,
    following=True,
  )
  key, following = map(_from_sortable, found)
  return key, following


def _largest(x_ExT: jax.Array, k: int) -> jax.Array:
  """Inserts one expert after the other into each token's sorted k largest.

  Returns [1 + k, T]: row 0 is inf, so that every row has one before it.
  """
  row = jnp.full_like(x_ExT[0], jnp.inf)
  top = jnp.stack([row] + [-row] * k)

  def insert(expert, top):
    new = jnp.maximum(top[1:], jnp.minimum(top[:-1], x_ExT[expert]))
    return lax.dynamic_update_slice(top, new, (1, 0))

  return lax.fori_loop(0, len(x_ExT), insert, top)


def _by_blocks(select, x_TxE: jax.Array, block: int) -> jax.Array:
  """Applies `select`, [E, T] -> [K, T], to blocks of tokens; gives [T, K].

  One CPU takes blocks that stay in its cache; all others take all at once.
  Tokens are the vector lanes: no communication, however they are sharded.
  """
  tokens, experts = x_TxE.shape
  one_cpu = jax.default_backend() == 'cpu' and jax.device_count() == 1
  if not one_cpu or not tokens or tokens % block:
    return select(jnp.transpose(x_TxE)).T
  blocks = x_TxE.reshape(-1, block, experts)
  return lax.map(lambda x: select(x.T).T, blocks).reshape(tokens, -1)


def kth_and_next_of_row(
  x_TxE: jax.Array, k: int, *, minus_E: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """Selects each token's k-th and (k+1)-th largest, without communication.

  Args:
    x_TxE: values, any float dtype; compared in float32. NaN counts as -inf.
    k: 1 <= k < experts; small.
    minus_E: subtracted first. It is an argument so that the difference need
      not be stored.

  Returns:
    float32 [T] each.
  """

  def adjusted(x, minus):
    x = x.astype(jnp.float32) - minus
    x = jnp.where(jnp.isnan(x), -jnp.inf, x)
    return jnp.where(x == 0, 0.0, x)  # -0.0 equals 0.0

  def by_insertion(x_TxE, minus_E):
    def select(x_ExT):
      return _largest(adjusted(x_ExT, minus_E[:, None]), k + 1)[-2:]

    return _by_blocks(select, x_TxE, _BLOCK)

  def by_top_k(x_TxE, minus_E):
    return lax.top_k(adjusted(x_TxE, minus_E), k + 1)[0][:, -2:]

  pair_Tx2 = lax.platform_dependent(
    x_TxE,
    jnp.broadcast_to(minus_E, x_TxE.shape[1:]),
    cpu=by_insertion,
    default=by_top_k,
  )
  return pair_Tx2[:, 0], pair_Tx2[:, 1]


def top_k(x_TxE: jax.Array, k: int) -> jax.Array:
  """Returns the indices `lax.top_k` does, for few k; faster on CPU.

  Args:
    x_TxE: float32 without NaN and -0.0.
    k: 1 <= k <= experts; small.

  Returns:
    int32 [T, k], the largest first, the lower index first among equals.
  """

  def select(x_ExT):
    experts = len(x_ExT)
    index_E = jnp.arange(experts, dtype=jnp.int32)[:, None]
    top = _largest(x_ExT, k)
    found = [jnp.full_like(top[0], -1, jnp.int32)]
    for i in range(1, k + 1):
      # Equal values take turns.
      after = jnp.where(top[i] == top[i - 1], found[-1], -1)
      fits = (x_ExT == top[i]) & (index_E > after)
      parts = _slices(jnp.where(fits, index_E, experts), 0, True)
      found.append(jnp.min(functools.reduce(jnp.minimum, parts), 0))
    return jnp.stack(found[1:])

  # Each of the k searches passes over a block: few and large ones are better.
  block = max(1, _BLOCK * 256 // x_TxE.shape[1])
  return lax.platform_dependent(
    x_TxE,
    cpu=lambda x_TxE: _by_blocks(select, x_TxE, block),
    default=lambda x_TxE: lax.top_k(x_TxE, k)[1].astype(jnp.int32),
  )
