"""Runs in numbers: one data frame, a row a run, a column a value.

Columns are those of `summarize`, then every option as `config.<option>` and
every fact as `facts.<fact>`.
"""

from collections.abc import Iterable, Mapping, Sequence
import json
import math
import numbers
from typing import Any

import pandas as pd

from moe_jax.analysis import columns
from moe_jax.analysis.results import Results, name_runs
from moe_jax.config import differences, flatten
from moe_jax.runs import records

UNKNOWN = '–'
_NAMES = ('method', 'balancer', 'seed')  # of a run; no results


def summarize(run: Results) -> dict[str, Any]:
  """Sums a run up in one flat dict that JSON can hold.

  Returns:
    Every value of `columns.sections`, by its key: `method`, `seed`, `steps`,
    `average_max_violation`, `train_loss`, `eval/<set>/perplexity` and so on; of
    a mixture, `train/loss/<text>`; of each layer,
    `average_max_violation/layer_00` and `sup_max_violation/...`. None is a
    value that is unknown or not finite.

  Raises:
    ValueError: no step is completed, or it is no run of this version.
  """
  if run.metrics.empty:
    raise ValueError(f'{run}: no step is completed yet')
  if 'train/loss' not in run.metrics:
    raise ValueError(f'{run}: no run of this version, it has no train/loss')
  summary = {
    column.key: _measured(column, run)
    for section in columns.sections(run.evaluation_sets, run.texts)
    for column in section.columns
  }
  layers = run.layer_max_violation
  average, sup = 'average_max_violation/', 'sup_max_violation/'
  summary |= layers.mean(skipna=False).add_prefix(average)
  summary |= layers.max(skipna=False).add_prefix(sup)
  # As Python's numbers, of which JSON knows the finite ones.
  return records.finite(pd.Series(summary, dtype=object).to_dict())


def _measured(column: columns.Column, run: Results) -> Any:
  try:
    return column.measure(run)
  except KeyError:  # A metric that came later than the run.
    return None


def tabulate(runs: Mapping[str, Results]) -> pd.DataFrame:
  """Returns the table of any runs, by their names.

  Raises:
    ValueError: a run has completed no step, or is none of this version.
  """
  summaries = pd.DataFrame(map(summarize, runs.values()), index=runs)
  found = [
    flatten({'config': run.config, 'facts': run.facts}) for run in runs.values()
  ]
  # As objects: a number that some runs do not have would become a float.
  found = pd.DataFrame(found, index=runs, dtype=object)
  found = found.drop(columns='facts.run', errors='ignore')
  return summaries.fillna(math.nan).infer_objects().join(found)


def by_method(runs: Iterable[Results]) -> dict[str, list[Results]]:
  """Sorts runs by their methods, in the order first met."""
  methods = {}
  for run in runs:
    methods.setdefault(run.method, []).append(run)
  return methods


def comparison(runs: Mapping[str, Sequence[Results]]) -> pd.DataFrame:
  """Sets methods side by side, each with one run a seed.

  Args:
    runs: the runs of each method, by the method's name.

  Returns:
    The table of all runs; its index is (`method`, `seed`), its columns are the
    other values of `summarize`, then `config.<option>` and `facts.<fact>`.
    `groupby('method')` gives means and deviations.

  Raises:
    ValueError: runs differ in other fields than the balancer and the seed, runs
      of one method in other fields than the seed, two of them share a seed, the
      texts differ, or a method has no runs.
  """
  for method, of_method in runs.items():
    if not of_method:
      raise ValueError(f'{method}: no runs to compare')
    _refuse_differences(of_method, but=['seed'])
    seeds = [run.config['seed'] for run in of_method]
    if len(set(seeds)) < len(seeds):
      raise ValueError(f'{method}: two runs share a seed; seeds are {seeds}')
  firsts = [of_method[0] for of_method in runs.values()]
  _refuse_differences(firsts, but=['balancer', 'seed'])
  named = {(m, run.config['seed']): run for m in runs for run in runs[m]}
  # The text's hash is not in the config, yet perplexities hang on it.
  texts = {name: x.facts.get('text_fingerprint') for name, x in named.items()}
  if len(set(texts.values())) > 1:
    raise ValueError(f'text_fingerprint differs: {texts}')
  table = tabulate(named).drop(columns=['method', 'seed'])
  return table.rename_axis(['method', 'seed'])


