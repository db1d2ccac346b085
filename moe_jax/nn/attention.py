"""Causal grouped-query attention with rotary positions.

Shape letters: B batch, S sequence, D model, H query heads, G key/value heads,
W head width, C tokens that a cache has room for.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.nn import attention_kernels
from moe_jax.nn.config import DecoderConfig
from moe_jax.nn.feed_forward import linear, rms_norm
from moe_jax.nn.rotary import rotate


class KeyValueCache(NamedTuple):
  """Keys and values of the tokens so far.

  Attributes:
    key: [B, C, G, W], rotated.
    value: [B, C, G, W].
    length: int32 scalar, tokens in it.
  """

  key: jax.Array
  value: jax.Array
  length: jax.Array


# Queries are taken in blocks of so many. Those of one part are taken in turn,
# and see the keys up to the part's end; each part is compiled by itself.
_BLOCK, _PARTS = 256, 8


def attend(
  query_BxSxHxW,
  key_BxSxGxW,
  value_BxSxGxW,
  positions_BxS=None,
  *,
  scale=None,
  mesh=None,
):
  """Attends from each token to those up to it, of its document alone.

  By a kernel, or where there is none, from each block of queries to the keys up
  to the end of its part. With many parts that is half of the scores; the rest
  would be masked.
  """
  kernel = attention_kernels.find(
    query_BxSxHxW, documents=positions_BxS is not None, mesh=mesh
  )
  if kernel:
    arrays = query_BxSxHxW, key_BxSxGxW, value_BxSxGxW, positions_BxS
    return kernel(*arrays, scale=scale)
  sequence = query_BxSxHxW.shape[1]
  size = max(_BLOCK, -(-sequence // _PARTS))
  dtype, parts = query_BxSxHxW.dtype, []

  @jax.checkpoint  # Scores are not kept.
  def last(query, key, value, end, positions):
    seen = key.astype(dtype), value.astype(dtype)
    return attend_last(query, *seen, end, positions, scale=scale)

  # So that gradients of all blocks are summed in float32.
  keys = [x.astype(jnp.float32) for x in (key_BxSxGxW, value_BxSxGxW)]
  for start in range(0, sequence, size):
    end = min(start + size, sequence)
    seen = [x[:, :end] for x in keys]
    positions = None if positions_BxS is None else positions_BxS[:, start:end]
    query = query_BxSxHxW[:, start:end]
    count, rest = divmod(end - start, _BLOCK)
    if count < 2 or rest:
      parts.append(last(query, *seen, end, positions))
      continue

    def block(block, seen=seen):
      query, end, positions = block
      return last(query, *seen, end, positions)

    ends = start + _BLOCK * jnp.arange(1, count + 1)
    if positions is not None:
      positions = _split(positions, count)
    y = lax.map(block, (_split(query, count), ends, positions))
    parts.append(_joined(y))
  return jnp.concatenate(parts, axis=1)


def _split(x_BxSx_: jax.Array, count: int) -> jax.Array:
  """Returns [count, B, S / count, ...]."""
  batch = x_BxSx_.shape[0]
  return x_BxSx_.reshape(batch, count, -1, *x_BxSx_.shape[2:]).swapaxes(0, 1)


def _joined(x_NxBxSx_: jax.Array) -> jax.Array:
  """Inverts `_split`."""
  x_BxNxSx_ = x_NxBxSx_.swapaxes(0, 1)
  return x_BxNxSx_.reshape(x_BxNxSx_.shape[0], -1, *x_BxNxSx_.shape[3:])


def attend_last(
  query_BxSxHxW,
  key_BxCxGxW,
  value_BxCxGxW,
  length,
  positions_BxS=None,
  *,
  scale=None,
):
  """Attends from the last S of so many tokens, to all up to each of them.

  With positions in documents, to those of its document alone.
  """
  sequence, room = query_BxSxHxW.shape[1], key_BxCxGxW.shape[1]
  place_S = length - sequence + jnp.arange(sequence)
  mask = (jnp.arange(room) <= place_S[:, None])[None, None]
  if positions_BxS is not None:
    first_BxS = place_S - positions_BxS  # Place where the document begins.
    mask &= (jnp.arange(room) >= first_BxS[..., None])[:, None]
  return jax.nn.dot_product_attention(
    query_BxSxHxW, key_BxCxGxW, value_BxCxGxW, mask=mask, scale=scale
  )


class Attention(nnx.Module):
  """Causal self-attention; each key/value head serves H/G query heads.

  Args:
    config: sizes and options.
    mesh: of the devices that attend, see `attention_kernels.find`.
    rngs: for the initial weights.
  """

  def __init__(
    self, config: DecoderConfig, *, mesh: Mesh | None = None, rngs: nnx.Rngs
  ):
    self.config, self.mesh, width = config, mesh, config.width
    query_width = config.heads * config.head_width
    kv_width = config.kv_heads * config.head_width
    bias = config.attention_bias
    made = functools.partial(linear, dtype=config.dtype, rngs=rngs)
    self.query = made(width, query_width, bias=bias != 'none')
    self.key = made(width, kv_width, bias=bias != 'none')
    self.value = made(width, kv_width, bias=bias != 'none')
    self.out = made(query_width, width, bias=bias == 'all')
    if config.query_key_norm == 'head':
      query_width = kv_width = config.head_width
    norm = config.query_key_norm != 'none'
    self.query_norm = rms_norm(config, query_width, rngs=rngs) if norm else None
    self.key_norm = rms_norm(config, kv_width, rngs=rngs) if norm else None

  @jax.named_scope('attention')
  def __call__(
    self,
    x_BxSxD: jax.Array,
    cache: KeyValueCache | None = None,
    positions_BxS: jax.Array | None = None,
  ) -> tuple[jax.Array, KeyValueCache | None]:
    """Attends to the tokens before, those of the cache first.

    Args:
      x_BxSxD: [batch, sequence, model].
      cache: of the tokens before.
      positions_BxS: int32, of each token in its document, whose tokens alone
        are attended to; None where a sequence is one document.

    Returns:
      [B, S, D], and the cache with these tokens added.
    """
    config = self.config
    turn = turning(config, x_BxSxD, cache, positions_BxS)
    query = turn(
      self._heads(self.query(x_BxSxD), config.heads, self.query_norm)
    )
    key = turn(self._heads(self.key(x_BxSxD), config.kv_heads, self.key_norm))
    value = self._heads(self.value(x_BxSxD), config.kv_heads)
    scale = config.attention_scale
    if cache is None:
      y = attend(query, key, value, positions_BxS, scale=scale, mesh=self.mesh)
    else:
      cache = append(cache, key, value)
      y = attend_last(query, *cache, positions_BxS, scale=scale)
    return self.out(y.reshape(*x_BxSxD.shape[:2], -1)), cache

  def _heads(self, y, heads, norm=None):
    """Splits what was projected into heads, normalized and clipped."""
    config = self.config
    if norm is not None and config.query_key_norm == 'whole':
      y = norm(y)
    if most := config.query_key_value_clip:
      y = jnp.clip(y, -most, most)
    y = y.reshape(*y.shape[:2], heads, -1)
    heads_alone = norm is not None and config.query_key_norm == 'head'
    return norm(y) if heads_alone else y


def turning(
  config: DecoderConfig,
  x_BxSxD: jax.Array,
  cache: KeyValueCache | None,
  positions_BxS: jax.Array | None,
) -> Callable[[jax.Array], jax.Array]:
  """Returns `rotate` of heads [B, S, H, W] at the places of these tokens."""
  positions = positions_BxS
  if positions is None:
    start = 0 if cache is None else cache.length
    positions = start + jnp.arange(x_BxSxD.shape[1])
  return functools.partial(rotate, positions=positions, config=config)


def append(
  cache: KeyValueCache, key_BxSxGxW: jax.Array, value_BxSxGxW: jax.Array
) -> KeyValueCache:
  """Returns the cache with keys and values of S more tokens."""

  def add(old, new):
    return lax.dynamic_update_slice_in_dim(old, new, cache.length, axis=1)

  return KeyValueCache(
    add(cache.key, key_BxSxGxW),
    add(cache.value, value_BxSxGxW),
    cache.length + key_BxSxGxW.shape[1],
  )
