"""Question 7: does the ranking move with the number of experts?

python -m experiments.study.scale --workdir=DIR
"""

import pathlib
import sys

from experiments.study import runs, tuning
from experiments.study.question import Question, Table
from experiments.study.runs import Arm

METHODS = ('unbalanced', 'loss_controlled', 'bip', 'midpoint')


def _arms(experts):
  return [
    Arm(
      f'{method}_{experts}_experts',
      method,
      tuning.TUNED | {'model.experts': experts},
      minutes=6,
    )
    for method in METHODS
  ]


def _table(experts):
  arms = _arms(experts)
  return Table(f'{experts} experts', arms, arms[0])


TABLES = [_table(experts) for experts in (8, 32, 128)]


def _conclusion(results: pathlib.Path) -> str:
  lines = []
  for each in TABLES:
    loss = runs.frame(each.arms, results)[runs.LOSS].droplevel('seed')
    ranking = ' < '.join(f'`{name}`' for name in loss.sort_values().index)
    lines.append(f'- {each.heading}: {ranking}; {each.differences(results)}.')
  return '\n'.join(lines)


QUESTION = Question(
  'Does the ranking move with the number of experts?',
  '`mini_16e` with 8, 32 and 128 experts of the same width, of which a token '
  'takes 4: equal compute a token. One seed.',
  TABLES,
  conclusion=_conclusion,
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
