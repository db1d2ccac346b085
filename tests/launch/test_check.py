"""The acceptance test: it passes on CPUs, and names what was broken."""

import json
import os
import subprocess
import sys

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from launch import check, check_results, check_times
from moe_jax import config
from moe_jax.main import load_experiment
from moe_jax.parallel import dispatch, exchange, grouped_matmul
from moe_jax.routing import selection
from moe_jax.train import state

SMALL = (
  '--config=experiments/demo.py:bip',
  '--config.batch_size=8',
  '--config.sequence_length=16',
  '--config.model.width=32',
  '--config.model.hidden=32',
  '--config.model.layers=2',
  '--config.data.vocabulary=300',
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(check_results, 'WIDTH', 64)
  monkeypatch.setattr(check_results, 'HIDDEN', 96)
  check_results._problem.cache_clear()


@pytest.mark.long
def test_eight_devices(monkeypatch, tmp_path):
  # As if the planner knew these: all figures that come from it are there.
  monkeypatch.setitem(check.KINDS, 'cpu', 'h100')
  monkeypatch.setattr(check_results, 'DTYPES', ('float32',))  # One takes both.
  out = tmp_path / 'check.json'
  argv = ['', *SMALL, '--config.mesh.expert=4', f'--out={out}']
  assert check.main(argv) == 0
  told = json.loads(out.read_text())
  assert (told['device'], told['devices']) == ('cpu', 8)
  assert told['config']['model']['width'] == 32 and told['versions']['jaxlib']
  names = [row['name'] for row in told['checks']]
  assert len(names) == len(set(names)) == 2 * (3 + 2 + 2) + 1 + 1
  for row in told['checks']:
    assert row['passed'] and row['error'] <= row['bound']
    assert 'float32' not in row['name'] or row['bound'] < 1e-5
  assert [row['name'] for row in told['timings']] == [
    *('train step', 'solve', 'grouped products', 'attention', 'exchange')
  ]
  for row in told['timings']:
    assert 0 < row['least'] <= row['median'] <= row['most']
    assert row['ratio'] == pytest.approx(row['median'] / row['planned'])
  step = told['timings'][0]
  useful = told['plan']['flops']['useful'] / (8 * 989.4e12)
  assert told['mfu'] == pytest.approx(useful / step['median'])


@pytest.mark.long
def test_one_device(tmp_path):
  out = tmp_path / 'check.json'
  result = subprocess.run(
    [sys.executable, '-m', 'launch.check', *SMALL, f'--out={out}'],
    env=os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=1'},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  told = json.loads(out.read_text())
  assert told['devices'] == 1 and len(told['checks']) == 3 + 4 + 4 + 2 + 1
  assert told['mfu'] is None and 'does not know cpu' in told['plan']['reason']
  assert '18 of 18 checks and timings passed' in result.stdout
  assert 'MFU unknown, planned unknown' in result.stdout


def finding(name, count=1):
  return check_results.comparisons(jax.devices()[:count], jax.devices()[0])[
    name
  ]()


def rounded_operands(function, **bits):
  """Products as of a device that rounds operands of float32."""

  def product(rows, weights, *rest, **options):
    operands = (lax.reduce_precision(x, 8, **bits) for x in (rows, weights))
    return function(*operands, *rest, **options)

  return product


BROKEN = {
  'an order statistic of the rank below': (
    sys.modules['moe_jax.routing.bip'],
    'kth_largest',
    lambda real: lambda x, k, **options: real(x, k + 1, **options),
    'q and choices of bip, 1 device',
  ),
  'equal scores go to the higher index': (
    selection,
    'top_k',
    lambda real: lambda x_TxE, k: x_TxE.shape[1] - 1 - real(x_TxE[:, ::-1], k),
    'q and choices of quantile, 8 devices',
  ),
  'a group loses its last row': (
    grouped_matmul,
    '_outer_cpu',
    lambda real: lambda x, dy, load_E: real(x.at[300].set(0), dy, load_E),
    'grouped products, bfloat16',
  ),
  'TF32': (
    grouped_matmul,
    '_matmul_cpu',
    lambda real: rounded_operands(real, mantissa_bits=10),
    'grouped products, float32',
  ),
  'TF32 in the gradient alone': (
    grouped_matmul,
    '_outer_cpu',
    lambda real: rounded_operands(real, mantissa_bits=10),
    'dropless layer, float32, 1 device',
  ),
  'rows of two experts change places': (
    exchange,
    'static',
    lambda real: (
      lambda rows, apply, **options: real(
        jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), rows), apply, **options
      )
    ),
    'static layer, bfloat16, 8 devices',
  ),
  'a token is lost': (
    dispatch,
    'take_rows',
    lambda real: lambda x, index, *rest: real(x, index.at[5].set(0), *rest),
    'static layer, bfloat16, 1 device',
  ),
}


