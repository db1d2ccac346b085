"""Question 2: the paper's own model, in its first half million tokens.

python -m experiments.study.paper --workdir=DIR
"""

import sys

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

QUESTION = Question(
  "The paper's own model: is it balanced from the first step on?",
  '`paper_16e`, 302.7 M parameters, 8 layers, the settings of the paper but '
  'for the batch: 250 steps of 2,048 tokens of speeches, 0.5 M in total, one '
  'seed. So few tokens tell nothing about its quality.',
  [Table('Methods', list(ARMS.values()), ARMS['loss_controlled'])],
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
