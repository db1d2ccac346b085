"""Programs as users run them: optimizations join operations and their rounding.

`make test` compiles all others quickly, without.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(autouse=True, scope='module')
def optimizations():
  if not os.environ.get('JAX_DISABLE_MOST_OPTIMIZATIONS'):
    yield
    return
  for quickly in (False, True):
    jax.clear_caches()
    jax.config.update('jax_disable_most_optimizations', quickly)
    if not quickly:
      yield


@pytest.fixture(scope='module')
def scores():
  """Softmax scores with a preferred expert, [256, 8]."""
  generator = np.random.default_rng(1)
  logits = generator.normal(size=(256, 8)) + 2 * np.eye(8)[3]
  return jax.nn.softmax(jnp.asarray(logits, jnp.float32))
