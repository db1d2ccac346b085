"""Gradients of linear layers, which are not autodiff's."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.nn import feed_forward


@pytest.mark.parametrize(('inputs', 'outputs'), [(4, 6), (6, 4)])
def test_gradients_of_a_linear_layer_are_those_of_a_product(inputs, outputs):
  layer = feed_forward.linear(
    inputs, outputs, dtype='float32', rngs=nnx.Rngs(0)
  )
  graphdef, params = nnx.split(layer)
  kernel, random = params['kernel'][...], np.random.default_rng(0)
  x, dy = (
    random.normal(size=(2, 3, inputs)),
    random.normal(size=(2, 3, outputs)),
  )
  x, dy = jnp.asarray(x, jnp.float32), jnp.asarray(dy, jnp.float32)

  def apply(x, kernel):
    params['kernel'] = nnx.Param(kernel)
    return nnx.merge(graphdef, params)(x)

  y, pullback = jax.vjp(apply, x, kernel)
  expected, expected_pullback = jax.vjp(jnp.matmul, x, kernel)
  np.testing.assert_allclose(y, expected, rtol=1e-6)
  for actual, wanted in zip(pullback(dy), expected_pullback(dy), strict=True):
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)
