"""Tells what balance buys: the loads of a run on the devices of a mesh.

    python -m moe_jax.analysis.placement --run=DIR [--OPTION=VALUE ...]

Experts are placed on devices again and again, by loads that are predicted. The
loads that were recorded then say how even the work was, and a model how long a
step would take.

    --run        work directory of a run that recorded loads.
    --devices    that share the experts of a layer (8).
    --redundant  copies of experts in the policy 'replicas' (as many as
                 devices).
    --interval   records, which are steps where experts_every is 1, that a
                 placement is for (10).
    --predictor  last, ema, trend or regime: whose placements are told in
                 hindsight and drawn (ema).
    --window     records that are averaged or continued (10).
    --drift      share of tokens that may change experts from one window to the
                 next where loads are settled (0.05).
    --hindsight  records for which the optimum is sought (10); it takes up to 2
                 seconds for each of their layers.
    --flops      FLOP/s of a device (989.4e12: H100 SXM, bfloat16).
    --bandwidth  bytes/s that it sends, and as many that it receives (450e9:
                 NVLink of an H100 SXM).
    --out        JSON file with all numbers.
    --figure     name, without .png and .svg, of a figure.

Prints Markdown. Exit codes: 0 answered; 2 refused (bad input).
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import sys

from matplotlib.figure import Figure

from moe_jax.analysis import drawing
from moe_jax.analysis.command_line import Parser, answer, check_output, table
from moe_jax.analysis.placement_study import Options, Study
from moe_jax.analysis.results import Results
from moe_jax.analysis.step_time import ASSUMPTIONS

_LINES = {'contiguous': '-', 'greedy': '--', 'replicas': ':'}


def markdown(study: Study) -> str:
  """Writes a study as a page of Markdown."""
  run, options = study.run, study.options
  _, layers, experts = study.loads.shape
  hindsight = study.hindsight.mean()
  settled = ('-' if step is None else str(step) for step in study.settled)
  return '\n\n'.join(
    [
      f'# Experts of {run.method} on {options.devices} devices',
      f'{run.workdir}: {layers} layers of {experts} experts, loads of '
      f'{len(study.steps)} steps. Experts are placed anew every '
      f'{options.interval} records, with {options.copies} redundant copies in '
      '*replicas*.',
      '## Policies',
      table(study.policies.columns, study.policies.itertuples(index=False)),
      '*max / mean*: load of the fullest device over the mean, mean over '
      'layers and records; *worst layer*, *worst record*: the same of these '
      'alone; *moves*: experts that a device gets anew, a layer and record; '
      '*over even*: time beyond that of even loads.',
      f'## In hindsight, by {options.predictor}, on {len(study.hindsight)} '
      'records',
      table(['placement', 'max / mean'], hindsight.items()),
      '*split at best*: the linear program over the splits of tokens among the '
      'copies that there are. *optimum without copies*: the integer program of '
      'whole experts, to 1 % or as far as 2 seconds lead; *bound*: none has '
      'less. It is 1 for experts that may be split over all devices.',
      '## Predictors',
      table(
        ['predictor', *study.errors.columns],
        study.errors.itertuples(),
      ),
      'Mean over records and layers of the sum of |predicted - load| over the '
      'sum of loads; horizons in records. *fluctuating*, *settled*: '
      f'{options.interval} ahead from records where a layer does.',
      '## When loads settle',
      study.settling,
      table(range(layers), [settled]),
      '## Assumptions',
      '\n'.join(f'- {line}' for line in ASSUMPTIONS),
    ]
  )


def figure(study: Study) -> Figure:
  """Draws max over mean load, and the drift of loads, by step."""
  drawn, (above, below) = drawing.subplots(6.0, 2, 1, sharex=True)
  chosen = ('-', study.options.predictor)
  for (policy, predictor), placed in study.placed.items():
    if predictor in chosen:
      above.plot(
        study.steps[1:],
        placed.imbalance_NxL.mean(1),
        _LINES[policy],
        color=drawing.COLORS[list(_LINES).index(policy)],
        label=policy if predictor == '-' else f'{policy} by {predictor}',
      )
  above.axhline(1.0, color='0.6', linewidth=1)
  above.set_ylabel(f'max / mean load of {study.options.devices} devices')
  below.plot(
    study.steps, study.drift.mean(1), color='black', label='mean over layers'
  )
  below.fill_between(
    study.steps, study.drift.min(1), study.drift.max(1), color='0.8'
  )
  below.axhline(study.options.drift, color='black', linestyle='--')
  below.set(xlabel='optimizer step', ylabel='drift (share of tokens)')
  drawing.title(below, 'line: mean over layers; band: all; dashed: settled')
  drawing.grid(above)
  drawing.grid(below)
  drawing.legend(drawn, above)
  return drawn


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  return answer(lambda: _answer(argv))


def _answer(argv: Sequence[str] | None) -> str:
  parser = Parser(description=__doc__)
  parser.add_argument('--run', required=True)
  for field in dataclasses.fields(Options):
    parser.add_argument(
      f'--{field.name}', type=field.type, default=field.default
    )
  parser.add_argument('--out', default='')
  parser.add_argument('--figure', default='')
  values = vars(parser.parse_args(argv))
  run, out, drawn = (values.pop(name) for name in ('run', 'out', 'figure'))
  options = Options(**values)
  check_output('out', out)
  check_output('figure', drawn)
  study = Study(Results(run), options)
  if out:
    pathlib.Path(out).write_text(json.dumps(study.to_json(), indent=1) + '\n')
  if drawn:
    drawing.save_figure(figure(study), drawn)
  return markdown(study)


if __name__ == '__main__':
  sys.exit(main())
