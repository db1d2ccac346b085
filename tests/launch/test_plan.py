"""The planner: its arithmetic by hand, its answers, and what it refuses."""

import functools
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from launch import ahead, cost, estimate, hardware, hlo, plan
from launch.hardware import CHIPS
from moe_jax import jax_privates
from moe_jax.nn import attention_kernels
from moe_jax.parallel import mesh as meshes
from tests.parallel.test_mesh import pod
from tests.train import tiny

TORUS = [(0, x, y) for x in range(16) for y in range(16)]
NODES = [(node, gpu) for node in range(4) for gpu in range(8)]
ROW = tuple(range(16))  # of the torus
MEGA = 10**6


def collective(kind, group=(), **more):
  return hlo.Collective(kind, 1, MEGA, '', group, **more)


@pytest.mark.parametrize(
  ('kind', 'group', 'seconds'),
  [
    # A ring of 16: 8 hops; both links bring 15/16 of the bytes.
    ('all-gather', ROW, 8e-6 + 15 / 16 * MEGA / 100e9),
    ('all-reduce', ROW, 8e-6 + 2 * 15 / 16 * MEGA / 100e9),
    # Both sides of the torus: 8 + 8 hops, four links.
    ('reduce-scatter', (), 16e-6 + 255 / 256 * MEGA / 200e9),
    # 16 x MEGA / 4 cross the middle of the ring, each way, by two links.
    ('all-to-all', ROW, 8e-6 + 16 / 8 * MEGA / 50e9),
    # A line of 4: 4 hops, one link at its end.
    ('all-gather', (0, 1, 2, 3), 4e-6 + 3 / 4 * MEGA / 50e9),
    # Every fourth of a ring: all of it, shared by four such groups.
    ('all-gather', (0, 4, 8, 12), 8e-6 + 3 / 4 * MEGA / 25e9),
    ('all-reduce', (5,), 0.0),
  ],
)
def test_collectives_on_a_torus(kind, group, seconds):
  call = collective(kind, group)
  found = hardware.seconds(call, CHIPS['v5e'], TORUS, (16, 16))
  assert found == pytest.approx(seconds)


@pytest.mark.parametrize(
  ('kind', 'group', 'seconds'),
  [
    ('all-gather', tuple(range(8)), 10e-6 + 7 / 8 * MEGA / 450e9),
    ('all-to-all', (0, 8), 20e-6 + MEGA / 2 / 50e9),
    # Within nodes, then an eighth of it by each GPU to the other nodes.
    (
      'all-reduce',
      (),
      20e-6 + 2 * (7 / 8 * MEGA / 450e9 + 3 / 4 * MEGA / 8 / 50e9),
    ),
  ],
)
def test_collectives_of_gpus(kind, group, seconds):
  call = collective(kind, group)
  found = hardware.seconds(call, CHIPS['h100'], NODES, (8, 4))
  assert found == pytest.approx(seconds)


def test_collectives_between_slices():
  torus = TORUS + [(1, x, y) for _, x, y in TORUS]
  call = collective('all-reduce', between_slices=True)
  found = hardware.seconds(call, CHIPS['v5e'], torus, (16, 16))
  # Half of it there and back by a chip's share of 6.4 Tb/s of 256 chips.
  assert found == pytest.approx(50e-6 + 2 * MEGA / 2 / 3.125e9)
  # All else is one slice's, also where the text names no group.
  call = collective('reduce-scatter')
  assert hardware.seconds(call, CHIPS['v5e'], torus, (16, 16)) == (
    hardware.seconds(call, CHIPS['v5e'], TORUS, (16, 16))
  )


@pytest.mark.parametrize(
  ('machine', 'network'),
  [('', 50e9), ('a3-highgpu-8g', 12.5e9), ('a3-megagpu-8g', 25e9)],
)
def test_the_network_is_that_of_the_machine(machine, network):
  chip = ahead.parse_topology('h100:8x4', machine=machine).hardware
  found = hardware.seconds(
    collective('all-to-all', (0, 8)), chip, NODES, (8, 4)
  )
  assert found == pytest.approx(20e-6 + MEGA / 2 / network)


def test_gpus_give_the_fraction_that_jax_takes(monkeypatch):
  topology = ahead.parse_topology('h100:8')
  name = 'XLA_CLIENT_MEM_FRACTION'
  monkeypatch.delenv(name, raising=False)
  assert ahead.memory_limit(topology) == 0.75 * 84942979072
  monkeypatch.setenv(name, '.5')
  assert ahead.memory_limit(topology) == 0.5 * 84942979072
  # TPUs give all that their compiler allows.
  topology = ahead.parse_topology('v5e:4x4', slices=2)
  assert ahead.memory_limit(topology) == CHIPS['v5e'].hbm
  assert topology.size == 32
  monkeypatch.setenv(name, '75 %')
  with pytest.raises(ValueError, match=f'{name}=75 %: must be above 0'):
    ahead.memory_fraction()


