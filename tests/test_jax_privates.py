"""What is used of jax without a public name: all in one file, and it is there.

Where a release of jax changes such a thing, its test fails and names it.
"""

import functools
import pathlib
import re

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from moe_jax import jax_privates
from moe_jax.parallel import mesh as meshes
from tests import several_processes
from tests.runs.test_agreement import SLURM

PRIVATE = re.compile(
  r'\bjax\._src\b|(from|import) jaxlib\b|\.(manual_axis_type|mat|vma)\b'
)


def test_nothing_else_uses_privates():
  root = pathlib.Path(__file__).parents[1]
  own = pathlib.Path(jax_privates.__file__)
  files = [
    path
    for room in ('moe_jax', 'launch', 'experiments', 'docs')
    for path in (root / room).rglob('*.py')
  ]
  used = [path for path in files if PRIVATE.search(path.read_text())]
  assert used == [own]


def test_varying_axes():
  """`jax.typeof(x).manual_axis_type.varying`."""
  seen = {}
  mesh = meshes.make_mesh(4, 2)

  def local(rows, weights):
    seen['rows'] = jax_privates.varying_axes(rows)
    seen['weights'] = jax_privates.varying_axes(weights)
    return rows @ weights

  product = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(meshes.BATCH, P()),
    out_specs=meshes.BATCH,
  )
  jax.eval_shape(product, np.ones((8, 3)), np.ones((3, 3)))
  assert seen == {'rows': {'data', 'expert'}, 'weights': frozenset()}
  assert jax_privates.varying_axes(np.ones(3)) == frozenset()


def test_untracked():
  """`jax._src.config._check_vma`, and the type of what a primitive returns."""
  mesh, seen = meshes.make_mesh(4, 2), {}

  def add(rows, more):
    seen['inside'] = jax_privates.varying_axes(rows + more)
    return rows + more, more

  def local(rows, more):
    sums, more = jax_privates.untracked(add, rows, more)
    seen['outside'] = jax_privates.varying_axes(sums)
    return sums, more

  run = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(meshes.BATCH, P()),
    out_specs=meshes.BATCH,
  )
  rows = np.arange(24.0).reshape(8, 3)
  sums, more = jax.jit(run)(rows, np.ones((1, 3)))
  assert seen == {'inside': frozenset(), 'outside': {'data', 'expert'}}
  np.testing.assert_array_equal(sums, rows + 1)
  np.testing.assert_array_equal(more, np.ones((8, 3)))
  alone, _ = jax_privates.untracked(add, rows, np.ones((1, 3)))
  np.testing.assert_array_equal(alone, rows + 1)


def test_assume_cudnn(monkeypatch):
  """`jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version`."""
  place = jax_privates.fused_attention_stablehlo
  monkeypatch.setattr(place, 'check_cudnn_version', place.check_cudnn_version)
  monkeypatch.setattr(place, 'cuda_versions', None)  # As without cuDNN.
  half = jax.ShapeDtypeStruct((1, 64, 2, 64), 'bfloat16')
  attend = functools.partial(
    jax.nn.dot_product_attention, implementation='cudnn'
  )
  with pytest.raises(RuntimeError, match='cuDNN'):
    jax.eval_shape(attend, half, half, half)
  assert not jax_privates.has_cudnn()
  jax_privates.assume_cudnn()
  assert jax_privates.has_cudnn()
  assert jax.eval_shape(attend, half, half, half).shape == half.shape


def test_cluster(monkeypatch):
  """`jax._src.clusters`."""
  for name in SLURM:
    monkeypatch.delenv(name, raising=False)
  assert jax_privates.cluster() is None
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  found = jax_privates.cluster()
  assert found.get_process_count() == 16
  assert found.get_process_id() == 9
  assert found.get_coordinator_address(0, None).startswith('node07:')


def test_clusters_of_tpus():
  names = [each.__name__ for each in jax_privates._CLUSTERS]
  assert names == ['SlurmCluster', 'GkeTpuCluster', 'GceTpuCluster']


def test_a_process_alone_has_no_coordination():
  """`jax._src.distributed.global_state`."""
  state = jax_privates.coordination()
  assert (state.client, state.process_id, state.num_processes) == (None, 0, 1)


def test_coordination_and_exchange_on_loopback():
  """And `jaxlib._jax.make_gloo_tcp_collectives`, `xla_bridge`'s client.

  tests/test_security.py looks where such processes listen.
  """
  program = """
import jax
from moe_jax import jax_privates
from moe_jax.runs import processes

processes.start()
state = jax_privates.coordination()
state.client.key_value_set(f'from {state.process_id}', 'here')
other = f'from {1 - state.process_id}'
print(state.client.blocking_key_value_get(other, 60_000))
print(state.num_processes, jax.device_count())
"""
  for done in several_processes.run(['-c', program], ['-c', program]):
    assert done.stdout.split() == ['here', '2', '8'], done.stderr
