"""Runs in numbers: one run's summary, and several methods side by side.

Definitions are those of arXiv 2408.15664 and 2502.15451: MaxVio of a layer in a
step is the load of its fullest expert over the mean load, minus 1. A model's
figure is the mean over its layers within a step.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import math
import os
import statistics
from typing import Any

import pandas as pd

from moe_jax.analysis.run import Run
from moe_jax.config import MAY_CHANGE
from moe_jax.config import flatten
from moe_jax.config import is_among

VALIDATION = 'validation'  # the set that the unigram facts are about
COMPILING_STEPS = 2  # left out of times: these compile
LOSS_STEPS = 10  # the final training loss is the mean over so many steps
_NOT_MEASURED = ('seed', 'finished', 'first_non_finite_step')  # no mean
_EVALUATIONS = (
  'perplexity',
  'bits_per_byte',
  'perplexity_solved',
  'bits_per_byte_solved',
)


def summarize(run: Run) -> dict[str, Any]:
  """Sums a run up in one flat dict that JSON can hold.

  Returns:
    What the run is: `method`, `balancer` (its function with the arguments),
    `seed`, `steps` completed, `finished`, `tokens` trained on, and
    `first_non_finite_step` of the training loss.

    Its balance: `average_max_violation` (AvgMaxVio, mean over steps),
    `sup_max_violation` (SupMaxVio, the first step included),
    `first_max_violation`, `last_max_violation` (mean over the last fifth of the
    steps); the first two for each layer, as
    `average_max_violation/layer_00` and so on, and for the worst layer with its
    name in `worst_average_layer` and `worst_sup_layer`.

    Its quality: `train_loss` in nats (mean over the last 10 steps); for each
    set, `eval/<set>/perplexity` and so on at the last finite evaluation, that
    of `eval/<set>/step`; `gap_to_unigram` (validation bits per byte, q frozen,
    minus those of the unigram model; below 0 is better than that model);
    `tokens_to_unigram` (tokens until an evaluation first found the perplexity,
    q frozen, below the unigram model's).

    Its cost: `step_seconds` (median, with quartiles `step_seconds_25` and
    `step_seconds_75`) and `tokens_per_second` (median), without the first two
    steps, which compile; `dropped` (share of token-expert pairs, mean over
    steps).

    None is a value that is unknown or not finite.

  Raises:
    ValueError: no step is completed.
  """
  metrics = run.metrics
  if metrics.empty:
    raise ValueError(f'{run}: no step is completed yet')
  steps = int(metrics.index[-1])
  diverged = metrics.index[~metrics['train/loss'].abs().lt(math.inf)]
  steady = metrics.iloc[COMPILING_STEPS:]
  seconds = steady['time/step_seconds'].quantile([0.25, 0.5, 0.75])
  summary = {
    'method': run.method,
    'balancer': _balancer_label(run.config['balancer']),
    'seed': run.config['seed'],
    'steps': steps,
    'finished': run.finished,
    'tokens': steps * run.tokens_per_step,
    'first_non_finite_step': int(diverged[0]) if len(diverged) else None,
    **_balance(run),
    'train_loss': metrics['train/loss'].tail(LOSS_STEPS).mean(skipna=False),
    **_quality(run),
    'step_seconds': seconds[0.5],
    'step_seconds_25': seconds[0.25],
    'step_seconds_75': seconds[0.75],
    'tokens_per_second': steady['time/tokens_per_second'].median(),
    'dropped': metrics['router/dropped'].mean(skipna=False),
  }
  return {key: _plain(value) for key, value in summary.items()}


def comparison(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
  """Sets methods side by side, each with one run a seed.

  Args:
    runs: the runs of each method, by the method's name.

  Returns:
    A dict that JSON can hold: `methods` (by name: `runs`, a summary for each
    seed; `mean` over them; `standard_deviation`, that of a sample, None for one
    seed), `config` (the fields all runs share, as `group.field`), `facts` (the
    same of `run.json`), `differing_facts` (names of facts that differ between
    runs of one seed) and `not_evaluated` (reasons, by set).

  Raises:
    ValueError: runs differ in other fields than `method`, `balancer` and
      `seed`, runs of one method in other fields than `seed`, two of them share
      a seed, the texts differ, or a method has no runs.
  """
  _check_comparable(runs)
  everything = [run for of_method in runs.values() for run in of_method]
  configs = [flatten(run.config) for run in everything]
  facts = [flatten(run.facts) for run in everything]
  for fact in facts:
    fact.pop('run', None)  # Its name, which says nothing.
  seeds = [config['seed'] for config in configs]
  shared_facts = _shared(facts)
  # A fact may follow from the seed, as the hash of the first parameters does.
  of_seed = [
    _shared([f for f, s in zip(facts, seeds, strict=True) if s == seed])
    for seed in set(seeds)
  ]
  names = {name for fact in facts for name in fact}
  return {
    'methods': {m: _over_seeds(of_method) for m, of_method in runs.items()},
    'config': _shared(configs),
    'facts': {
      name: fact
      for name, fact in shared_facts.items()
      if not name.startswith('not_evaluated.')
    },
    'differing_facts': sorted(
      n for n in names if not all(n in shared for shared in of_seed)
    ),
    'not_evaluated': {
      name: reason
      for run in everything
      for name, reason in run.facts.get('not_evaluated', {}).items()
    },
  }


def difference(a: Run, b: Run) -> pd.DataFrame:
  """Sets two runs side by side, whatever they are.

  Returns:
    A row for each option in which they differ, then one for each number of
    their summaries; columns: the two runs, by the names of their work
    directories, and `difference`, b minus a, NaN where there is none.

  Raises:
    ValueError: one of them has completed no step, or they are the same.
  """
  names = [run.workdir.name for run in (a, b)]
  if names[0] == names[1]:
    names = [os.fspath(run.workdir) for run in (a, b)]
  if names[0] == names[1]:
    raise ValueError(f'{a}: compare it with another run')
  configs = [flatten(run.config) for run in (a, b)]
  options = {
    f'config.{option}': (before, after)
    for option in sorted(configs[0] | configs[1])
    if (before := configs[0].get(option)) != (after := configs[1].get(option))
  }
  summaries = [summarize(run) for run in (a, b)]
  results = {
    name: [summary.get(name) for summary in summaries]
    for name in dict.fromkeys(name for s in summaries for name in s)
    if name not in ('method', 'balancer', 'seed')
  }
  rows = [
    (*pair, _minus(*pair)) for pair in (*options.values(), *results.values())
  ]
  return pd.DataFrame(
    rows, columns=[*names, 'difference'], index=[*options, *results]
  )


def _minus(a: Any, b: Any) -> float:
  numbers = all(type(x) in (int, float) for x in (a, b))
  return b - a if numbers else math.nan


def _balance(run: Run) -> dict[str, Any]:
  model = run.metrics['router/max_violation']
  layers = run.layer_max_violation
  average, sup = layers.mean(skipna=False), layers.max(skipna=False)
  return {
    'average_max_violation': model.mean(skipna=False),
    'sup_max_violation': model.max(skipna=False),
    'first_max_violation': model.get(1),
    'last_max_violation': _last(model).mean(skipna=False),
    'worst_average_layer': average.fillna(math.inf).idxmax(),
    'worst_average_max_violation': average.max(skipna=False),
    'worst_sup_layer': sup.fillna(math.inf).idxmax(),
    'worst_sup_max_violation': sup.max(skipna=False),
    **average.add_prefix('average_max_violation/'),
    **sup.add_prefix('sup_max_violation/'),
  }


def _last(metric: pd.Series) -> pd.Series:
  """Returns the last fifth of the steps, at least one."""
  return metric.tail(max(1, len(metric) // 5))


def _quality(run: Run) -> dict[str, Any]:
  quality = {}
  for name in run.evaluation_sets:
    evaluated = run.metrics.dropna(subset=f'eval/{name}/perplexity')
    last = evaluated.iloc[-1] if len(evaluated) else {}
    quality[f'eval/{name}/step'] = int(last.name) if len(evaluated) else None
    for key in _EVALUATIONS:
      quality[f'eval/{name}/{key}'] = last.get(f'eval/{name}/{key}')
  bits = quality.get(f'eval/{VALIDATION}/bits_per_byte')
  unigram_bits = run.facts.get('unigram_bits_per_byte')
  known = bits is not None and unigram_bits is not None
  quality['gap_to_unigram'] = bits - unigram_bits if known else None
  quality['tokens_to_unigram'] = _tokens_to_unigram(run)
  return quality


def _tokens_to_unigram(run: Run) -> int | None:
  unigram = run.facts.get('unigram_perplexity')
  perplexity = run.metrics.get(f'eval/{VALIDATION}/perplexity')
  if unigram is None or perplexity is None:
    return None
  below = perplexity.index[perplexity < unigram]
  return int(below[0]) * run.tokens_per_step if len(below) else None


def _check_comparable(runs: Mapping[str, Sequence[Run]]) -> None:
  for method, of_method in runs.items():
    if not of_method:
      raise ValueError(f'{method}: no runs to compare')
    seeds = [run.config['seed'] for run in of_method]
    if len(set(seeds)) < len(seeds):
      raise ValueError(f'{method}: two runs share a seed; seeds are {seeds}')
    for run in of_method[1:]:
      _check_same(of_method[0], run, but=('seed', *MAY_CHANGE))
  firsts = [of_method[0] for of_method in runs.values()]
  for run in firsts[1:]:
    _check_same(firsts[0], run, but=('method', 'balancer', 'seed', *MAY_CHANGE))
  # The text's hash is not in the config, yet perplexities hang on it.
  texts = {
    str(run): run.facts.get('text_fingerprint')
    for of_method in runs.values()
    for run in of_method
  }
  if len(set(texts.values())) > 1:
    raise ValueError(f'text_fingerprint differs between runs: {texts}')


def _check_same(a: Run, b: Run, *, but: Sequence[str]) -> None:
  left, right = flatten(a.config), flatten(b.config)
  differing = [
    f'{field}: {left.get(field)!r} and {right.get(field)!r}'
    for field in sorted(left | right)
    if not is_among(field, but) and left.get(field) != right.get(field)
  ]
  if differing:
    raise ValueError(
      f'{a} and {b} may differ in {", ".join(but)} only, but differ in '
      + '; '.join(differing)
    )


def _over_seeds(runs: Sequence[Run]) -> dict[str, Any]:
  summaries = [summarize(run) for run in runs]
  mean, deviation = {}, {}
  for key in dict.fromkeys(key for s in summaries for key in s):
    values = [s.get(key) for s in summaries]
    if key in _NOT_MEASURED or any(isinstance(v, str) for v in values):
      continue
    known = None not in values
    mean[key] = statistics.fmean(values) if known else None
    if len(values) > 1:
      deviation[key] = statistics.stdev(values) if known else None
  return {
    'runs': summaries,
    'mean': mean,
    'standard_deviation': deviation or None,
  }


def _balancer_label(balancer: Mapping[str, Any]) -> str:
  arguments = ', '.join(
    f'{name}={value}' for name, value in balancer.items() if name != 'name'
  )
  return f'{balancer["name"]}({arguments})'


def _plain(value: Any) -> Any:
  """Makes NumPy scalars Python's, and what is not finite None."""
  value = value.item() if hasattr(value, 'item') else value
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _shared(flats: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The items that all of the dicts have."""
  first, *others = flats
  return {
    key: value
    for key, value in first.items()
    if all(key in other and other[key] == value for other in others)
  }
