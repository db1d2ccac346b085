"""How the values of a summary are headed, written and explained in tables."""

from typing import NamedTuple

from moe_jax.analysis.tables import COMPILING_STEPS
from moe_jax.analysis.tables import LOSS_STEPS


class Column(NamedTuple):
  """How one of a summary's values is shown."""

  key: str
  heading: str
  form: str  # of str.format; '' is text
  meaning: str


BALANCE = (
  Column(
    'average_max_violation',
    'AvgMaxVio',
    '.3f',
    "MaxVio, mean over the layers, then over the run's steps.",
  ),
  Column(
    'sup_max_violation',
    'SupMaxVio',
    '.3f',
    'MaxVio, mean over the layers, at the worst step, the first included.',
  ),
  Column(
    'first_max_violation',
    'first step',
    '.3f',
    'MaxVio, mean over the layers, at step 1.',
  ),
  Column(
    'last_max_violation',
    'last fifth',
    '.3f',
    'MaxVio, mean over the layers, then over the last fifth of the steps.',
  ),
  Column(
    'worst_average_max_violation',
    'AvgMaxVio, worst layer',
    '.3f',
    'AvgMaxVio of the layer where it is largest.',
  ),
  Column('worst_average_layer', 'which', '', ''),
  Column(
    'worst_sup_max_violation',
    'SupMaxVio, worst layer',
    '.3f',
    'SupMaxVio of the layer where it is largest.',
  ),
  Column('worst_sup_layer', 'which', '', ''),
)

TRAINING = (
  Column(
    'train_loss',
    'train loss [nats/token]',
    '.3f',
    f'cross-entropy, mean over the last {LOSS_STEPS} steps.',
  ),
  Column(
    'gap_to_unigram',
    'gap to unigram [bits/byte]',
    '+.3f',
    "validation bits per byte (q frozen) minus the validation set's unigram "
    'entropy; below 0 the model has learnt more than how frequent tokens are.',
  ),
  Column(
    'tokens_to_unigram',
    'tokens to unigram',
    ',.0f',
    'tokens trained on when an evaluation first found the validation '
    "perplexity (q frozen) below the unigram model's; no finer than the "
    'evaluations are apart.',
  ),
)

COST = (
  Column(
    'step_seconds',
    'step [s]',
    '.3f',
    f'median time of a step, without the first {COMPILING_STEPS} steps, '
    'which compile.',
  ),
  Column('step_seconds_25', '25 % [s]', '.3f', 'lower quartile of the same.'),
  Column('step_seconds_75', '75 % [s]', '.3f', 'upper quartile of the same.'),
  Column(
    'tokens_per_second',
    'tokens/s',
    ',.0f',
    'median over the same steps.',
  ),
  Column(
    'dropped',
    'dropped',
    '.2%',
    'share of token-expert pairs that found no room, mean over all steps.',
  ),
)


def evaluation_columns(name: str) -> list[Column]:
  """Returns the columns of what was evaluated on a set."""
  return [
    Column(f'eval/{name}/{key}', heading, form, '')
    for key, heading, form in (
      ('perplexity', 'perplexity', '.2f'),
      ('bits_per_byte', 'bits/byte', '.3f'),
      ('perplexity_solved', 'perplexity, q solved', '.2f'),
      ('bits_per_byte_solved', 'bits/byte, q solved', '.3f'),
    )
  ]
