"""How far loads are from even. The paper's MaxVio and its mirror image."""

import jax
import jax.numpy as jnp


def _relative_to_even(
  load_E: jax.Array, extreme: jax.Array, total
) -> jax.Array:
  total = jnp.sum(load_E, axis=-1) if total is None else total
  even = jnp.asarray(total, jnp.float32) / load_E.shape[-1]
  return jnp.where(even > 0, extreme / jnp.where(even > 0, even, 1) - 1, 0.0)


def max_violation(
  load_E: jax.Array, *, total: int | jax.Array | None = None
) -> jax.Array:
  """Computes MaxVio = (greatest load) / (even load) - 1.

  Args:
    load_E: tokens per expert, integers [..., E].
    total: choices made, n k; by default the sum of the loads. Give it where
      loads exclude dropped tokens.

  Returns:
    float32 [...]: 0 is perfect balance, E - 1 one expert that takes all, 0
    also where there is no token.

  References:
    Wang et al., arXiv 2408.15664, section 3; Sun, arXiv 2502.15451, section 4.
  """
  return _relative_to_even(load_E, jnp.max(load_E, axis=-1), total)


def min_violation(
  load_E: jax.Array, *, total: int | jax.Array | None = None
) -> jax.Array:
  """Computes MinVio = (least load) / (even load) - 1, from -1 (idle) to 0."""
  return _relative_to_even(load_E, jnp.min(load_E, axis=-1), total)
