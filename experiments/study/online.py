"""Question 8: tokens that arrive one by one, on scores of trained routers.

python -m experiments.study.online --workdir=DIR
"""

import pathlib
import sys

from experiments.study import audits, balance
from experiments.study.question import Audit, Question

ARMS = [balance.MAIN[name] for name in ('unbalanced', 'loss_controlled', 'bip')]


def _conclusion(results: pathlib.Path) -> str:
  found = {x.name: audits.stored(audits.online, x, results) for x in ARMS}

  def by_rule(rows, key):
    values = (
      f'{rows[rule][key]:.2f}' for rule in ('top-k', 'exact', '100 bins')
    )
    return ', '.join(values)

  told = '; '.join(
    f'`{name}`: MaxVio {by_rule(rows, "MaxVio")}, regret '
    f'{by_rule(rows, "regret [%]")} %'
    for name, rows in found.items()
  )
  return (
    f"By top-k, the paper's exact rule and its 100 bins: {told}. One "
    'checkpoint each, no intervals.'
  )


QUESTION = Question(
  'How good are prices that see one token at a time?',
  '2,048 tokens of validation text arrive one by one, with the scores that '
  'trained routers of question 1 give them. Two dual iterations an arrival, '
  'the exact rule and histograms of the margins. Regret: how far below the '
  "offline optimum, where what is beyond an expert's capacity earns nothing.",
  [],
  audits=[Audit('Rules', audits.online, ARMS)],
  conclusion=_conclusion,
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
