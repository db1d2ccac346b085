"""Trains one model under several methods and compares them.

  python -m experiments.compare --config=experiments/demo.py --workdir=DIR \\
      [--methods=loss_controlled,loss_free,bip] [--seeds=0,1] \\
      [--allow_config_change=OPTION,...] [--config.OPTION=VALUE ...]

Runs go to DIR/METHOD_seed_SEED; what is trained already is not trained again,
and the same command continues what was interrupted. Then DIR holds
comparison.md, comparison.json and figures (png and svg). All methods share
initial weights, batches and every option but those of the balancer.
"""

from collections.abc import Sequence
import pathlib
import sys

from moe_jax import analysis
from moe_jax import main as command_line
from moe_jax.runs import preemption, processes

_FLAGS = {
  'methods': 'loss_controlled,loss_free,bip',
  'seeds': '0',
  'allow_config_change': '',
}


def write(runs: dict[str, list[analysis.Run]], workdir: pathlib.Path) -> str:
  """Writes table, numbers and figures; returns the table.

  Args:
    runs: of each method, one run a seed; figures show the first.
    workdir: where the files go.
  """
  table = analysis.comparison(runs)
  markdown = analysis.comparison_markdown(table)
  (workdir / 'comparison.md').write_text(markdown)
  table.reset_index().to_json(
    workdir / 'comparison.json', orient='records', indent=2, double_precision=15
  )
  firsts = {method: of_method[0] for method, of_method in runs.items()}
  for name, figure in (
    ('max_violation', analysis.max_violation_figure(firsts)),
    ('load', analysis.load_heatmap_figure(firsts)),
    ('loss', analysis.loss_figure(firsts)),
  ):
    analysis.save_figure(figure, workdir / name)
  for name, draw, of in (
    ('sequences', analysis.sequence_violation_figure, firsts),
    ('frontier', analysis.frontier_figure, runs),
  ):
    try:
      analysis.save_figure(draw(of), workdir / name)
    except ValueError as error:  # Of an older run, or one that diverged.
      print(f'warning: no {name} is drawn: {error}', file=sys.stderr)
  return markdown


def _names(flag: str, value: str) -> list[str]:
  names = list(dict.fromkeys(name.strip() for name in value.split(',')))
  if '' in names:
    raise ValueError(f'--{flag}={value}: has an empty item')
  return names


def main(argv: Sequence[str]) -> int:
  """Runs the program; returns its exit code."""
  if {'--help', '-h', '-help'} & set(argv):
    print(__doc__)
    return 0
  try:
    _, values = command_line.parse(argv, others=_FLAGS)
    if ':' in values.config:
      raise ValueError(
        f'--config={values.config}: leave the method out, see --methods'
      )
    if not values.workdir:
      raise ValueError('--workdir=DIR: missing')
    workdir = pathlib.Path(values.workdir)
    from moe_jax import config
    from moe_jax.train.loop import train
    from moe_jax.train.plan import plan

    if any(flag.startswith('--config.seed') for flag in argv):
      raise ValueError('--config.seed: give --seeds=0,1 instead')
    plans = {}
    for method in _names('methods', values.methods):
      for seed in _names('seeds', values.seeds):
        if not seed.isdecimal():
          raise ValueError(f'--seeds={values.seeds}: must be like 0,1,2')
        options, _ = command_line.parse(argv, method=method, others=_FLAGS)
        options.seed = int(seed)
        name = f'{method}_seed_{int(seed)}'
        # All of them before the first is trained: a mistake costs nothing.
        plans[method, name] = plan(
          config.freeze(options),
          workdir / name,
          config.split_names(values.allow_config_change),
        )
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  runs, failed = {}, False
  for (method, name), planned in plans.items():
    try:
      with preemption.notice() as preempted:
        train(planned, preempted)
    except FloatingPointError as error:
      # A method that fails is a result: the others are compared with it.
      print(f'error: {name}: {error}', file=sys.stderr)
      failed = True
    except Exception as error:
      return command_line.exit_code(error)
    runs.setdefault(method, []).append(analysis.Run(workdir / name))
  print(write(runs, workdir))
  print(f'Table and figures are in {workdir}: comparison.md, *.png, *.svg')
  return int(failed)


if __name__ == '__main__':
  processes.end(main)
