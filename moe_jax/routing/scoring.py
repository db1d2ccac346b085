"""From the router's logits to scores."""

import jax
import jax.numpy as jnp


def softmax(logits_xE: jax.Array) -> jax.Array:
  """Returns scores that sum to 1 over the experts."""
  return jax.nn.softmax(logits_xE)


def sigmoid(logits_xE: jax.Array) -> jax.Array:
  """Returns a score in [0, 1] for each expert by itself (DeepSeek-V3)."""
  return jax.nn.sigmoid(logits_xE)


def sqrt_softplus(logits_xE: jax.Array) -> jax.Array:
  """Returns sqrt(log(1 + exp(z))): exp(z / 2) far below 0, sqrt(z) above."""
  # There the root's slope overflows, and log(1 + exp(z)) is exp(z).
  low_xE = logits_xE < -20
  inner_xE = jnp.where(low_xE, 0.0, logits_xE)
  root_xE = jnp.sqrt(jax.nn.softplus(inner_xE))
  return jnp.where(low_xE, jnp.exp(jnp.minimum(logits_xE, 0) / 2), root_xE)


SCORINGS = {
  'softmax': softmax,
  'sigmoid': sigmoid,
  'sqrt_softplus': sqrt_softplus,
}
"""The functions by name."""
