"""The dense feed-forward layer and the initialisation all layers share."""

from flax import nnx
import jax
import jax.numpy as jnp

from moe_jax.nn.config import DecoderConfig
from moe_jax.parallel.dispatch import swiglu


def linear_init(*, batch_axis: int | tuple[int, ...] = ()):
  """Draws weights [..., in, out] from U(-1/sqrt(in), 1/sqrt(in)).

  This is what MiniMind starts from (PyTorch's default for a linear layer).
  """
  return nnx.initializers.variance_scaling(
    1 / 3, 'fan_in', 'uniform', batch_axis=batch_axis
  )


def linear(
  inputs: int, outputs: int, *, bias: bool = False, dtype: str, rngs: nnx.Rngs
) -> nnx.Linear:
  """Builds a linear layer: float32 weights, compute in dtype."""
  return nnx.Linear(
    inputs,
    outputs,
    use_bias=bias,
    dtype=jnp.dtype(dtype),
    kernel_init=linear_init(),
    rngs=rngs,
  )


class SwiGLU(nnx.Module):
  """down(silu(gate(x)) * up(x)).

  References:
    Shazeer, arXiv 2002.05202, equation 6.
  """

  def __init__(self, width: int, hidden: int, *, dtype: str, rngs: nnx.Rngs):
    self.gate = linear(width, hidden, dtype=dtype, rngs=rngs)
    self.up = linear(width, hidden, dtype=dtype, rngs=rngs)
    self.down = linear(hidden, width, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return swiglu(self.gate(x), self.up(x), self.down)


def rms_norm(
  config: DecoderConfig,
  width: int | None = None,
  *,
  epsilon: float | None = None,
  rngs: nnx.Rngs,
) -> nnx.RMSNorm:
  """Builds x / sqrt(mean(x^2) + epsilon) * scale, reduced in float32."""
  return nnx.RMSNorm(
    width or config.width,
    epsilon=epsilon or config.norm_epsilon,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.float32,
    rngs=rngs,
  )