def test_flops_of_loops_devices_and_grouped_products():
  mesh = meshes.make_mesh(4, 2)

  def local(x, w):
    # On each of 8 devices 3 times 2 x 4 x 16 x 16.
    return lax.scan(lambda x, _: (x @ w, None), x, length=3)[0]

  def step(x, w, weights, load):
    x = jax.shard_map(
      local, mesh=mesh, in_specs=(P(meshes.AXES), P()), out_specs=P(meshes.AXES)
    )(x, w)
    # 2 x 20 x 16 x 5, as only 20 of the 32 rows are expected to be filled.
    return lax.ragged_dot(x, weights, load)

  jaxpr = jax.make_jaxpr(step)(
    jnp.ones((32, 16)),
    jnp.ones((16, 16)),
    jnp.ones((4, 16, 5)),
    jnp.ones(4, jnp.int32),
  )
  expected = 8 * 3 * 2 * 4 * 16 * 16 + 2 * 20 * 16 * 5
  assert cost.flops(jaxpr.jaxpr, mesh.size, rows=20) == expected


@pytest.mark.parametrize(
  ('kernel', 'products'),
  # Forward 2; cuDNN does 5 backward, splash attention 3 and 4.
  [
    (attention_kernels._cudnn, 2 + 5),
    (functools.partial(attention_kernels._splash, interpret=True), 2 + 3 + 4),
  ],
  ids=['cudnn', 'splash'],
)
@pytest.mark.parametrize('batch', [1, 2])
def test_flops_of_attention_are_those_of_the_causal_half(
  kernel, products, batch, monkeypatch
):
  monkeypatch.setattr(
    jax_privates.fused_attention_stablehlo, 'check_cudnn_version', lambda: 91002
  )
  query = jax.ShapeDtypeStruct((batch, 256, 4, 64), jnp.bfloat16)
  key = jax.ShapeDtypeStruct((batch, 256, 1, 64), jnp.bfloat16)

  def loss(*arrays):
    return jnp.sum(kernel(*arrays, None, scale=1.0).astype(jnp.float32))

  jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(query, key, key)
  each = 2 * batch * 4 * 64 * 256 * 256 / 2
  counted = cost.flops(jaxpr.jaxpr, 1, rows=1)
  assert counted == pytest.approx(products * each, rel=1e-2)


MODULE = """HloModule step

%fused (a: f32[4,8], b: f32[8,16]) -> f32[4,16] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  ROOT %dot = f32[4,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}, metadata={op_name="attention"}
}

ENTRY %main (x: f32[4,8], y: f32[8,16], z: bf16[99,8]) -> f32[4,16] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[8,16]{1,0} parameter(1)
  %z = bf16[99,8]{1,0} parameter(2)
  %q = bf16[1,2,8,4]{3,2,1,0} parameter(3)
  %w = bf16[2,8,5]{2,1,0} pad(%x), backend_config=\
{"estimated_cycles":"300"}
  %kernel = bf16[99,5]{1,0} custom-call(%z, %w), metadata={op_name="experts"}
  %splash_mha_dq.1 = (bf16[1,2,8,4]{3,2,1,0}, f32[1,2,8,9]{3,2,1,0}) \
custom-call(%q), \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="attention/vmap()"}
  %sorted = f32[4,8]{1,0} sort(%x), dimensions={1}
  %sum = f32[4]{0} reduce(%x), dimensions={1}, backend_config=\
{"estimated_cycles":"900"}
  ROOT %product = f32[4,16]{1,0} fusion(%x, %y), calls=%fused
}
"""


def test_compute_is_the_compilers_estimate_or_the_longer_of_two_bounds():
  chip = hardware.Chip(peak=1e3, hbm=1, bandwidth=1e3, link=1, hop=1, clock=100)
  costs = cost.compute(hlo.parse(MODULE), chip, rows=9)
  assert costs == [
    (3.0, True, ''),  # 300 cycles of 100 Hz
    # 9 rows: 2 x 9 x 8 x 5 FLOPs, 2 x (9 x 8 + 9 x 5 + 2 x 8 x 5) bytes.
    (pytest.approx(0.720), False, 'experts'),
    # 3 x 2 x (2 x 4) x 8 x 8 / 2 FLOPs, at half of the peak.
    (pytest.approx(3.072), False, 'attention/vmap()'),
    (pytest.approx(0.256), False, ''),  # 128 bytes read, 128 written
    (pytest.approx(0.144), False, ''),  # Not fused: 128 and 16 bytes.
    (pytest.approx(1.024), False, 'attention'),  # 2 x 4 x 8 x 16 FLOPs
  ]


