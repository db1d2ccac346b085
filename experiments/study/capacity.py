"""Question 5: what static buffers cost each method: dropping, or rounding.

python -m experiments.study.capacity --workdir=DIR
"""

import pathlib
import sys

from matplotlib.figure import Figure
import pandas as pd

from experiments.study import balance, figures, runs, step_times
from experiments.study.question import COLUMNS, PERPLEXITY, Question, Table
from experiments.study.runs import Arm

# The weight of most trainings: that of the paper costs loss by itself.
METHODS = ('loss_controlled_0.01', 'bip', 'midpoint')
FACTORS = (1.0, 1.25, 2.0)
_ROUNDED = {'capacity_factor': 1.0, 'model.round_to_capacity': True}
_SHOWN = {
  key: COLUMNS[key]
  for key in ('average_max_violation', 'worst_sup_max_violation', PERPLEXITY)
} | {'dropped': ('dropped', '.2%')}


def _table(name):
  """Returns an arm with buffers of several kinds, beside it without any."""
  dropless = balance.MAIN[name]
  options = {
    f'{name}_capacity_{factor}': {'capacity_factor': factor}
    for factor in FACTORS
  } | {f'{name}_rounded': _ROUNDED}
  arms = [
    Arm(buffers, dropless.method, dropless.options | x)
    for buffers, x in options.items()
  ]
  return Table(name, [dropless, *arms], dropless, _SHOWN)


TABLES = [_table(name) for name in METHODS]


def _conclusion(results: pathlib.Path) -> str:
  times = ', '.join(
    f'{step_times.over_even(16, factor):.2f}' for factor in FACTORS
  )
  lines = [
    'Buffers are computed whole, so that with them a step on 16 devices is '
    f'planned to take {times} times that of even loads at '
    f'{", ".join(map(str, FACTORS))} times the mean, whatever balances; '
    'question 1 has the times without.\n'
  ]
  for each in TABLES:
    dropped = runs.frame(each.arms, results).groupby('arm')['dropped'].mean()
    shares = ', '.join(f'{dropped[arm.name]:.1%}' for arm in each.arms[1:])
    lines.append(
      f'- `{each.heading}` with these, and rounded, dropped {shares}; loss: '
      f'{each.differences(results)}.'
    )
  return '\n'.join(lines)


def _figure(results: pathlib.Path) -> Figure:
  buffers = [f'{factor} x mean' for factor in FACTORS] + ['rounded to the mean']
  dropped = {}
  for each in TABLES:
    arms = each.arms[1:]
    found = runs.frame(arms, results)['dropped'].groupby('arm').mean()
    dropped[each.heading] = [100 * found[arm.name] for arm in arms]
  return figures.rows(
    pd.DataFrame(dropped, buffers),
    'dropped pairs of token and expert [%]',
    [each.baseline.method for each in TABLES],
  )


QUESTION = Question(
  'What do static buffers cost each method?',
  'Capacity factors of 1.0, 1.25 and 2.0 drop what does not fit; rounding at '
  '1.0 drops nothing. One seed. SupMaxVio of the worst layer + 1 is the factor '
  'that would have dropped nothing at any step. Evaluation never drops.',
  TABLES,
  conclusion=_conclusion,
  figures={'capacity': _figure},
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
