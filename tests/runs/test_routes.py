"""Routes as files: written by row, removed, read, also in a bucket."""

import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest

from moe_jax.options import Refused
from moe_jax.parallel import mesh as meshes
from moe_jax.runs import files, routes

CONFIG = {
  'batch_size': 8,
  'sequence_length': 3,
  'model': {'layers': 3, 'dense_layers': 1, 'experts': 5},
}


@pytest.mark.parametrize('remote', [False, True])
def test_routes_are_written_removed_and_read(tmp_path, bucket, remote):
  workdir = bucket if remote else files.open_workdir(tmp_path)
  files.write_json(workdir / 'config.json', CONFIG)
  random = np.random.default_rng(0)
  routes_NxBxLxSxK = random.integers(-1, 5, (4, 8, 2, 3, 2), dtype=np.int16)
  # Devices are not in the order of their rows.
  mesh = meshes.make_mesh(4, 2, devices=jax.devices()[::-1])
  for step, routes_BxLxSxK in enumerate(routes_NxBxLxSxK, start=1):
    on_devices = jax.device_put(
      routes_BxLxSxK, NamedSharding(mesh, meshes.BATCH)
    )
    routes.write(workdir, step, on_devices)
  routes.remove_after(workdir, 3)
  names = sorted(path.name for path in (workdir / 'routes').iterdir())
  assert names == [f'step_0000000{step}_rows_0_8.npy' for step in (1, 2, 3)]
  reader = routes.Reader(workdir)
  assert reader.steps == [1, 2, 3]
  for step in reader.steps:
    np.testing.assert_array_equal(reader.read(step), routes_NxBxLxSxK[step - 1])
  with pytest.raises(Refused, match='has no routes of step 4'):
    reader.read(4)


def test_rows_are_read_whoever_wrote_them(tmp_path):
  """Three processes, of two of which a reader's rows are."""
  files.write_json(files.absolute(tmp_path) / 'config.json', CONFIG)
  (tmp_path / 'routes').mkdir()
  whole = np.arange(8 * 12).reshape(8, 2, 3, 2).astype(np.int16) % 5
  for first, end in ((0, 3), (3, 6), (6, 8)):
    name = f'step_00000001_rows_{first}_{end}.npy'
    np.save(tmp_path / 'routes' / name, whole[first:end])
  reader = routes.Reader(tmp_path)
  assert reader.steps == [1]
  np.testing.assert_array_equal(reader.read(1), whole)
  np.testing.assert_array_equal(reader.read(1, range(4, 8)), whole[4:])
  np.testing.assert_array_equal(reader.read(1, range(1, 5)), whole[1:5])
  (tmp_path / 'routes/step_00000001_rows_3_6.npy').unlink()
  assert not routes.Reader(tmp_path).steps
