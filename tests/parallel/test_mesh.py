"""Sizes of the mesh, and errors that name sizes that would work."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import pytest

from moe_jax.parallel import mesh as meshes


@pytest.mark.parametrize(
  ('data', 'expert', 'shape'),
  [
    (-1, 1, (8, 1)),
    (-1, 4, (2, 4)),
    (2, -1, (2, 4)),
    (8, -1, (8, 1)),
    (4, 2, (4, 2)),
  ],
)
def test_sizes(data, expert, shape):
  mesh = meshes.make_mesh(data, expert)
  assert mesh.axis_names == ('data', 'expert')
  assert mesh.devices.shape == shape
  assert set(mesh.devices.flat) == set(jax.devices())


def test_takes_the_devices_it_is_given():
  mesh = meshes.make_mesh(1, -1, devices=jax.devices()[2:5])
  assert list(mesh.devices.flat) == jax.devices()[2:5]


def test_the_batch_is_split_over_both_axes():
  mesh = meshes.make_mesh(4, 2)
  x = jnp.arange(16)
  shards = jax.device_put(
    x, NamedSharding(mesh, meshes.BATCH)
  ).addressable_shards
  np.testing.assert_array_equal(np.concatenate([s.data for s in shards]), x)


@pytest.mark.parametrize(
  ('data', 'expert', 'words'),
  [
    (3, 1, ['mesh.data=3', '8 device', '1x8', '2x4', '4x2', '8x1']),
    (-1, 3, ['mesh.expert=3', '8 device', '2x4']),
    (2, 2, ['mesh.data=2', 'mesh.expert=2', '2x4']),
    (16, -1, ['mesh.data=16', '8x1']),
    (-1, -1, ['mesh.data=-1', 'mesh.expert=-1', 'one']),
    (0, 1, ['mesh.data=0', '1 or more']),
    (1, -2, ['mesh.expert=-2', '1 or more']),
  ],
)
def test_errors_name_what_would_work(data, expert, words):
  with pytest.raises(ValueError) as error:
    meshes.make_mesh(data, expert)
  assert all(word in str(error.value) for word in words), error.value
