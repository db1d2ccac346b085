"""Programs as users run them: optimizations join operations and their rounding.

`make test` compiles all others quickly, without.
"""

import os

import jax
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
