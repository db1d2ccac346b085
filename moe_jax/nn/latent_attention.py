"""Causal attention to keys and values made of one latent vector a token (MLA).

Shape letters: B batch, S sequence, D model, H heads, W head width, R entries of
it that turn, N the others, V width of a head's values, M latent vector, C
tokens that a cache has room for.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.nn.attention import (
  KeyValueCache,
  append,
  attend,
  attend_last,
  turning,
)
from moe_jax.nn.config import DecoderConfig
from moe_jax.nn.feed_forward import linear, rms_norm

_EPSILON = 1e-6  # Of the latent vectors' norms, whatever that of the others.


class LatentAttention(nnx.Module):
  """Causal self-attention whose cache keeps M + R numbers a token.

  The first R entries of a head turn with the position; their key is one for
  all heads. A cache has it as `key` [B, C, 1, R], and the latent vectors as
  `value` [B, C, 1, M].

  References:
    DeepSeek-AI, arXiv 2405.04434, section 2.1.
  """

  def __init__(
    self, config: DecoderConfig, *, mesh: Mesh | None = None, rngs: nnx.Rngs
  ):
    self.config, self.mesh = config, mesh
    width, heads, latent = config.width, config.heads, config.latent_size
    made = functools.partial(linear, dtype=config.dtype, rngs=rngs)
    norm = functools.partial(rms_norm, config, epsilon=_EPSILON, rngs=rngs)
    query_latent = config.query_latent_size
    self.query_latent = made(width, query_latent) if query_latent else None
    self.query_norm = norm(query_latent) if query_latent else None
    self.query = made(query_latent or width, heads * config.head_width)
    self.latent = made(width, latent + config.rotary_size)
    self.latent_norm = norm(latent)
    fixed = config.head_width - config.rotary_size
    self.key_value = made(latent, heads * (fixed + config.value_width))
    self.out = made(heads * config.value_width, width)

  @jax.named_scope('attention')
  def __call__(
    self,
    x_BxSxD: jax.Array,
    cache: KeyValueCache | None = None,
    positions_BxS: jax.Array | None = None,
  ) -> tuple[jax.Array, KeyValueCache | None]:
    """Attends as `Attention` does."""
    config = self.config
    turn = turning(config, x_BxSxD, cache, positions_BxS)
    query = x_BxSxD
    if self.query_latent is not None:
      query = self.query_norm(self.query_latent(query))
    query = self.query(query)
    query = turn(query.reshape(*query.shape[:2], config.heads, -1))
    latent, key = jnp.split(self.latent(x_BxSxD), [config.latent_size], axis=-1)
    latent = self.latent_norm(latent)
    key_BxSx1xR = turn(key[:, :, None])
    if cache is None:
      y = self._attend(query, latent, key_BxSx1xR, positions_BxS)
    else:
      cache = append(cache, key_BxSx1xR, latent[:, :, None])
      y = self._attend_to_latent(query, cache, positions_BxS)
    return self.out(y.reshape(*x_BxSxD.shape[:2], -1)), cache

  def _attend(self, query_BxSxHxW, latent_BxSxM, key_BxSx1xR, positions_BxS):
    """Attends to every head's own keys and values."""
    config, width = self.config, self.config.head_width
    fixed = width - config.rotary_size
    made = self.key_value(latent_BxSxM)
    made = made.reshape(*made.shape[:2], config.heads, -1)
    key_BxSxHxN, value_BxSxHxV = jnp.split(made, [fixed], axis=-1)
    shape = (*key_BxSxHxN.shape[:3], config.rotary_size)
    key = jnp.concatenate(
      [jnp.broadcast_to(key_BxSx1xR, shape), key_BxSxHxN], axis=-1
    )
    # All must be of one width; zeros change nothing.
    most = max(width, config.value_width)
    heads = [
      jnp.pad(x, ((0, 0),) * 3 + ((0, most - x.shape[-1]),))
      for x in (query_BxSxHxW, key, value_BxSxHxV)
    ]
    y = attend(
      *heads, positions_BxS, scale=config.attention_scale, mesh=self.mesh
    )
    return y[..., : config.value_width]

  def _attend_to_latent(self, query_BxSxHxW, cache, positions_BxS):
    """Attends to the latent vectors, so that no keys and values are made.

    The matrices that would make them are applied to queries and outputs.
    """
    config, rotary = self.config, self.config.rotary_size
    made = self.key_value.kernel[...].astype(query_BxSxHxW.dtype)
    made = made.reshape(config.latent_size, config.heads, -1)
    key_MxHxN, value_MxHxV = jnp.split(
      made, [config.head_width - rotary], axis=-1
    )
    turned, fixed = jnp.split(query_BxSxHxW, [rotary], axis=-1)
    fixed_BxSxHxM = jnp.einsum('bshn,mhn->bshm', fixed, key_MxHxN)
    seen = jnp.concatenate([cache.key, cache.value], axis=-1)
    y = attend_last(
      jnp.concatenate([turned, fixed_BxSxHxM], axis=-1),
      seen,
      seen,
      cache.length,
      positions_BxS,
      scale=config.attention_scale,
    )
    return jnp.einsum('bshm,mhv->bshv', y[..., rotary:], value_MxHxV)
