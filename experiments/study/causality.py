"""Question 3: does a q that sees its own batch help or hurt what is deployed?

python -m experiments.study.causality --workdir=DIR
"""

import sys

from experiments.study import audits, balance, tuning
from experiments.study.question import Audit, Question, Table
from experiments.study.runs import Arm

STEP = 4096  # Tokens of a step of mini_16e.
SEQUENCES = 32


def _arms(factor):
  """Returns solved and lagged prices at so many times the batch."""
  options = tuning.TUNED | {
    'batch_size': int(SEQUENCES * factor),
    'steps': int(250 / factor),
  }
  return [
    Arm(f'{name}_{int(STEP * factor)}', method, options | more)
    for name, method, more in (
      ('bip', 'bip', {}),
      ('bip_lag', 'bip_lag', {}),
      ('midpoint', 'midpoint', {}),
      ('midpoint_lag', 'midpoint_lag', {}),
    )
  ]


LAGGED = [Arm(name, name, tuning.TUNED) for name in ('bip_lag', 'midpoint_lag')]
SMALL, LARGE = _arms(1 / 4), _arms(4)

QUESTION = Question(
  'Does training on a q that sees its batch hurt what is deployed?',
  'Prices of the batch before (`lag`) cannot see what follows a token; those '
  'solved on the same batch can, the less the more tokens it has. Equal tokens '
  'in total, batches of 1,024, 4,096 and 16,384. Beside the loss with q frozen '
  'the table has that with q solved on the evaluation batch.',
  [
    Table('1,024 tokens a step', SMALL, SMALL[0]),
    Table(
      '4,096 tokens a step',
      [balance.MAIN['bip'], balance.MAIN['midpoint'], *LAGGED],
      balance.MAIN['bip'],
    ),
    Table('16,384 tokens a step', LARGE, LARGE[0]),
  ],
  audits=[
    Audit(
      'Routes that change with the tokens that follow',
      audits.causality,
      [*balance.MAIN.values(), *LAGGED],
    )
  ],
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
