"""Plans training on chips that are not here: does it fit, how long is a step?

    python -m launch.plan --config=experiments/FILE.py:METHOD \\
        --topology=TOPOLOGY [--slices=SLICES] [--machine=MACHINE] \\
        [--mesh=DATA,EXPERT] [--balance=MAXVIO] [--norouting] [--sweep] \\
        [--out=FILE.json] [--config.OPTION=VALUE ...]

TOPOLOGY is v5e:16x16, v6e:16x16, v5p:4x4x8, h100:8x4 (GPUs of a node x nodes)
or the like. The real steps of training and evaluation are compiled by the
chips' compiler, which needs `pip install -r requirements-tpu.txt` or
`requirements-cuda.txt`, and minutes. It fits if both do; on GPUs into the part
of the memory that jax takes, 0.75 or $XLA_CLIENT_MEM_FRACTION.

    --slices    TPU slices of that topology, with the data-centre network
                between them.
    --machine   what the GPUs are in, and so their network: dgx (the default,
                400 Gb/s a GPU), a3-highgpu-8g (100), a3-megagpu-8g (200),
                a3-ultragpu-8g (400; H200).
    --balance   what it costs if the most loaded expert has (1 + MAXVIO) times
                the mean load: time if its device has no other expert, or drops.
    --norouting leaves out compiling once more without balancing.
    --sweep     tries all meshes and capacity factors 0 (dropless), 1 and 1.25
                instead, and prints a table.

All times are estimates; every assumption is printed. Exit codes: 0 answered,
also where it does not fit; 2 refused (bad config or input).
"""

from collections.abc import Sequence
import json
import os
import shlex
import sys
from typing import Any

from launch import ahead
from launch.hardware import human

_FLAGS = {
  'topology': '',
  'slices': '1',
  'machine': '',
  'mesh': '',
  'balance': '',
  'routing': True,
  'sweep': False,
  'out': '',
}
CAPACITY_FACTORS = (0.0, 1.0, 1.25)


def main(argv: Sequence[str]) -> int:
  """Runs the program; returns its exit code."""
  if {'--help', '-h', '-help'} & set(argv):
    print(__doc__)
    return 0
  # Late: jax reads the environment when it is imported.
  from moe_jax.main import parse

  try:
    options, values = parse(argv, others=_FLAGS)
    balance = _number('balance', values.balance)
    topology = ahead.parse_topology(
      values.topology, _slices(values.slices), values.machine
    )
    ahead.memory_fraction()  # Refused before anything is compiled.
    if values.mesh:
      options.mesh.data, options.mesh.expert = _mesh(values.mesh)
    out = ahead.output(values.out)
    ahead.check_installed(topology)
    # Later still, as a wrong flag is answered at once.
    from launch import estimate
    from moe_jax import config as config_lib

    config = config_lib.freeze(options)
    plan = {
      'command': _command(argv),
      'versions': ahead.versions(),
    }
    if values.sweep:
      plan['sweep'] = _sweep(estimate, config, topology)
    else:
      plan |= _plan(estimate, config, topology, balance, values.routing)
      print(report(plan, topology))
    plan['assumptions'] = list(estimate.ASSUMPTIONS)
    plan['config'] = config_lib.to_dict(config)
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print('\nEstimates, not measurements. Assumptions:')
  print(*(f'- {line}' for line in plan['assumptions']), sep='\n')
  if values.out:
    out.write_text(json.dumps(plan, indent=1) + '\n')
  return 0


def _command(argv: Sequence[str]) -> str:
  """Returns what repeats a plan, also the variable that it depends on."""
  name = 'XLA_CLIENT_MEM_FRACTION'
  given = [f'{name}={os.environ[name]}'] if name in os.environ else []
  return shlex.join([*given, 'python', '-m', 'launch.plan', *argv[1:]])


def _number(name: str, text: str) -> float | None:
  try:
    value = float(text) if text else None
  except ValueError:
    value = -1.0
  if value is not None and not 0 <= value < float('inf'):
    raise ValueError(f'--{name}={text}: must be a number, 0 or more')
  return value


def _slices(text: str) -> int:
  if not text.isdecimal():
    raise ValueError(f'--slices={text}: must be a number, 1 or more')
  return int(text)


def _mesh(text: str) -> list[int]:
  try:
    data, expert = map(int, text.split(','))
  except ValueError:
    raise ValueError(f'--mesh={text}: must be like 16,16 or -1,8') from None
  return [data, expert]


def _plan(estimate, config, topology, balance, routing) -> dict[str, Any]:
  """Estimates a step, and what balancing and imbalance cost in it."""
  devices = ahead.devices(topology)
  plan = estimate.estimate(config, topology, devices)
  if routing and plan['fits'] and config.balancer['name'] != 'unbalanced':
    plain = estimate.without_balancing(config)
    plan['balancing'] = estimate.difference(
      plan, estimate.train_step(plain, topology, devices)
    )
  if balance is not None and plan['fits']:
    plan['imbalance'] = estimate.imbalance(plan, balance, config)
  return plan


