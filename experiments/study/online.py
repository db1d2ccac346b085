"""Question 8: tokens that arrive one by one, on scores of trained routers.

python -m experiments.study.online --workdir=DIR
"""

import pathlib
import sys

from matplotlib.figure import Figure
import pandas as pd

from experiments.study import audits, balance, figures
from experiments.study.question import Audit, Question

ARMS = [balance.MAIN[name] for name in ('unbalanced', 'loss_controlled', 'bip')]
RULES = 'top-k', 'exact', 'exact, paced', '100 bins, paced'  # Those told of.


def _conclusion(results: pathlib.Path) -> str:
  found = {x.name: audits.stored(audits.online, x, results) for x in ARMS}

  def by_rule(rows, key):
    return ', '.join(f'{rows[rule][key]:.2f}' for rule in RULES)

  told = '; '.join(
    f'`{name}`: MaxVio {by_rule(rows, "MaxVio")}, regret '
    f'{by_rule(rows, "regret [%]")} %'
    for name, rows in found.items()
  )
  regrets = (
    [found[x.name][rule]['regret [%]'] for x in ARMS]
    for rule in ('exact', 'exact, paced')
  )
  exact, paced = (f'{min(x):.1f} to {max(x):.1f} %' for x in regrets)
  return (
    f"The paper's rule has a regret of {exact}, paced {paced}. By top-k, the "
    f"paper's exact rule, the same paced, and 100 bins paced: {told}. One "
    'checkpoint each, no intervals.'
  )


def _figure(results: pathlib.Path) -> Figure:
  found = {x.name: audits.stored(audits.online, x, results) for x in ARMS}
  regret = {
    f'scores of {name}': {
      f'{rule}, {row["bytes a layer"] / 1e3:.3g} kB': row['regret [%]']
      for rule, row in rows.items()
    }
    for name, rows in found.items()
  }
  methods = [arm.method for arm in ARMS]
  return figures.rows(pd.DataFrame(regret), 'regret [%]', methods)


QUESTION = Question(
  'How good are prices that see one token at a time?',
  '2,048 tokens of validation text arrive one by one, with the scores that '
  'trained routers of question 1 give them. Two dual iterations an arrival, '
  'the exact rule and histograms of the margins. The paper prices an expert by '
  'its share of all arrivals; paced, by its share of those so far. Regret: how '
  "far below the offline optimum, where what is beyond an expert's capacity "
  'earns nothing.',
  [],
  audits=[Audit('Rules', audits.online, ARMS)],
  conclusion=_conclusion,
  figures={'online': _figure},
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