def difference(a: Results, b: Results) -> pd.DataFrame:
  """Sets two runs side by side, whatever they are.

  Returns:
    A row for each option in which they differ, then one for each number of
    their summaries; columns: the two runs, by the names of their work
    directories, and `difference`, b minus a, NaN where there is none.

  Raises:
    ValueError: one of them has completed no step, or they are the same.
  """
  table = tabulate(name_runs([a, b]))
  shown = settings(table)
  options = shown.filter(like='config.').loc[:, shown.nunique() > 1].columns
  results = table.columns.drop([*shown, *_NAMES])
  both = table[[*options, *results]].astype(object).T
  numeric = both.where(both.map(is_number))
  first, second = both
  both['difference'] = numeric[second] - numeric[first]
  return both


def over_seeds(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
  """Returns mean and standard deviation (of a sample, n - 1), a row a method.

  Both are NaN where a value is, the deviation also where there is one seed.
  Texts that differ are joined.
  """
  groups = table.groupby('method', sort=False)
  measured = table.select_dtypes('number').columns.drop('seed', errors='ignore')
  texts = groups[['balancer', 'worst_average_layer', 'worst_sup_layer']]
  texts = texts.agg(lambda values: ', '.join(values.unique()))
  mean = groups[measured].mean(skipna=False)
  return mean.join(texts), groups[measured].std(skipna=False)


def settings(table: pd.DataFrame) -> pd.DataFrame:
  """Returns options and facts as texts, an option as a flag has it."""
  return table.filter(regex=r'^(config|facts)\.').map(_setting)


def notes(table: pd.DataFrame) -> list[str]:
  """Returns what a reader must know before believing a table, as sentences."""
  said = []
  for index, run in table.iterrows():
    name = index if isinstance(index, str) else '{}, seed {}'.format(*index)
    done, total = run['steps'], run['config.steps']
    if not run['finished']:
      said.append(f'{name} is not finished: step {done:,} of {total:,}.')
    if not math.isnan(run['diverged_at']):
      said.append(
        f'{name} diverged: no step is finite from step '
        f'{run["diverged_at"]:,.0f} on.'
      )
    elif skipped := run['skipped_steps']:
      said.append(f'{name} skipped steps that were not finite: {skipped:,.0f}.')
  table = table.copy().reset_index()  # In one piece: pandas warns otherwise.
  seeds = table.groupby('method', sort=False)['seed'].nunique()
  if alone := list(seeds.index[seeds == 1]):
    said.append(
      f'One seed ({", ".join(alone)}): how much chance does is not known, and '
      'small differences in loss mean nothing.'
    )
  if len(alone) < len(seeds):
    said.append('Mean ± standard deviation over seeds (of a sample, n - 1).')
  facts = settings(table).filter(like='facts.')
  differ = facts.groupby(table['seed']).nunique().gt(1).any()
  if differ.any():
    these = ', '.join(differ.index[differ].str.removeprefix('facts.'))
    said.append(f'Facts that differ between runs of one seed: {these}.')
  for key, reasons in facts.filter(like='facts.not_evaluated.').items():
    for reason in reasons[reasons != UNKNOWN].unique():
      name = key.removeprefix('facts.not_evaluated.')
      said.append(f'Not evaluated: {name}, because {reason.rstrip(".")}.')
  return [*said, f'{UNKNOWN} is a value that is unknown or not finite.']


def _refuse_differences(runs: Sequence[Results], but: Sequence[str]) -> None:
  for run in runs[1:]:
    differing = [
      f'{option}: {" and ".join(map(_setting, values))}'
      for option, values in differences(runs[0].config, run.config, but).items()
    ]
    if differing:
      raise ValueError(
        f'{runs[0].workdir} and {run.workdir} may differ in {", ".join(but)} '
        f'only, but differ in {"; ".join(differing)}'
      )


def is_number(value: Any) -> bool:
  """Tells numbers from texts, and from truth values."""
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _setting(value: Any) -> str:
  if value is None or value != value:
    return UNKNOWN
  if value == '':
    return '(empty)'
  return value if isinstance(value, str) else json.dumps(value)
