"""Question 1 at the size of the demo: six short trainings.

  python -m experiments.study.demo --workdir=DIR

Prints the table; figures and stored runs go to DIR/study. It shows how methods
balance, while a quarter of a million tokens tell little of their losses.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import sys

from experiments.study import balance, figures, question, runs
from moe_jax.analysis import save_figure
from moe_jax.analysis.command_line import Parser, answer

# At the options of the demo: what was tuned is of longer runs.
ARMS = [
  dataclasses.replace(arm, experiment='demo', options={}, seeds=(0,))
  for arm in balance.MAIN.values()
  if arm.name == arm.method
]
QUESTION = question.Question(
  'Which methods balance from the first step on?',
  '`demo`: 16 experts, of which a token takes 4, 0.25 M tokens of speeches.',
  [question.Table('Methods', ARMS, ARMS[0])],
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  return answer(lambda: _answer(argv))


def _answer(argv: Sequence[str] | None) -> str:
  parser = Parser(description=__doc__)
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  workdir = parser.parse_args(argv).workdir.absolute()
  results = workdir / 'study'
  runs.run_all(ARMS, workdir, results)
  figure = figures.curves(ARMS, results)
  save_figure(figure, results / 'max_violation')
  where = f'The figure is {results}/max_violation.png'
  return '\n\n'.join([*question.section(QUESTION, results), where])


if __name__ == '__main__':
  sys.exit(main())
