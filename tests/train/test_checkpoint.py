"""A checkpoint holds everything that a router remembers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.parallel import mesh as meshes
from moe_jax.train import checkpoint as checkpoint_lib
from moe_jax.train import optimizer
from moe_jax.train import state as state_lib
from tests.train import tiny


@pytest.mark.parametrize('method', ['midpoint_lag', 'quantile_histogram'])
def test_pending_prices_and_histograms_come_back(method, tmp_path):
  config = tiny.tiny_config(tmp_path, method)
  mesh = meshes.make_mesh(1, 1, devices=jax.devices()[:1])
  training = state_lib.make_training(
    config, optimizer.make_optimizer(config), mesh
  )
  state = training.init()
  leaves, structure = jax.tree.flatten(state.router)
  leaves = [
    leaf + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape) + i
    for i, leaf in enumerate(leaves)
  ]
  state = state._replace(router=structure.unflatten(leaves))
  shapes = {leaf.shape for leaf in leaves}
  layers, experts = config.model.layers, config.model.experts
  if method == 'midpoint_lag':
    assert len(leaves) == 2 and shapes == {(layers, experts)}
  else:
    assert (layers, experts, 1000) in shapes
  with checkpoint_lib.Checkpoints(tmp_path / 'saved', config) as checkpoints:
    checkpoints.save(3, state)
    restored, sequence = checkpoints.restore(3, training.abstract)
    saved = checkpoints.saved_config(3)
  jax.tree.map(np.testing.assert_array_equal, restored.router, state.router)
  assert sequence == 3 * config.batch_size
  assert saved['balancer'] == config.balancer
