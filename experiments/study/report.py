"""Writes the report of the study from stored runs; trains nothing.

  python -m experiments.study.report

REPORT.md and figures go to experiments/results/study.
"""

import pathlib
import sys

from experiments.study import (
  balance,
  capacity,
  causality,
  differences,
  online,
  paper,
  question,
  runs,
  scale,
  specialisation,
  tuning,
)
from experiments.study.statistics import paired
from moe_jax.analysis import save_figure
from moe_jax.analysis.command_line import table

QUESTIONS = tuple(
  module.QUESTION
  for module in (
    tuning,
    balance,
    paper,
    causality,
    differences,
    capacity,
    specialisation,
    scale,
    online,
  )
)
_HEAD = """# What balancing is worth: the study

Written by `python -m experiments.study.report` from the stored runs in `runs/`,
each with its command, commit, configuration and versions. Mean ± standard
deviation over seeds; differences are paired by seed, ± half of Student's 95 %
interval. Loss is that of validation text with q frozen, in nats a token.
Trainings shared two cores with other work, so nothing here is about time. A run
that is trained again on another machine is rounded otherwise: two differed by
0.001 and 0.004 nats."""
_SHORT_NOTE = (
  'Means over seeds, q frozen; *Methods* below has their number and '
  'deviations. A planned step is an estimate.'
)
# Of README and the documentation, too.
_SHORT = {
  'first_max_violation': ('MaxVio, step 1', '.3f'),
  'average_max_violation': ('AvgMaxVio', '.3f'),
  'sup_max_violation': ('SupMaxVio', '.3f'),
  'last_max_violation': ('last fifth', '.3f'),
  'planned_16': ('planned step, 16 devices / even', '.2f'),
  'planned_16_late': ('of the last fifth', '.2f'),
  question.PERPLEXITY: ('perplexity', '.1f'),
}


def in_short(results: pathlib.Path = runs.RESULTS) -> str:
  """Returns the table of the main methods in few columns.

  Means over seeds, and paired differences of the loss.
  """
  found = runs.frame(list(balance.MAIN.values()), results)
  mean = found.groupby('arm').mean(numeric_only=True)
  baseline = 'unbalanced'
  rows = [
    [
      name,
      *(f'{mean[key][name]:{form}}' for key, (_, form) in _SHORT.items()),
      '–' if name == baseline else paired(found[runs.LOSS], name, baseline),
    ]
    for name in balance.MAIN
  ]
  headings = [heading for heading, _ in _SHORT.values()]
  return table(['`mini_16e`', *headings, 'loss - unbalanced [nats]'], rows)


def report(results: pathlib.Path = runs.RESULTS) -> str:
  """Returns the report as Markdown."""
  parts = [_HEAD, '## In short', in_short(results), _SHORT_NOTE]
  parts.append(balance.one_seed(results))
  for each in QUESTIONS:
    parts += question.section(each, results)
  return '\n\n'.join(parts) + '\n'


def main() -> int:
  """Runs the program; returns its exit code."""
  (runs.RESULTS / 'REPORT.md').write_text(report())
  for each in QUESTIONS:
    if each.can_end(runs.RESULTS):
      for name, draw in each.figures.items():
        save_figure(draw(runs.RESULTS), runs.RESULTS / name)
  print(f'{runs.RESULTS}: REPORT.md and figures written')
  return 0


if __name__ == '__main__':
  sys.exit(main())
