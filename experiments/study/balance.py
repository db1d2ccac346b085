"""Question 1: the paper's table, with baselines that were tuned.

mini_16e in five paired seeds for what a claim rests on, two for variants.

  python -m experiments.study.balance --workdir=DIR
"""

import sys

from experiments.study import runs, tuning

FIVE, TWO = range(5), range(2)

# What the claims are about.
MAIN = [
  runs.Arm(name, method, tuning.TUNED | options, FIVE)
  for name, method, options in (
    ('unbalanced', 'unbalanced', {}),
    ('loss_controlled', 'loss_controlled', {}),
    ('loss_free', 'loss_free', {}),
    ('bip', 'bip', {}),
    ('midpoint', 'midpoint', {}),
    ('quantile', 'quantile', {}),
  )
]
VARIANTS = [
  runs.Arm(name, method, tuning.TUNED | options, TWO)
  for name, method, options in (
    ('bip_t2', 'bip_t2', {}),
    ('bip_t8', 'bip_t8', {}),
    ('bip_t14', 'bip_t14', {}),
    ('loss_free_sequence', 'loss_free', {'losses.sequence': 1e-4}),
    ('dynamic', 'threshold', {'model.selection': 'choose_above'}),
  )
]
ARMS = [*MAIN, *VARIANTS]


if __name__ == '__main__':
  sys.exit(runs.main(ARMS))
