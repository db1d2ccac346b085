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


MESHES = (
  (1, 1, False),
  (2, 1, False),
  (1, 2, False),
  (4, 2, True),
  (2, 4, False),
  (1, 8, False),
  (8, 1, True),
  (1, 1, False),
)


@pytest.mark.parametrize(
  'path',
  [
    # Fewer and more devices, both axes, with and without fsdp.
    pytest.param([MESHES[i] for i in (0, 3, 5, 7)], id='quick'),
    pytest.param(MESHES, id='all', marks=pytest.mark.long),
  ],
)
def test_checkpoints_move_between_meshes(path, tmp_path):
  """Saved on one mesh, restored on the next, every bit and every sharding."""
  first = None
  directory = tmp_path / 'saved'
  for step, (data, expert, fsdp) in enumerate(path):
    config = tiny.tiny_config(
      tmp_path, **{'mesh.fsdp': fsdp, 'model.remat': fsdp}
    )
    mesh = meshes.make_mesh(
      data, expert, devices=jax.devices()[: data * expert]
    )
    training = state_lib.make_training(
      config, optimizer.make_optimizer(config), mesh
    )
    with checkpoint_lib.Checkpoints(directory, config) as checkpoints:
      if first is None:
        state = training.init()
        first = jax.device_get(state)
      else:
        state, _ = checkpoints.restore(step - 1, training.abstract)
      planned = jax.tree.leaves(training.abstract)
      for leaf, plan in zip(jax.tree.leaves(state), planned, strict=True):
        assert leaf.sharding == plan.sharding
      jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(state)._replace(step=0),
        first._replace(step=0),
      )
      checkpoints.save(step, state)
