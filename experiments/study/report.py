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
  figures,
  online,
  paper,
  question,
  runs,
  scale,
  specialisation,
  tuning,
)

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
Trainings shared two cores with other work, so nothing here is about time."""


def report(results: pathlib.Path = runs.RESULTS) -> str:
  """Returns the report as Markdown."""
  parts = [_HEAD]
  for each in QUESTIONS:
    parts += question.section(each, results)
  return '\n\n'.join(parts) + '\n'


def main() -> int:
  """Runs the program; returns its exit code."""
  (runs.RESULTS / 'REPORT.md').write_text(report())
  figures.write(runs.RESULTS)
  print(f'{runs.RESULTS}: REPORT.md and figures written')
  return 0


if __name__ == '__main__':
  sys.exit(main())
