"""Prints plans that `launch.plan --out` stored as two tables in Markdown.

python -m launch.table experiments/results/plans/*.json
"""

from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a table in Markdown."""
  lines = [columns, ['---'] * len(columns), *rows]
  return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def estimates(plans: dict[str, dict[str, Any]]) -> str:
  """Tells what each plan needs and takes."""
  rows = []
  for name, plan in plans.items():
    config, memory, mesh = plan['config'], plan['memory'], plan['mesh']
    evaluation = plan['evaluation']
    needed = (each['memory']['needed'] / 1e9 for each in (plan, evaluation))
    mfu = sorted(100 * part for part in plan['mfu'])
    rows.append(
      (
        name,
        f'{mesh["data"]}, {mesh["expert"]}',
        f'{config["batch_size"]} / {config["accumulation"]}',
        _room(config),
        ', '.join(f'{size:.1f}' for size in needed)
        + f' of {memory["limit"] / 1e9:.1f}',
        _range(plan),
        _range(evaluation),
        f'{mfu[1]:.1f} .. {mfu[0]:.1f}',
        _routing(plan),
      )
    )
  return table(
    (
      'plan',
      'mesh: data, expert',
      'batch / accumulation',
      'capacity',
      'HBM a chip, GB: training, evaluation',
      'step, ms',
      'evaluation, ms',
      'MFU, %',
      'routing, ms (%)',
    ),
    rows,
  )


def balancing(plans: dict[str, dict[str, Any]]) -> str:
  """Tells what the router sends, and what a step without balancing lacks."""
  rows = []
  for name, plan in plans.items():
    sent = [each for each in plan['collectives'] if each['part'] == 'router']
    less = plan.get('balancing')
    rows.append(
      (
        name,
        f'{plan["config"]["batch_size"] * plan["config"]["sequence_length"]:,}',
        sum(each['count'] for each in sent),
        f'{sum(each["bytes"] for each in sent):,}',
        _routing(plan),
        f'{1e3 * less["seconds"]:.1f} ({100 * less["share"]:.1f})'
        if less
        else '-',
      )
    )
  return table(
    (
      'plan',
      'tokens a step',
      'collectives of the router',
      'their bytes',
      'routing, ms (%)',
      'more than unbalanced, ms (%)',
    ),
    rows,
  )


def _room(config: dict[str, Any]) -> str:
  rounded = config['model'].get('round_to_capacity', False)
  if config['capacity_factor'] or rounded:
    return 'rounded' if rounded else f'{config["capacity_factor"]:g}'
  return 'dropless'


def _range(plan: dict[str, Any]) -> str:
  low, high = (1e3 * seconds for seconds in plan['step_seconds'])
  return f'{low:.0f} .. {high:.0f}'


def _routing(plan: dict[str, Any]) -> str:
  routing = plan['routing']
  return f'{1e3 * routing["seconds"]:.1f} ({100 * routing["share"]:.1f})'


def main(paths: Sequence[str]) -> int:
  """Runs the program; returns its exit code."""
  if not paths or paths[0].startswith('-'):
    print(__doc__)
    return 0 if paths else 2
  try:
    plans = {
      pathlib.Path(path).stem: json.loads(pathlib.Path(path).read_text())
      for path in paths
    }
    tables = estimates(plans), balancing(plans)
  except KeyError as error:
    print(f'error: a plan has no {error}; make it anew', file=sys.stderr)
    return 2
  except (OSError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(*tables, sep='\n\n')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