@pytest.mark.long
def test_estimates_a_step(tmp_path):
  config = tiny.tiny_config(
    tmp_path,
    'loss_free',  # The quickest to compile.
    **{
      'mesh.data': 2,
      'mesh.expert': 4,
      'model.layers': 1,
      'capacity_factor': 1.25,
      'data.cross_documents': False,
    },
  )
  topology = ahead.parse_topology('h100:8')
  found = estimate.estimate(config, topology, jax.devices())
  assert found['fits']
  memory = found['memory']
  # Dense parameters are everywhere, experts on every fourth device.
  experts = 3 * 8 * 16 * 16
  dense = found['parameters']['total'] - experts
  assert memory['parameters'] == 4 * (dense + experts // 4)
  assert memory['optimizer'] == pytest.approx(2 * memory['parameters'], abs=99)
  low, high = found['step_seconds']
  # CPUs wait for every collective at once: nothing hides.
  assert 0 < found['compute_seconds']['experts'] < low
  assert low == pytest.approx(high)
  exchange = [
    row['count'] for row in found['collectives'] if row['kind'] == 'all-to-all'
  ]
  # Rows and gates there, rows back; forward and backward.
  assert exchange == [6]
  assert 0 < found['routing']['share'] < 1
  evaluation = found['evaluation']
  # It runs beside what training keeps, the moments among it.
  assert evaluation['memory']['optimizer'] == memory['optimizer']
  assert memory['optimizer'] < evaluation['memory']['needed'] < memory['limit']
  assert 0 < evaluation['step_seconds'][0] < low
  report = plan.report(found, topology)
  assert '8 devices, data 2 x expert 4\nfits' in report
  assert f'evaluation of {config.batch_size} sequences, in one' in report


def test_compares_plans_and_adds_imbalance():
  def planned(seconds, count):
    return {
      'step_seconds': [0.0, seconds],
      'compute_seconds': {'experts': 0.2},
      'collectives': [{'count': count, 'bytes': 10 * count}],
    }

  assert estimate.difference(planned(0.5, 7), planned(0.4, 3)) == {
    'seconds': pytest.approx(0.1),
    'share': pytest.approx(0.2),
    'collectives': 4,
    'bytes': 40,
  }
  for options, seconds, dropped in (
    ({}, 0.2, 0.0),
    ({'capacity_factor': 1.5}, 0.0, 0.25),
    ({'model.round_to_capacity': True}, 0.0, 0.0),
  ):
    config = tiny.tiny_config(pathlib.Path('no_text'), **options)
    assert estimate.imbalance(planned(0.5, 7), 1.0, config) == {
      'max_violation': 1.0,
      'seconds': seconds,
      'share': seconds / 0.5,
      'dropped': dropped,
    }


def test_sweeps_all_meshes_that_divide_the_experts(tmp_path):
  config = tiny.tiny_config(tmp_path)  # 8 experts
  topology = ahead.parse_topology('v5e:4x4')
  found = [
    (candidate.mesh.data, candidate.mesh.expert, candidate.capacity_factor)
    for candidate in estimate.candidates(config, topology, (0.0, 1.0))
  ]
  assert found == [
    (16 // expert, expert, factor)
    for expert in (1, 2, 4, 8)
    for factor in (0.0, 1.0)
  ]


def test_sweep_prints_and_stores_what_it_tried(monkeypatch, capsys, tmp_path):
  def canned(config, topology, devices):
    if config.mesh.expert == 8:
      raise ValueError('no such mesh')
    fits = config.mesh.expert > 1
    memory = {
      'memory': {'needed': 2e9},
      'evaluation': {'memory': {'needed': 3e9}},
    }
    if not fits:
      return {'fits': False, **memory}
    times = {'step_seconds': [0.010, 0.020], 'mfu': [0.2, 0.4]}
    return {'fits': True, **memory, **times}

  monkeypatch.setattr(ahead, 'check_installed', lambda topology: None)
  monkeypatch.setattr(ahead, 'devices', lambda topology: [])
  monkeypatch.setattr(estimate, 'estimate', canned)
  out = tmp_path / 'sweep.json'
  assert 0 == plan.main(
    [
      'plan',
      '--config=experiments/paper_16e.py:bip',
      '--topology=v5e:2x4',
      '--sweep',
      f'--out={out}',
    ]
  )
  lines = capsys.readouterr().out.splitlines()
  assert lines[1].split() == '8,1 0 3 GB does not fit'.split()
  assert '4,2     1.25     3 GB  10.0 .. 20.0 (MFU 40.0 .. 20.0 %)' in lines[6]
  assert lines[10].endswith('no such mesh')
  stored = json.loads(out.read_text())
  assert [row['capacity_factor'] for row in stored['sweep']] == [0, 1, 1.25] * 3
  assert stored['assumptions']


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--topology=v5e'], '--topology=v5e: must be like v5e:16x16'),
    (['--topology=v5p:4x4'], '--topology=v5p:4x4: must be like'),
    (['--topology=h100:4x2'], 'a node has 8 GPUs; write h100:8x1'),
    (['--topology=v5e:4x4', '--slices=two'], '--slices=two: must be'),
    (['--topology=v5e:4x4', '--slices=0'], '--slices=0: must be 1 or more'),
    (['--topology=h100:8', '--slices=2'], '--topology has the nodes'),
    (
      ['--topology=h100:8', '--machine=a3-ultragpu-8g'],
      'with h100 it must be dgx or a3-highgpu-8g or a3-megagpu-8g',
    ),
    (['--topology=v5e:4x4', '--machine=dgx'], 'it must be left out'),
    (['--topology=v5e:4x4', '--mesh=4'], '--mesh=4: must be like 16,16'),
    (
      ['--topology=v5e:4x4', '--out=no/where.json'],
      '--out=no/where.json: must be a file',
    ),
    (['--balance=-1'], '--balance=-1: must be a number'),
    (['--topologie=v5e:4x4'], 'did you mean topology?'),
  ],
)
def test_refuses(flags, message, capsys):
  arguments = ['plan', '--config=experiments/demo.py:bip', *flags]
  assert plan.main(arguments) == 2
  assert message in capsys.readouterr().err


