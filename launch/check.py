"""Tests the accelerator at hand: does it compute right, and how fast?

    python -m launch.check [--out=FILE.json] \\
        [--config=experiments/FILE.py:METHOD] [--config.OPTION=VALUE ...]

First it compares this machine's devices, one of them and a mesh of all, with
its CPU:

    q and choices     from equal scores; all bits must be the same
    MoE layers        output and gradients, in float32 and bfloat16
    grouped products  value and gradients, of uneven and empty groups
    attention         output and gradients, of one document and of two

launch/check_results.py says how the errors that are allowed are derived. Then
it trains the experiment for a few steps on made-up tokens, by default
experiments/paper_16e.py:bip with 32 sequences a step in bfloat16 (on a CPU take
experiments/demo.py:bip), and times the step and its parts, beside what
launch.plan says of this step on these devices; it compiles the step for that.
It has no plan for CPUs and other chips that it does not know.

It takes minutes, one process and no network. FILE.json gets all results and
what machine, versions and options they are of.

Exit codes: 0 all is right; 1 something is wrong, and named; 2 refused (bad flag
or config).
"""

from collections.abc import Callable, Sequence
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import sys
import time
from typing import Any

import pandas

from launch import ahead
from launch.hardware import human
from moe_jax.options import one_line

_DEFAULT = (
  f'--config={pathlib.Path(__file__).parents[1]}/experiments/paper_16e.py:bip',
  '--config.batch_size=32',
  '--config.accumulation=1',
  '--config.model.dtype=bfloat16',
)
# What jax calls a device -> chip of the planner.
KINDS = {
  'NVIDIA H100 80GB HBM3': 'h100',
  'NVIDIA H200': 'h200',
  'TPU v5 lite': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
}


def main(argv: Sequence[str]) -> int:
  """Runs the program; returns its exit code."""
  if {'--help', '-h', '-help'} & set(argv):
    print(__doc__)
    return 0
  # Late: they import jax, and a wrong flag is answered at once.
  from moe_jax.main import parse

  try:
    if not any(re.match('--?config(=|$)', argument) for argument in argv):
      argv = [argv[0], *_DEFAULT, *argv[1:]]
    options, values = parse(argv, others={'out': ''})
    out = ahead.output(values.out)
    from moe_jax import config as config_lib
    from moe_jax.train import state

    config = config_lib.freeze(options)
    devices, cpu = _devices()
    mesh = state.make_mesh(config, devices)
    state.make_training(config, mesh)  # Refuses what does not divide.
  except (ValueError, OSError) as error:
    print(f'error: {one_line(error)}', file=sys.stderr)
    return 2
  told = check(config, mesh, cpu)
  if values.out:
    told['config'] = config_lib.to_dict(config)
    out.write_text(json.dumps(told, indent=1) + '\n')
  rows = told['checks'] + told['timings']
  failed = [row['name'] for row in rows if not row['passed']]
  if failed:
    print(f'FAILED: {"; ".join(failed)}', file=sys.stderr)
  return 1 if failed else 0


def _devices() -> tuple[list[Any], Any]:
  """Returns the devices to test, and the CPU to compare with."""
  import jax

  try:
    return jax.local_devices(), jax.local_devices(backend='cpu')[0]
  except RuntimeError as error:
    raise ValueError(
      f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")}: must name the '
      f'accelerator and the CPU, as cuda,cpu does, or be empty; {error}'
    ) from error


