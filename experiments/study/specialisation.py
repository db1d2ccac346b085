"""Question 6: does balance cost specialisation?

python -m experiments.study.specialisation --workdir=DIR
"""

import pathlib
import sys

from matplotlib.figure import Figure
import pandas as pd

from experiments.study import audits, figures, tuning
from experiments.study.question import Audit, Question, Table
from experiments.study.runs import Arm

ARMS = [
  Arm(name, method, tuning.TUNED | options, experiment='domains_16e')
  for name, method, options in (
    ('unbalanced', 'unbalanced', {}),
    ('loss_controlled_sequence', 'loss_controlled', {}),
    ('loss_controlled_batch', 'loss_controlled', {'balancer.over': 'batch'}),
    (
      'loss_controlled_sequence_0.01',
      'loss_controlled',
      {'balancer.alpha': 0.01},
    ),
    (
      'loss_controlled_batch_0.01',
      'loss_controlled',
      {'balancer.alpha': 0.01, 'balancer.over': 'batch'},
    ),
    ('bip', 'bip', {}),
    ('bip_shard', 'bip', {'balancer.scope': 'shard', 'model.shards': 4}),
    ('midpoint', 'midpoint', {}),
  )
]

METHODS = Table('Methods', ARMS, ARMS[0])


def _found(results: pathlib.Path) -> dict[str, dict[str, float]]:
  return {
    x.name: audits.stored(audits.specialisation, x, results)['validation']
    for x in ARMS
  }


def _conclusion(results: pathlib.Path) -> str:
  found = _found(results)
  domain = {name: row[audits.DOMAIN] for name, row in found.items()}
  shares = ', '.join(
    f'`{name}` {x / domain["unbalanced"]:.2f}' for name, x in domain.items()
  )
  purity = ', '.join(f'`{x}` {row["purity"]:.3f}' for x, row in found.items())
  return (
    'What experts tell of the domain, over what those of `unbalanced` do: '
    f'{shares}. Purity: {purity}. Loss: {METHODS.differences(results)}. One '
    'checkpoint each, no intervals.'
  )


def _figure(results: pathlib.Path) -> Figure:
  found = pd.DataFrame(_found(results)).T[
    [audits.DOMAIN, 'token information [nats]']
  ]
  return figures.rows(found, 'mutual information with the expert')


QUESTION = Question(
  'Does balance cost specialisation?',
  '`domains_16e`: speeches, drama and code, a third of the rows each. *Purity* '
  "is the share of an expert's tokens that are of its most frequent domain, a "
  'third by chance; information is mutual, between expert and domain or token, '
  'and can be the more the evener the loads. Prices of `bip_shard` are of a '
  'quarter of the batch each. One seed.',
  [METHODS],
  audits=[Audit('What an expert tells', audits.specialisation, ARMS)],
  conclusion=_conclusion,
  figures={'specialisation': _figure},
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
