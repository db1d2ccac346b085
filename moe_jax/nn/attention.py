"""Causal grouped-query attention with rotary positions.

Shape letters: B batch, S sequence, D model, H query heads, G key/value heads,
W head width.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from moe_jax.nn.feed_forward import linear


def rotate(x_BxSxHxW: jax.Array, *, theta: float) -> jax.Array:
  """Rotates each pair of neighbouring entries by its position's angle.

  Entries (2j, 2j+1) of position s turn by s * theta^(-2j/W), in float32. The
  pairs are interleaved, as in the paper, not the two halves of a head.

  References:
    Su et al., arXiv 2104.09864, equation 34.
  """
  sequence, width = x_BxSxHxW.shape[1], x_BxSxHxW.shape[-1]
  frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  angle = jnp.arange(sequence, dtype=jnp.float32)[:, None] * frequency
  cos, sin = (f(angle)[:, None, :] for f in (jnp.cos, jnp.sin))
  pairs = x_BxSxHxW.astype(jnp.float32).reshape(*x_BxSxHxW.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return turned.reshape(x_BxSxHxW.shape).astype(x_BxSxHxW.dtype)


@jax.checkpoint  # Keeps no [B, H, S, S] array for the backward pass.
def _attend(query_BxSxHxW, key_BxSxGxW, value_BxSxGxW):
  return jax.nn.dot_product_attention(
    query_BxSxHxW, key_BxSxGxW, value_BxSxGxW, is_causal=True
  )


class Attention(nnx.Module):
  """Causal self-attention; each key/value head serves H/G query heads."""

  def __init__(
    self,
    width: int,
    *,
    heads: int,
    kv_heads: int,
    rope_theta: float,
    dtype,
    rngs: nnx.Rngs,
  ):
    head_width = width // heads
    self.heads, self.kv_heads, self.rope_theta = heads, kv_heads, rope_theta
    kv_width = kv_heads * head_width
    self.query = linear(width, width, dtype=dtype, rngs=rngs)
    self.key = linear(width, kv_width, dtype=dtype, rngs=rngs)
    self.value = linear(width, kv_width, dtype=dtype, rngs=rngs)
    self.out = linear(width, width, dtype=dtype, rngs=rngs)

  @jax.named_scope('attention')
  def __call__(self, x_BxSxD: jax.Array) -> jax.Array:
    def split(y, heads):
      return y.reshape(*x_BxSxD.shape[:2], heads, -1)

    query = rotate(
      split(self.query(x_BxSxD), self.heads), theta=self.rope_theta
    )
    key = rotate(split(self.key(x_BxSxD), self.kv_heads), theta=self.rope_theta)
    value = split(self.value(x_BxSxD), self.kv_heads)
    y = _attend(query, key, value)
    return self.out(y.reshape(x_BxSxD.shape))
