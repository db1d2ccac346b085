"""Question 6: does balance cost specialisation?

python -m experiments.study.specialisation --workdir=DIR
"""

import pathlib
import sys

from experiments.study import audits, tuning
from experiments.study.question import Audit, Question, Table
from experiments.study.runs import Arm

ARMS = [
  Arm(name, method, tuning.TUNED | options, experiment='domains_16e')
  for name, method, options in (
    ('unbalanced', 'unbalanced', {}),
    ('loss_controlled_sequence', 'loss_controlled', {}),
    ('loss_controlled_batch', 'loss_controlled', {'balancer.over': 'batch'}),
    ('bip', 'bip', {}),
    ('midpoint', 'midpoint', {}),
  )
]

METHODS = Table('Methods', ARMS, ARMS[0])


def _conclusion(results: pathlib.Path) -> str:
  found = {
    x.name: audits.stored(audits.specialisation, x, results) for x in ARMS
  }
  purity = ', '.join(
    f'`{name}` {rows["validation"]["purity"]:.3f}'
    for name, rows in found.items()
  )
  return f'Purity: {purity}. Loss: {METHODS.differences(results)}.'


QUESTION = Question(
  'Does balance cost specialisation?',
  '`domains_16e`: speeches, drama and code, a third of the rows each. *Purity* '
  "is the share of an expert's tokens that are of its most frequent domain, a "
  'third by chance; information is mutual, between expert and domain or token. '
  'One seed.',
  [METHODS],
  audits=[Audit('What an expert tells', audits.specialisation, ARMS)],
  conclusion=_conclusion,
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
