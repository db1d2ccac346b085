"""What tables say of a run: each value with its heading, format and meaning.

A class below is a table, a function in it a column, in that order.

Definitions are those of arXiv 2408.15664 and 2502.15451: MaxVio of a layer in a
step is the load of its fullest expert over the mean load, minus 1. A model's
MaxVio is the mean over its layers within a step.
"""

from collections.abc import Callable, Iterable
import functools
import math
from typing import Any, NamedTuple

import pandas as pd

from moe_jax.analysis.results import Results

VALIDATION = 'validation'  # the set that the unigram facts are about
COMPILING_STEPS = 2  # whose times say nothing of the others


class Column(NamedTuple):
  """A value of a run.

  Attributes:
    key: its name in data.
    heading: its name in tables.
    form: format of the number; '' where it is text.
    meaning: what a reader is told of it.
    measure: finds it; None, NaN or infinite where it is not known.
  """

  key: str
  heading: str
  form: str
  meaning: str
  measure: Callable[[Results], Any]


class Section(NamedTuple):
  """Columns that make one table.

  Attributes:
    title: its heading.
    columns: from left to right.
    text: what a reader is told of all of it.
    seeds: with so many seeds a lowest mean may count as the best; 0 for never.
  """

  title: str
  columns: tuple[Column, ...]
  text: str = ''
  seeds: int = 0


def _text(documented: Any) -> str:
  return ' '.join((documented.__doc__ or '').split())


def column(heading: str, form: str = '') -> Callable[..., Column]:
  """Makes a column of a function, whose docstring is the meaning."""

  def make(measure: Callable[[Results], Any]) -> Column:
    return Column(measure.__name__, heading, form, _text(measure), measure)

  return make


def _steady(run: Results, metric: str, quantile: float = 0.5) -> float:
  return run.metrics[metric].iloc[COMPILING_STEPS:].quantile(quantile)


def _mean(run: Results, metric: str) -> float:
  return run.metrics[metric].mean(skipna=False)


def _skipped(run: Results) -> pd.Series:
  """Tells which steps were not finite, so that the trainer skipped them."""
  names = ['train/loss', 'train/aux_loss', 'train/gradient_norm']
  return ~run.metrics.filter(names).abs().lt(math.inf).all(axis='columns')


class Runs:
  """What the runs are."""

  @column('method')
  def method(run):
    return run.method

  @column('balancer')
  def balancer(run):
    options = dict(run.config['balancer'])
    name = options.pop('name')
    return f'{name}({", ".join(f"{k}={v}" for k, v in options.items())})'

  @column('seed', '.0f')
  def seed(run):
    return run.config['seed']

  @column('steps', ',.0f')
  def steps(run):
    """Steps that are completed."""
    return run.metrics.index[-1]

  @column('finished')
  def finished(run):
    return run.finished

  @column('tokens', ',.0f')
  def tokens(run):
    """Positions trained on, padding included."""
    return run.tokens.iloc[-1]

  @column('skipped', ',.0f')
  def skipped_steps(run):
    """Steps that were not finite and changed nothing."""
    return _skipped(run).sum()

  @column('diverged at', ',.0f')
  def diverged_at(run):
    """The first of the skipped steps that the run ended on."""
    ended_on = _skipped(run)[::-1].cummin()
    return min(ended_on.index[ended_on], default=None)


