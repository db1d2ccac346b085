"""Question 2: the paper's own model, in its first half million tokens.

python -m experiments.study.paper --workdir=DIR
"""

import functools
import pathlib
import sys

from experiments.study import figures, runs
from experiments.study.question import Question, Table
from experiments.study.runs import Arm

ARMS = {
  method: Arm(
    method,
    method,
    {
      'steps': 250,
      'batch_size': 4,
      'accumulation': 1,
      'eval_every': 0,
      'eval_sequences': 64,
      'checkpoint_every': 50,
    },
    experiment='paper_16e',
    minutes=60,
  )
  for method in ('loss_controlled', 'loss_free', 'bip')
}

METHODS = Table('Methods', list(ARMS.values()), ARMS['loss_controlled'])


def _conclusion(results: pathlib.Path) -> str:
  found = runs.frame(METHODS.arms, results).droplevel('seed')
  told = '; '.join(
    f'`{name}` {row["first_max_violation"]:.2f}, '
    f'{row["sup_max_violation"]:.2f}, {row["last_max_violation"]:.2f}, '
    f'{row["worst_sup_max_violation"]:.2f}'
    for name, row in found.iterrows()
  )
  others = found['average_max_violation'].drop('bip').min()
  worst = found['sup_max_violation']['bip']
  return (
    f'{"Yes" if worst < others else "No"}: in its worst step `bip` has MaxVio '
    f'{worst:.2f}, the better of the others on average {others:.2f}. MaxVio of '
    'the first step, of the worst one and of the last fifth, means '
    f'over layers, and of the worst step of a layer: {told}. One seed.'
  )


QUESTION = Question(
  "The paper's own model: is it balanced from the first step on?",
  "`paper_16e`, 302.7 M parameters, 8 layers: the paper's model and its "
  'settings of the methods, but 250 steps of 2,048 tokens, 0.5 M in total, of '
  'speeches, and a schedule of that length. One seed. So few tokens tell '
  'nothing about its quality.',
  [METHODS],
  conclusion=_conclusion,
  figures={'paper': functools.partial(figures.curves, METHODS.arms)},
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
