"""What is tuned before methods are compared, on a seed that no result uses.

The learning rate for `unbalanced`, whose loss no balancer disturbs; then, at
that rate, what the baselines have to tune: the weight of the auxiliary loss and
the rate of the bias, for softmax and sigmoid scores. The learning rate once
more for the best of them.

  python -m experiments.study.tuning --workdir=DIR
"""

import sys

from experiments.study import runs

# Evaluated once, at the end, on four times the tokens of the experiments.
COMMON = {'eval_every': 0, 'eval_sequences': 512}
# The lowest rate whose validation perplexity is within 1 % of the best; the
# report shows the others, and a test compares this with the stored runs.
LEARNING_RATE = 4e-3
TUNED = COMMON | {'learning_rate': LEARNING_RATE}
SEEDS = (5,)

LEARNING_RATES = [
  runs.Arm(
    f'unbalanced_lr_{rate}',
    'unbalanced',
    COMMON | {'learning_rate': rate},
    SEEDS,
  )
  for rate in (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
]
ALPHAS = [
  runs.Arm(
    f'loss_controlled_alpha_{alpha}',
    'loss_controlled',
    TUNED | {'balancer.alpha': alpha},
    SEEDS,
  )
  for alpha in (0.001, 0.01, 0.03, 0.1)
]
RATES = [
  runs.Arm(
    f'loss_free_{scoring}_rate_{rate}',
    'loss_free',
    TUNED | {'balancer.rate': rate, 'model.scoring': scoring},
    SEEDS,
  )
  for scoring in ('softmax', 'sigmoid')
  for rate in (0.001, 0.01)
]
ARMS = [*LEARNING_RATES, *ALPHAS, *RATES]


if __name__ == '__main__':
  sys.exit(runs.main(ARMS))
