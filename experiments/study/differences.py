"""Question 4: what each difference between the rules is worth, one at a time.

python -m experiments.study.differences --workdir=DIR
"""

import pathlib
import sys

from matplotlib.figure import Figure
import pandas as pd

from experiments.study import balance, figures, tuning
from experiments.study.question import COLUMNS, Question, Table
from experiments.study.runs import Arm

_OF_BIP = {
  'bip_t1': {'iterations': 1},
  'bip_no_clip': {'clip': False},
  'bip_kth': {'cutoff': 'kth'},
  'bip_midpoint_cut': {'cutoff': 'midpoint'},
  'bip_cold': {'warm': False},
}
_OF_QUANTILE = {
  'quantile_ema': {'ema': 0.9},
  'quantile_histogram': {'estimator': 'histogram'},
  'quantile_shard_mean': {'estimator': 'shard_mean'},
  'quantile_microbatch_mean': {'estimator': 'microbatch_mean'},
  'quantile_histogram_accumulated': {'estimator': 'histogram'},
}
# What an estimator needs to differ from the exact one.
_PARTS = {
  'quantile_shard_mean': {'model.shards': 4},
  'quantile_microbatch_mean': {'accumulation': 4},
  'quantile_histogram_accumulated': {'accumulation': 4},
}


def _arms(method, variants):
  return [
    Arm(
      name,
      method,
      tuning.TUNED
      | {f'balancer.{key}': value for key, value in options.items()}
      | _PARTS.get(name, {}),
    )
    for name, options in variants.items()
  ]


MAIN = balance.MAIN

TABLES = [
  Table(
    'From bip',
    [MAIN['bip'], *_arms('bip', _OF_BIP), MAIN['midpoint']],
    MAIN['bip'],
  ),
  Table(
    'From midpoint',
    [MAIN['midpoint'], *_arms('midpoint', {'midpoint_t1': {'iterations': 1}})],
    MAIN['midpoint'],
  ),
  Table(
    'From quantile',
    [MAIN['quantile'], *_arms('quantile', _OF_QUANTILE)],
    MAIN['quantile'],
  ),
]


def _conclusion(results: pathlib.Path) -> str:
  evenest, *_ = TABLES[0].evenest(results)
  return '\n'.join(
    [
      f'Of `bip` and what differs from it, `{evenest.name}` is the evenest; '
      'one seed tells no difference of loss.\n',
      *(f'- {each.told(results)}' for each in TABLES),
    ]
  )


def _figure(results: pathlib.Path) -> Figure:
  by_arm = pd.concat([each.frame(results) for each in TABLES]).groupby('arm')
  columns = {
    key: COLUMNS[key][0]
    for key in ('average_max_violation', 'last_max_violation')
  }
  mean = by_arm[[*columns]].mean().rename(columns=columns)
  by_rank = mean.sort_values('AvgMaxVio')
  return figures.rows(by_rank, figures.VIOLATION)


QUESTION = Question(
  'What is each difference between the rules worth?',
  'From `bip` (T = 4) and from `quantile`, one switch at a time, one seed: '
  'number of iterations, clip, cutoff, start of a solve from 0; averaging, and '
  'what peers compute in place of the quantile over all tokens. `midpoint` is '
  '`bip` with two switches: no clip, and the cut in the middle. Means over '
  'shards need four shards, means over microbatches four microbatches, which '
  'the histogram beside it has as well. Lag is question 3. Centring prices '
  'changes no choice, so it is not trained with and without.',
  TABLES,
  conclusion=_conclusion,
  figures={'differences': _figure},
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
