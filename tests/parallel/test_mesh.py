"""Sizes of the mesh, and errors that name sizes that would work."""

import dataclasses
import itertools
import math

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


@dataclasses.dataclass(frozen=True)
class Described:
  """All that is asked of a device that is not here."""

  id: int
  process_index: int
  slice_index: int | None
  device_kind: str
  platform: str = 'tpu'
  coords: tuple[int, ...] = ()
  core_on_chip: int = 0


def pod(kind, sides, slices=1):
  """Describes slices of TPUs; a host has four chips."""
  places = list(itertools.product(*(range(side) for side in reversed(sides))))
  return [
    Described(
      id=part * len(places) + i,
      process_index=(part * len(places) + i) // 4,
      slice_index=part if slices > 1 else None,
      device_kind=kind,
      coords=(*reversed(place), 0)[:3],
    )
    for part in range(slices)
    for i, place in enumerate(places)
  ]


def gpus(nodes, of_a_node=8, processes_a_node=1):
  """Describes nodes of GPUs, each of which jax calls a slice."""
  return [
    Described(
      id=i,
      process_index=i * processes_a_node // of_a_node,
      slice_index=i // of_a_node,
      device_kind='NVIDIA H100 80GB HBM3',
      platform='gpu',
    )
    for i in range(nodes * of_a_node)
  ]


def spans(mesh):
  """Returns how many slices a row along each axis lies in."""
  index = np.vectorize(lambda device: device.slice_index or 0)(mesh.devices)
  return tuple(
    max(len(set(row)) for row in np.moveaxis(index, axis, -1).reshape(-1, size))
    for axis, size in enumerate(index.shape)
  )


@pytest.mark.parametrize(
  ('devices', 'expert', 'slices'),
  [
    (gpus(8), 8, 8),
    (gpus(8, processes_a_node=8), 8, 8),
    (gpus(8), 2, 8),
    (gpus(1), 8, 1),
    (pod('TPU v5 lite', (16, 16), 2), 16, 2),
    (pod('TPU v5 lite', (16, 16), 4), 64, 4),
    (pod('TPU v5 lite', (16, 16)), 16, 1),
    (pod('TPU v6 lite', (16, 16)), 8, 1),  # jax.make_mesh finds no way.
    (pod('TPU v5', (4, 4, 8)), 2, 1),
  ],
)
def test_data_goes_across_slices_and_nodes(devices, expert, slices):
  mesh = meshes.make_mesh(-1, expert, devices=devices)
  assert mesh.devices.shape == (len(devices) // expert, expert)
  assert set(mesh.devices.flat) == set(devices)
  assert spans(mesh) == (slices, 1)


@pytest.mark.parametrize(
  ('devices', 'expert', 'words'),
  [
    (gpus(8), 64, '8 devices each; 1, 2, 4, 8 do not'),
    (gpus(4), 16, '8 devices each; 1, 2, 4, 8 do not'),
    (
      pod('TPU v5 lite', (16, 16), 2),
      512,
      '256 devices each; 1, 2, 4, 8, 16, 32, 64, 128, 256 do not',
    ),
  ],
)
def test_experts_span_slices_only_where_it_is_asked_for(devices, expert, words):
  with pytest.raises(ValueError, match='expert_across=true.*network') as error:
    meshes.make_mesh(-1, expert, devices=devices)
  assert f'mesh.expert={expert}: ' in str(error.value)
  assert words in str(error.value)
  mesh = meshes.make_mesh(-1, expert, expert_across=True, devices=devices)
  assert mesh.devices.shape == (len(devices) // expert, expert)
  slices = len({device.slice_index for device in devices})
  assert math.prod(spans(mesh)) == slices
  assert spans(mesh)[1] > 1


def test_slices_must_be_alike():
  with pytest.raises(ValueError, match=r'unequal sizes, \[5, 8\]'):
    meshes.make_mesh(devices=gpus(2)[3:])
