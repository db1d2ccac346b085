"""Question 7: does the ranking move with the number of experts?

python -m experiments.study.scale --workdir=DIR
"""

import pathlib
import sys

from experiments.study import balance
from experiments.study.question import Question, Table
from experiments.study.runs import Arm

METHODS = ('unbalanced', 'loss_controlled_0.01', 'bip', 'midpoint')


def _arms(experts):
  main = [balance.MAIN[name] for name in METHODS]
  if experts == 16:
    return main
  return [
    Arm(
      f'{arm.name}_{experts}_experts',
      arm.method,
      arm.options | {'model.experts': experts},
      minutes=6,
    )
    for arm in main
  ]


def _table(experts):
  arms = _arms(experts)
  return Table(f'{experts} experts', arms, arms[0])


TABLES = [_table(experts) for experts in (8, 16, 32, 128)]


def _conclusion(results: pathlib.Path) -> str:
  orders = {
    tuple(each.arms.index(arm) for arm in each.evenest(results))
    for each in TABLES
  }
  moves = 'moves' if len(orders) > 1 else 'is the same'
  return '\n'.join(
    [
      f'The ranking by balance {moves} from size to size; by loss one seed '
      'cannot tell. AvgMaxVio (last fifth), and differences of loss in nats:\n',
      *(
        f'- {each.heading}: {each.balance(results)}. '
        f'Loss: {each.differences(results)}.'
        for each in TABLES
      ),
    ]
  )


QUESTION = Question(
  'Does the ranking move with the number of experts?',
  '`mini_16e` with 8, 16, 32 and 128 experts of the same width, of which a '
  'token takes 4: equal compute a token. One seed; those of 16 experts have '
  'five in question 1.',
  TABLES,
  conclusion=_conclusion,
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
