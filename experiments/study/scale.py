"""Question 7: does the ranking move with the number of experts?

python -m experiments.study.scale --workdir=DIR
"""

import math
import pathlib
import sys

from matplotlib.figure import Figure

from experiments.study import balance, figures
from experiments.study.question import COLUMNS, Question, Table
from experiments.study.runs import Arm
from experiments.study.statistics import Difference
from moe_jax.analysis import drawing

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
  columns = COLUMNS | balance.STABILITY
  return Table(f'{experts} experts', arms, arms[0], columns)


SIZES = (8, 16, 32, 128)
TABLES = [_table(experts) for experts in SIZES]


def _conclusion(results: pathlib.Path) -> str:
  def ranking(key):
    orders = {
      tuple(each.arms.index(arm) for arm in each.evenest(results, key))
      for each in TABLES
    }
    return 'moves' if len(orders) > 1 else 'is the same'

  return '\n'.join(
    [
      'From size to size the ranking by AvgMaxVio '
      f'{ranking("average_max_violation")}, by MaxVio of the last fifth it '
      f'{ranking("last_max_violation")}; by loss one seed cannot tell.\n',
      *(f'- {each.told(results)}' for each in TABLES),
    ]
  )


def _figure(results: pathlib.Path) -> Figure:
  lines = {}
  for place, method in enumerate(METHODS):
    for key, look in (
      ('average_max_violation', {}),
      ('last_max_violation', {'linestyle': ':', 'fillstyle': 'none'}),
    ):
      values = {}
      for experts, each in zip(SIZES, TABLES, strict=True):
        of_arm = each.frame(results)[key][each.arms[place].name]
        values[experts] = Difference(of_arm.mean(), math.nan)
      style = drawing.method_style(each.arms[place].method) | look
      lines[f'{method}, {COLUMNS[key][0]}'] = style, values
  return figures.by_size(lines, 'experts', figures.VIOLATION, log=True)


QUESTION = Question(
  'Does the ranking move with the number of experts?',
  '`mini_16e` with 8, 16, 32 and 128 experts of the same width, of which a '
  'token takes 4: equal compute a token. One seed; those of 16 experts have '
  'five in question 1.',
  TABLES,
  conclusion=_conclusion,
  figures={'scale': _figure},
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
