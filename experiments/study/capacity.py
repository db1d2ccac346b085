"""Question 5: what static buffers cost each method: dropping, or rounding.

python -m experiments.study.capacity --workdir=DIR
"""

import pathlib
import sys

from experiments.study import balance, question, runs, tuning
from experiments.study.question import COLUMNS, PERPLEXITY, Question, Table
from experiments.study.runs import Arm

METHODS = ('loss_controlled', 'bip', 'midpoint')


def _dropping(factor):
  return [
    Arm(
      f'{method}_capacity_{factor}',
      method,
      tuning.TUNED | {'capacity_factor': factor},
    )
    for method in METHODS
  ]


ROUNDED = [
  Arm(
    f'{method}_rounded',
    method,
    tuning.TUNED | {'capacity_factor': 1.0, 'model.round_to_capacity': True},
  )
  for method in METHODS
]
_SHOWN = {
  key: COLUMNS[key]
  for key in ('average_max_violation', 'worst_sup_max_violation', PERPLEXITY)
} | {'dropped': ('dropped', '.2%')}
_BASELINE = balance.MAIN['midpoint']
TABLES = [
  *(
    Table(f'Capacity {factor}', _dropping(factor), _BASELINE, _SHOWN)
    for factor in (1.0, 1.25, 2.0)
  ),
  Table('Rounded at 1.0', ROUNDED, _BASELINE, _SHOWN),
]


def _conclusion(results: pathlib.Path) -> str:
  lines = []
  for each in TABLES:
    dropped = runs.frame(each.arms, results).groupby('arm')['dropped'].mean()
    shares = ', '.join(
      f'`{arm.name}` {dropped[arm.name]:.1%}' for arm in each.arms
    )
    lines.append(
      f'- {each.heading}: dropped {shares}; {question.told(each, results)}.'
    )
  return '\n'.join(lines)


QUESTION = Question(
  'What do static buffers cost each method?',
  'Capacity factors of 1.0, 1.25 and 2.0 drop what does not fit; rounding at '
  '1.0 drops nothing. One seed. SupMaxVio of the worst layer + 1 is the factor '
  'that would have dropped nothing at any step. Evaluation never drops.',
  TABLES,
  conclusion=_conclusion,
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