def check(config, mesh, cpu) -> dict[str, Any]:
  """Compares and times everything, prints it and returns what is JSON."""
  from launch import check_results, check_times

  devices = list(mesh.devices.flat)
  told = _facts(devices)
  print(*(f'{name}: {value}' for name, value in told.items()), sep='\n')
  comparisons = check_results.comparisons(devices, cpu)
  told['checks'] = [attempt(*each) for each in comparisons.items()]
  print('       the plan: compiles the step', flush=True)
  told['plan'] = plan = _plan(config, devices)
  planned, losses = check_times.planned(config, plan), []

  def timed(name, make):
    measure = check_times.measure
    return attempt(name, lambda: measure(make(), planned.get(name)))

  def train_step():
    return check_times.train_step(config, mesh, losses)

  def loss():  # It must be finite and have fallen.
    change = float(losses[-1] / losses[0])
    return check_results.Finding(change, 1 - 2**-24, 'last / first')

  # First, as the memory's peak is that of all before.
  told['timings'] = [timed('train step', train_step)]
  peaks = [(d.memory_stats() or {}).get('peak_bytes_in_use') for d in devices]
  told['checks'].append(attempt('loss of the train step', loss))
  parts = check_times.parts(config, mesh)
  told['timings'] += [timed(*each) for each in parts.items()]
  told['peak_bytes'] = max(peaks) if all(peaks) else None
  # The planner's peak and useful FLOPs, in another time.
  ratio = told['timings'][0].get('ratio')
  told['mfu'] = plan['mfu'][0] / ratio if ratio else None
  print(_summary(told))
  return told


def _facts(devices: Sequence[Any]) -> dict[str, Any]:
  versions = {
    package.name: package.version
    for package in importlib.metadata.distributions()
    if str(package.name).startswith(('jax', 'libtpu'))
  }
  return {
    'machine': f'{platform.node()}, {platform.platform()}',
    'device': devices[0].device_kind,
    'devices': len(devices),
    'versions': dict(sorted(versions.items())),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def attempt(name: str, function: Callable[[], Any]) -> dict[str, Any]:
  """Calls what returns a `Finding` or a `Timing`; an error is a failure."""
  started = time.perf_counter()
  try:
    result = function()
    row, says = result._asdict() | {'passed': bool(result.passed)}, str(result)
    if not math.isfinite(row.get('error', 0)):
      row['error'] = str(row['error'])  # JSON knows no NaN.
  except Exception as error:  # Of a compiler, of a driver, for lack of memory.
    says = f'{type(error).__name__}: {one_line(error)[:500]}'
    row = {'passed': False, 'reason': says}
  verdict = 'ok    ' if row['passed'] else 'FAILED'
  spent = time.perf_counter() - started
  print(f'{verdict} {name}: {says}; took {spent:.1f} s', flush=True)
  return {'name': name} | row


def _plan(config, devices: Sequence[Any]) -> dict[str, Any]:
  """Plans the step for these very devices; else says why there is no plan."""
  from launch import estimate

  kind = devices[0].device_kind
  if kind not in KINDS:
    return {'reason': f'the planner does not know {kind}'}
  try:
    sides = [len(devices)]
    if hasattr(devices[0], 'coords'):  # A TPU: v5p is a cube, others are flat.
      places = zip(*(device.coords for device in devices), strict=True)
      sides = [max(side) - min(side) + 1 for side in places]
      sides = sides[: 3 if KINDS[kind] == 'v5p' else 2]
    name = f'{KINDS[kind]}:{"x".join(map(str, sides))}'
    return estimate.train_step(config, ahead.parse_topology(name), devices)
  except Exception as error:
    return {'reason': f'{type(error).__name__}: {one_line(error)[:500]}'}


def _summary(told: dict[str, Any]) -> str:
  """Writes the table at the end."""
  table = pandas.DataFrame(told['timings']).set_index('name')
  times = ['median', 'least', 'most', 'planned']
  table = table.reindex(columns=[*times, 'ratio']).astype(float)
  table[times] *= 1e3
  table = table.rename(columns={time: f'{time} ms' for time in times})
  plan, mfu, peak = told['plan'], told['mfu'], told['peak_bytes']
  passed = [row['passed'] for row in told['checks'] + told['timings']]
  lines = [
    '\n' + table.to_string(float_format='{:.3f}'.format, na_rep='-'),
    f'MFU {f"{mfu:.1%}" if mfu else "unknown"}, planned '
    + (f'{plan["mfu"][0]:.1%}' if 'mfu' in plan else 'unknown'),
    f'peak memory {human(peak) if peak else "unknown"}, planned '
    + (human(plan['memory']['needed']) if 'memory' in plan else 'unknown'),
    f'no plan: {plan["reason"]}' if 'reason' in plan else '',
    f'{sum(passed)} of {len(passed)} checks and timings passed',
  ]
  return '\n'.join(filter(None, lines))


if __name__ == '__main__':
  sys.exit(main(sys.argv))
