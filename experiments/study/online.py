"""Question 8: tokens that arrive one by one, on scores of trained routers.

python -m experiments.study.online --workdir=DIR
"""

import sys

from experiments.study import audits, balance
from experiments.study.question import Audit, Question

ARMS = [balance.MAIN[name] for name in ('unbalanced', 'loss_controlled', 'bip')]

QUESTION = Question(
  'How good are prices that see one token at a time?',
  '2,048 tokens of validation text arrive one by one, with the scores that '
  'trained routers of question 1 give them. Two dual iterations an arrival, '
  'the exact rule and histograms of the margins. Regret: how far below the '
  "offline optimum, where what is beyond an expert's capacity earns nothing.",
  [],
  audits=[Audit('Rules', audits.online, ARMS)],
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
