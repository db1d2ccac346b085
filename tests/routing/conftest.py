import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope='module')
def scores():
  """Softmax scores with a preferred expert, [256, 8]."""
  generator = np.random.default_rng(1)
  logits = generator.normal(size=(256, 8)) + 2 * np.eye(8)[3]
  return jax.nn.softmax(jnp.asarray(logits, jnp.float32))