class Balance:
  """MaxVio of a layer in a step is the load of its fullest expert over the mean
  load, minus 1: no unit, 0 is perfect balance, 1 is twice the mean."""

  seeds = 1

  @column('AvgMaxVio', '.3f')
  def average_max_violation(run):
    """MaxVio, mean over the layers, then over the run's steps."""
    return run.max_violation.mean(skipna=False)

  @column('SupMaxVio', '.3f')
  def sup_max_violation(run):
    """MaxVio, mean over the layers, at the worst step, the first included."""
    return run.max_violation.max(skipna=False)

  @column('first step', '.3f')
  def first_max_violation(run):
    """MaxVio, mean over the layers, at step 1."""
    return run.max_violation.get(1)

  @column('last fifth', '.3f')
  def last_max_violation(run):
    """MaxVio, mean over the layers, then over the last fifth of the steps."""
    violation = run.max_violation
    return violation.tail(max(1, len(violation) // 5)).mean(skipna=False)

  @column('AvgMaxVio, worst layer', '.3f')
  def worst_average_max_violation(run):
    """AvgMaxVio of the layer where it is largest."""
    return run.layer_max_violation.mean(skipna=False).max(skipna=False)

  @column('which')
  def worst_average_layer(run):
    average = run.layer_max_violation.mean(skipna=False)
    return average.fillna(math.inf).idxmax()

  @column('SupMaxVio, worst layer', '.3f')
  def worst_sup_max_violation(run):
    """SupMaxVio of the layer where it is largest."""
    return run.layer_max_violation.max(skipna=False).max(skipna=False)

  @column('which')
  def worst_sup_layer(run):
    sup = run.layer_max_violation.max(skipna=False)
    return sup.fillna(math.inf).idxmax()


class Spread:
  """How routes spread over sequences, experts and devices: means over all
  steps, the first included."""

  @column('sequence MaxVio', '.3f')
  def sequence_violation(run):
    """MaxVio within a sequence, mean over sequences and layers. The fewer
    tokens a sequence has, the higher it is by chance."""
    return _mean(run, 'router/sequence_violation')

  @column('worst sequence', '.3f')
  def worst_sequence_violation(run):
    """The same of the step's worst sequence and layer."""
    return _mean(run, 'router/worst_sequence_violation')

  @column('dead experts', '.2%')
  def dead_experts(run):
    """Share of experts with less than a tenth of the mean load."""
    return _mean(run, 'router/dead_experts')

  @column('used experts', '.1%')
  def used_experts(run):
    """Exp of the entropy of the load, over the number of experts: 100 % where
    all loads are equal, 50 % where half of the experts share all evenly."""
    return _mean(run, 'router/used_experts')

  @column('device load', '.3f')
  def device_load(run):
    """Load of the fullest device over the mean of the devices, in the layer
    where it is largest; 1 is even, and all that one device can have."""
    return _mean(run, 'router/device_load')


class Training:
  """What was learnt."""

  seeds = 2

  @column('train loss [nats/token]', '.3f')
  def train_loss(run):
    """Cross-entropy, mean over the last 10 steps that were not skipped; unknown
    where the run ended on skipped ones."""
    skipped = _skipped(run)
    good = run.metrics['train/loss'][~skipped]
    return None if skipped.iloc[-1] else good.tail(10).mean()

  @column('gap to unigram [bits/byte]', '+.3f')
  def gap_to_unigram(run):
    """Validation bits per byte (q frozen) minus the unigram entropy of the
    validation set; below 0 the model has learnt more than how frequent tokens
    are."""
    bits = _last_evaluation(run, VALIDATION, f'eval/{VALIDATION}/bits_per_byte')
    unigram = run.facts.get('unigram_bits_per_byte')
    return None if bits is None or unigram is None else bits - unigram

  @column('tokens to unigram', ',.0f')
  def tokens_to_unigram(run):
    """Tokens trained on when an evaluation first found the validation
    perplexity (q frozen) below the unigram model's; no finer than the
    evaluations are apart."""
    unigram = run.facts.get('unigram_perplexity')
    perplexity = run.metrics.get(f'eval/{VALIDATION}/perplexity')
    if unigram is None or perplexity is None:
      return None
    below = perplexity.index[perplexity < unigram]
    return run.tokens[below[0]] if len(below) else None


class Cost:
  """What it took."""

  @column('step [s]', '.3f')
  def step_seconds(run):
    """Median time of a step, without the first 2 steps, which compile."""
    return _steady(run, 'time/step_seconds')

  @column('25 % [s]', '.3f')
  def step_seconds_25(run):
    """Lower quartile of the same."""
    return _steady(run, 'time/step_seconds', 0.25)

  @column('75 % [s]', '.3f')
  def step_seconds_75(run):
    """Upper quartile of the same."""
    return _steady(run, 'time/step_seconds', 0.75)

  @column('tokens/s', ',.0f')
  def tokens_per_second(run):
    """Median over the same steps."""
    return _steady(run, 'time/tokens_per_second')

  @column('dropped', '.2%')
  def dropped(run):
    """Share of token-expert pairs that found no room, mean over all steps."""
    return _mean(run, 'router/dropped')


_EVALUATED = {
  'perplexity': (
    'perplexity',
    '.2f',
    'Exp of the mean cross-entropy per token, at the last evaluation, with the '
    'q that training left: what a deployed model has.',
  ),
  'bits_per_byte': (
    'bits/byte',
    '.3f',
    'The same cross-entropy over the bytes of the text, so that tokenizers '
    'compare.',
  ),
  'perplexity_solved': ('perplexity, q solved', '.2f', ''),
  'bits_per_byte_solved': ('bits/byte, q solved', '.3f', ''),
}
_SOLVED = (
  'q solved: q found anew in each evaluation batch, which sees tokens that '
  'come later; a deployed model cannot.'
)


def sections(sets: Iterable[str], texts: Iterable[str]) -> list[Section]:
  """Returns all sections.

  Args:
    sets: what runs were evaluated on.
    texts: what runs on several texts were trained on.
  """
  first = map(_section, (Runs, Balance, Spread, Training))
  more = [*map(_trained_on, texts), *map(_evaluation, sets)]
  return [*first, *more, _section(Cost)]


def _section(table: type) -> Section:
  """Makes a section of a class: its name, docstring, columns and `seeds`."""
  columns = [x for x in vars(table).values() if isinstance(x, Column)]
  text, seeds = _text(table), getattr(table, 'seeds', 0)
  return Section(table.__name__, tuple(columns), text, seeds)


def _trained_on(name: str) -> Section:
  loss, share, epochs = (
    f'{key}/{name}' for key in ('train/loss', 'data/share', 'data/epochs')
  )
  columns = (
    Column(
      loss,
      'train loss [nats/token]',
      '.3f',
      'Cross-entropy on its tokens, mean over the last 10 steps that had some.',
      lambda run: run.metrics[loss].dropna().tail(10).mean(),
    ),
    Column(
      share,
      'share',
      '.1%',
      "Its share of the steps' tokens, mean over all steps.",
      lambda run: _mean(run, share),
    ),
    Column(
      epochs,
      'epochs',
      '.2f',
      'How often all of it was read.',
      lambda run: run.metrics[epochs].iloc[-1],
    ),
  )
  return Section(f'Trained on {name}', columns, seeds=2)


def _evaluation(name: str) -> Section:
  columns = []
  for key, said in _EVALUATED.items():
    key = f'eval/{name}/{key}'
    measure = functools.partial(_last_evaluation, name=name, key=key)
    columns.append(Column(key, *said, measure))
  step = functools.partial(_last_evaluated_step, name=name)
  columns.append(Column(f'eval/{name}/step', 'at step', ',.0f', '', step))
  return Section(f'On {name}', tuple(columns), _SOLVED, seeds=2)


def _last_evaluated_step(run: Results, name: str) -> int | None:
  """The last step where the perplexity was finite."""
  perplexity = run.metrics.get(f'eval/{name}/perplexity', pd.Series())
  return perplexity.last_valid_index()


def _last_evaluation(run: Results, name: str, key: str) -> float | None:
  values = run.metrics.get(key, pd.Series())
  return values.get(_last_evaluated_step(run, name))