@pytest.mark.parametrize(
  'how',
  [
    pytest.param(how, marks=pytest.mark.long if 'layer' in name else [])
    for how, (*_, name) in BROKEN.items()
  ],
)
def test_what_is_broken_fails(monkeypatch, how):
  where, what, wrong, name = BROKEN[how]
  monkeypatch.setattr(where, what, wrong(getattr(where, what)))
  assert not finding(name, 8 if '8' in name else 1).passed


def test_failures_are_named_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
  def comparisons(devices, cpu):
    return {
      'right': lambda: check_results.Finding(1e-7, 1e-6, 'y'),
      'wrong': lambda: check_results.Finding(float('nan'), 1e-6, 'y'),
    }

  def train_step(*_):
    raise RuntimeError('RESOURCE_EXHAUSTED: no\nmemory')

  monkeypatch.setattr(check_results, 'comparisons', comparisons)
  monkeypatch.setattr(check_times, 'train_step', train_step)
  monkeypatch.setattr(
    check_times, 'parts', lambda *_: {'solve': lambda: lambda: jnp.ones(3)}
  )
  out = tmp_path / 'check.json'
  assert check.main(['', *SMALL, f'--out={out}']) == 1
  printed = capsys.readouterr()
  assert printed.err == 'FAILED: wrong; loss of the train step; train step\n'
  told = json.loads(out.read_text(), parse_constant=pytest.fail)
  assert told['checks'][1]['error'] == 'nan'
  assert 'RESOURCE_EXHAUSTED' in told['timings'][0]['reason']
  assert told['timings'][1]['passed']
  assert '2 of 5 checks and timings passed' in printed.out


def test_parts_of_a_plan_are_those_of_a_layer_and_microbatch():
  options = load_experiment(SMALL[0].partition('=')[2])
  options.update(accumulation=2)
  options.model.update(layers=5, dense_layers=1)
  plan = {
    'compute_seconds': {'experts': 8.0, 'attention': 6.0, 'scores': 4.0},
    'routing': {'seconds': 16.0},
    'collectives': [
      {'kind': 'all-reduce', 'seconds': 100.0},
      {'kind': 'all-to-all', 'seconds': 3.0},
      {'kind': 'ragged-all-to-all', 'seconds': 5.0},
    ],
    'step_seconds': [20.0, 30.0],
  }
  parts = {
    'train step': 30.0,
    'solve': 2.0,
    'grouped products': 1.0,
    'attention': 1.0,
    'exchange': 1.0,
  }
  assert check_times.planned(config.freeze(options), plan) == parts
  options.capacity_factor = 1.0  # Then there are no grouped products.
  del parts['grouped products']
  assert check_times.planned(config.freeze(options), plan) == parts
  del plan['step_seconds']  # It does not fit.
  assert check_times.planned(config.freeze(options), plan) == {}


def test_all_parts_run():
  options = load_experiment(SMALL[0].partition('=')[2])
  options.update(batch_size=8, sequence_length=16)
  options.model.update(width=16, hidden=16, heads=2, kv_heads=1, layers=1)
  options.mesh.expert = 4
  small = config.freeze(options)
  mesh = state.make_mesh(small, jax.devices())
  for make in check_times.parts(small, mesh).values():
    timing = check_times.measure(make(), None)
    assert 0 < timing.least <= timing.median <= timing.most


def test_refusals(monkeypatch, capsys):
  def refused(*argv):
    assert check.main(['', *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line

  assert 'did you mean out' in refused('--ouf=x.json')
  assert 'must be a file in a directory' in refused('--out=/nowhere/x.json')
  assert 'model.widht' in refused('--config.model.widht=3')
  assert 'mesh.expert=3' in refused(*SMALL, '--config.mesh.expert=3')
  assert 'multiple of 8' in refused(*SMALL, '--config.batch_size=12')
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')

  def local_devices(backend=None):
    if backend:
      raise RuntimeError('Unknown backend cpu')

  monkeypatch.setattr(jax, 'local_devices', local_devices)
  assert 'JAX_PLATFORMS=cuda: must name the accelerator and the CPU' in (
    refused(*SMALL)
  )
