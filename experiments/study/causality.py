"""Question 3: does a q that sees its own batch help or hurt what is deployed?

python -m experiments.study.causality --workdir=DIR
"""

import pathlib
import sys

from matplotlib.figure import Figure

from experiments.study import audits, balance, figures, runs, tuning
from experiments.study.question import Audit, Question, Table
from experiments.study.runs import Arm
from experiments.study.statistics import paired
from moe_jax.analysis import drawing

STEP = 4096  # Tokens of a step of mini_16e.
SEQUENCES = 32
RULES = 'bip', 'midpoint'


def _arms(factor):
  """Returns solved and lagged prices at so many times the batch.

  The learning rate follows the square root of the batch, warm-up the tokens.
  """
  options = tuning.TUNED | {
    'batch_size': int(SEQUENCES * factor),
    'steps': int(250 / factor),
    'warmup_steps': int(20 / factor),
    'learning_rate': tuning.LEARNING_RATE * factor**0.5,
  }
  return {
    method: Arm(f'{method}_{int(STEP * factor)}', method, options)
    for method in ('unbalanced', 'bip', 'bip_lag', 'midpoint', 'midpoint_lag')
  }


SEEDS = (2, 3, 4)  # The last is the one of the others that is audited.
LAGGED = {
  name: Arm(name, name, tuning.TUNED, SEEDS)
  for name in ('bip_lag', 'midpoint_lag')
}
BATCHES = {
  STEP // 4: _arms(1 / 4),
  STEP: balance.MAIN | LAGGED,
  STEP * 4: _arms(4),
}


def _table(rule, tokens):
  names = rule, f'{rule}_lag', 'unbalanced'
  arms = [BATCHES[tokens][name] for name in names]
  return Table(f'{rule}, {tokens:,} tokens a step', arms, arms[0])


TABLES = {
  (rule, tokens): _table(rule, tokens) for tokens in BATCHES for rule in RULES
}


def _conclusion(results: pathlib.Path) -> str:
  found = runs.frame([*balance.MAIN.values(), *LAGGED.values()], results)
  lag = '; '.join(
    f'`{x}_lag` - `{x}`: {paired(found[runs.LOSS], f"{x}_lag", x).told}'
    for x in RULES
  )
  return '\n'.join(
    [
      f'What a q that does not see its batch costs: {lag}; nats, at '
      f'{STEP:,} tokens a step, {len(SEEDS)} seeds. Such a q is also late, so '
      'that the first steps are uneven; `unbalanced` says what uneven loads '
      'alone may cost.\n',
      *(f'- {each.told(results)}' for each in TABLES.values()),
    ]
  )


def _figure(results: pathlib.Path) -> Figure:
  lines = {}
  for rule in RULES:
    lagged = drawing.method_style(rule) | {'linestyle': '-'}
    looks = lagged, lagged | {'linestyle': ':', 'fillstyle': 'none'}
    for place, look in enumerate(looks, 1):
      differences = {}
      for tokens in BATCHES:
        each = TABLES[rule, tokens]
        loss = each.frame(results)[runs.LOSS]
        names = each.arms[place].name, each.baseline.name
        differences[tokens] = paired(loss, *names)
      label = f'{TABLES[rule, STEP].arms[place].name} - {rule}'
      lines[label] = look, differences
  return figures.by_size(
    lines, 'tokens of a step', 'difference of loss, q frozen [nats]'
  )


QUESTION = Question(
  'Does training on a q that sees its batch hurt what is deployed?',
  'Prices of the batch before (`lag`) cannot see what follows a token; those '
  'solved on the same batch can, the less the more tokens it has. A million '
  'tokens in batches of 1,024, 4,096 and 16,384; the learning rate follows the '
  'square root of the batch, from 0.004 at 4,096. In batches of 65,536 a '
  'million tokens are 15 steps, too few.',
  list(TABLES.values()),
  audits=[
    Audit(
      'Routes that change with the tokens that follow',
      audits.causality,
      [*balance.MAIN.values(), *LAGGED.values()],
    )
  ],
  conclusion=_conclusion,
  figures={'causality': _figure},
)


if __name__ == '__main__':
  sys.exit(QUESTION.main())
