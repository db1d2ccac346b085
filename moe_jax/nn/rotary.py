"""Rotary positions, also stretched to longer texts than a model was trained on.

Shape letters: B batch, S sequence, H heads, W head width.
"""

import math

import jax
import jax.numpy as jnp

from moe_jax.nn.config import DecoderConfig


def rotate(
  x_BxSxHxW: jax.Array, positions: jax.Array, config: DecoderConfig
) -> jax.Array:
  """Turns each pair of neighbouring entries by its position's angle.

  Entries (2j, 2j+1) of position s turn by s times the j-th frequency, in
  float32. The pairs are interleaved, as in the paper, not the two halves of a
  head.

  Args:
    x_BxSxHxW: [batch, sequence, heads, head width].
    positions: int32 [B, S], or [S] where all sequences have the same.
    config: of which the first `rotary_size` entries turn.

  References:
    Su et al., arXiv 2104.09864, equation 34.
  """
  size, width = config.rotary_size, x_BxSxHxW.shape[-1]
  if 0 < size < width:
    turning, rest = jnp.split(x_BxSxHxW, [size], axis=-1)
    turned = rotate(turning, positions, config)
    return jnp.concatenate([turned, rest], axis=-1)
  angle = positions.astype(jnp.float32)[..., None] * frequencies(config, width)
  cos, sin = (f(angle)[..., None, :] for f in (jnp.cos, jnp.sin))
  if config.rope_magnitude != 1:
    cos, sin = config.rope_magnitude * cos, config.rope_magnitude * sin
  pairs = x_BxSxHxW.astype(jnp.float32).reshape(*x_BxSxHxW.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return turned.reshape(x_BxSxHxW.shape).astype(x_BxSxHxW.dtype)


def frequencies(config: DecoderConfig, width: int) -> jax.Array:
  """Returns the angle from a position to the next, of each pair of entries.

  theta^(-2j/W); where stretched by YaRN, slow ones are divided by the factor,
  fast ones are kept, and those between pass linearly from one to the other.

  Returns:
    float32 [W / 2], radians.

  References:
    Peng et al., arXiv 2309.00071, section 3.2.
  """
  base, factor = config.rope_theta, config.rope_factor
  frequency = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  if factor == 1:
    return frequency

  def pair(turns: float) -> float:
    """Returns which pair turns so often over `rope_length` tokens."""
    angle = turns * 2 * math.pi / config.rope_length
    return -width * math.log(angle) / (2 * math.log(base))

  first = max(math.floor(pair(config.rope_fast)), 0)
  last = min(math.ceil(pair(config.rope_slow)), width - 1)
  length = max(last - first, 1e-3)
  divided = jnp.clip((jnp.arange(width // 2) - first) / length, 0, 1)
  return frequency * (1 - divided + divided / factor)
