"""The dense feed-forward layer and the initialisation all layers share."""

from flax import nnx
import jax
from jax import lax
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
    dot_general=lambda x, kernel, *_, **__: _matmul(x, kernel),
    rngs=rngs,
  )


@jax.custom_vjp
def _matmul(x: jax.Array, kernel_DxF: jax.Array) -> jax.Array:
  """Returns x @ kernel; for the kernel's gradient, transposes the narrower.

  Autodiff transposes dy, which in a SwiGLU is the wider: on CPUs another pass
  over silu's derivative, in the wrong order.
  """
  return x @ kernel_DxF


def _matmul_forward(x, kernel_DxF):
  return x @ kernel_DxF, (x, kernel_DxF)


def _matmul_backward(residuals, dy):
  x, kernel_DxF = residuals
  tokens = tuple(range(x.ndim - 1))
  sum_over_tokens = (tokens, tokens), ((), ())
  if x.shape[-1] <= dy.shape[-1]:
    dkernel_DxF = lax.dot_general(x, dy, sum_over_tokens)
  else:
    dkernel_DxF = lax.dot_general(dy, x, sum_over_tokens).T
  return dy @ kernel_DxF.T, dkernel_DxF


_matmul.defvjp(_matmul_forward, _matmul_backward)


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