def test_says_what_to_install(monkeypatch, capsys):
  arguments = ['plan', '--config=experiments/demo.py:bip']
  monkeypatch.setattr(ahead, 'versions', dict)
  assert plan.main([*arguments, '--topology=v5e:4x4']) == 2
  assert 'pip install -r requirements-tpu.txt' in capsys.readouterr().err
  assert plan.main([*arguments, '--topology=h100:8']) == 2
  assert 'pip install -r requirements-cuda.txt' in capsys.readouterr().err


def test_refuses_a_compiler_where_training_would(monkeypatch, capsys):
  """What training refuses: tests/train/test_step.py."""
  topology = ahead.parse_topology('v5e:4x4')
  installed = {'libtpu': '0.0.42.1'}
  monkeypatch.setattr(importlib.metadata, 'version', installed.__getitem__)
  monkeypatch.setattr(ahead, 'versions', lambda: installed)
  monkeypatch.setattr(ahead, 'devices', lambda _: pod('TPU v5 lite', (4, 4)))
  arguments = ['plan', '--config=experiments/demo.py:bip']
  assert plan.main([*arguments, f'--topology={topology.name}']) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: libtpu 0.0.42.1: ')
  assert 'model.round_to_capacity=True' in error


@pytest.mark.long
@pytest.mark.parametrize(
  ('layers', 'slices', 'fits'), [(1, 1, True), (1, 2, True), (1000, 1, False)]
)
def test_plans_slices(layers, slices, fits, tmp_path):
  pytest.importorskip('libtpu')
  arguments = [
    '--config=experiments/demo.py:bip',
    '--topology=v5e:2x2',
    '--mesh=-1,2',
    f'--slices={slices}',
    '--balance=1',
    '--config.model.hidden=1408',
    '--config.model.dtype=bfloat16',
    f'--config.model.layers={layers}',
    f'--out={tmp_path / "plan.json"}',
  ]
  done = subprocess.run(
    [sys.executable, '-m', 'launch.plan', *arguments],
    capture_output=True,
    text=True,
    env=os.environ,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'plan.json').read_text())
  assert found['fits'] == fits
  assert ('does not fit' in done.stdout) != fits
  if fits:
    assert found['balancing']['collectives'] > 0
    assert found['compute_known'] > 0
    assert found['evaluation']['step_seconds'][0] > 0
    assert found['mesh']['data'] == 2 * slices