def _sweep(estimate, config, topology) -> list[dict[str, Any]]:
  """Estimates every mesh and capacity factor; prints each as it comes."""
  devices = ahead.devices(topology)
  print(f'{"mesh":>9} {"capacity":>8} {"HBM":>8}  step, ms (MFU)')
  plans = []
  for candidate in estimate.candidates(config, topology, CAPACITY_FACTORS):
    mesh = f'{candidate.mesh.data},{candidate.mesh.expert}'
    start = f'{mesh:>9} {candidate.capacity_factor:>8g}'
    try:
      plan = estimate.estimate(candidate, topology, devices)
    except ValueError as error:  # Such as a batch that does not divide.
      print(start, f' {error}', flush=True)
      continue
    plan['capacity_factor'] = candidate.capacity_factor
    plans.append(plan)
    both = plan, plan['evaluation']
    needed = human(max(each['memory']['needed'] for each in both))
    print(start, f'{needed:>8}', f' {_step(plan)}', flush=True)
  return plans


def _step(plan: dict[str, Any]) -> str:
  if not plan['fits']:
    return 'does not fit'
  low, high = (1e3 * seconds for seconds in plan['step_seconds'])
  worst, best = (100 * share for share in plan['mfu'])
  return f'{low:.1f} .. {high:.1f} (MFU {best:.1f} .. {worst:.1f} %)'


def report(plan: dict[str, Any], topology: ahead.Topology) -> str:
  """Writes a plan for people to read."""
  memory, mesh = plan['memory'], plan['mesh']
  evaluation = plan['evaluation']
  limit = human(memory['limit'])
  where = [topology.name]
  where += [f'{topology.slices} slices'] if topology.slices > 1 else []
  where += [topology.machine] if topology.machine else []
  lines = [
    f'{", ".join(where)}: {topology.size} devices, data {mesh["data"]} x '
    f'expert {mesh["expert"]}'
    + (', parameters split over data' * mesh['fsdp']),
    f'{"fits" if plan["fits"] else "does not fit"}: of {limit} per device, '
    f'training needs {human(memory["needed"])}, evaluation '
    f'{human(evaluation["memory"]["needed"])}; training:',
    *(
      f'  {name:<12} {human(memory[name]):>10}'
      for name in ('parameters', 'optimizer', 'activations', 'temporaries')
    ),
    f'parameters {plan["parameters"]["total"]:,}, for a token '
    f'{plan["parameters"]["active"]:,}',
    f'FLOPs a step {human(plan["flops"]["step"], "FLOP")}, useful '
    f'{human(plan["flops"]["useful"], "FLOP")}',
  ]
  if 'step_seconds' in plan:
    lines += _time_lines(plan)
  return '\n'.join(lines)


def _time_lines(plan: dict[str, Any]) -> list[str]:
  parts = plan['compute_seconds']
  lines = [
    f'computation {_ms(sum(parts.values()))}, {plan["compute_known"]:.0%} of '
    'it as the compiler estimates, the rest at the peak or full bandwidth',
    *(
      f'  {name:<12} {_ms(seconds):>12}'
      for name, seconds in sorted(parts.items(), key=lambda item: -item[1])
    ),
    'collectives (part, kind, devices of a group, times, bytes, time)',
    *(
      f'  {row["part"]:<10} {row["kind"]:<18} {row["devices"]:>4} '
      f'{row["count"]:>6} {human(row["bytes"]):>9} {_ms(row["seconds"]):>12}'
      for row in plan['collectives']
    ),
    f'expected step {_step(plan)}',
    *_evaluation_lines(plan['evaluation']),
    f'routing: {plan["routing"]["seconds"] * 1e3:.2f} ms, '
    f'{plan["routing"]["share"]:.1%} of a step without overlap',
  ]
  if 'balancing' in plan:
    row = plan['balancing']
    lines.append(
      f'  of which balancing (with less without): {_ms(row["seconds"])}, '
      f'{row["share"]:.1%} of a step without overlap; '
      f'{row["collectives"]} more collectives, {human(row["bytes"])}'
    )
  if 'imbalance' in plan:
    row = plan['imbalance']
    lines.append(
      f'MaxVio {row["max_violation"]:g}: {_ms(row["seconds"])} more, '
      f'{row["share"]:.1%} of a step; {row["dropped"]:.1%} of the most loaded '
      "expert's pairs dropped"
    )
  if plan['unknown_loops']:
    lines.append(f'loops of unknown length: {plan["unknown_loops"]}')
  return lines


def _evaluation_lines(evaluation: dict[str, Any]) -> list[str]:
  if 'step_seconds' not in evaluation:
    return []
  low, high = evaluation['step_seconds']
  return [
    f'evaluation of {evaluation["sequences"]} sequences, in one round: '
    f'{_ms(low)} .. {_ms(high)}'
  ]


def _ms(seconds: float) -> str:
  return f'{1e3 * seconds:.2f} ms'


if __name__ == '__main__':
  ahead.prepare(os.environ)
  sys.exit(main(sys.argv))
