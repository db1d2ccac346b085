"""Tables as texts, whoever writes them: data frames of strings.

The name of a frame's index heads its first column.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from moe_jax.analysis import columns
from moe_jax.analysis.columns import Column, Section
from moe_jax.analysis.table import UNKNOWN, settings


class Cells(NamedTuple):
  """A table.

  Attributes:
    title: its heading; '' for none.
    texts: the data frame of strings.
    meanings: what its headings mean.
  """

  title: str
  texts: pd.DataFrame
  meanings: Mapping[str, str] = {}


def sections(table: pd.DataFrame) -> list[Section]:
  """Returns all sections that the runs of a table have values of."""
  sets = table.filter(regex='^eval/.*/perplexity$')
  texts = table.filter(regex='^train/loss/')
  return columns.sections(
    [key.split('/')[1] for key in sets], [key.split('/')[2] for key in texts]
  )


def of_runs(table: pd.DataFrame, section: Section) -> Cells:
  """Returns a section's values, a row a run."""
  return _headed('', _write(table, section.columns).rename_axis('run'), section)


def of_methods(
  mean: pd.DataFrame,
  deviation: pd.DataFrame,
  section: Section,
  bold: str = '{}',
) -> Cells:
  """Returns a section's values as mean ± deviation, a row a method.

  Args:
    mean: over the seeds of each method.
    deviation: the same.
    section: whose values.
    bold: how the lowest mean of a column is written where it stands out by more
      than the deviations and the rounding.
  """
  means = _write(mean, section.columns)
  spread = _write(deviation.reindex(columns=mean.columns), section.columns, '')
  texts = means.where(spread == UNKNOWN, means + ' ± ' + spread)
  for key in deviation.columns.intersection(means.columns):
    best = _lowest(mean[key], deviation[key].fillna(0.0), means[key])
    if best is not None:
      texts.loc[best, key] = bold.format(texts.loc[best, key])
  return _headed(f'{section.title}, over seeds', texts, section)


def _lowest(
  mean: pd.Series, deviation: pd.Series, shown: pd.Series
) -> str | None:
  """The method whose mean is clearly the lowest, if there is one."""
  known = mean.dropna().sort_values()
  if len(known) < 2:
    return None
  best, others = known.index[0], known.index[1:]
  clear = (mean - deviation)[others] > (mean + deviation)[best]
  apart = shown[others] != shown[best]
  return best if (clear & apart).all() else None


def of_layers(values: pd.DataFrame) -> Cells:
  """Returns the balance of each layer, a column a row of `values`."""
  average, sup = (
    values.filter(like=f'{key}/')
    .rename(columns=lambda name: name.rpartition('/')[2])
    .map(_text, form='.3f')
    .T.sort_index()
    for key in ('average_max_violation', 'sup_max_violation')
  )
  texts = (average + ' / ' + sup).rename_axis('layer')
  return Cells('AvgMaxVio / SupMaxVio of each layer', texts)


def _with_text(column: Column) -> str:
  """Returns a heading, and behind it the text that the column is of, if any."""
  first, *rest = column.key.split('/')  # eval/TEXT/perplexity, train/loss/TEXT
  return ', '.join(
    [column.heading, *(rest[:1] if first == 'eval' else rest[1:])]
  )


def of_differences(table: pd.DataFrame) -> list[Cells]:
  """Returns results beside the first run's, and the settings that differ."""
  measured = [
    column._replace(heading=_with_text(column))
    for section in sections(table)[1:]
    for column in section.columns
    if column.form
  ]
  results = _write(table, measured)
  numbers = table[results.columns]
  away = (numbers - numbers.iloc[0]).iloc[1:].reindex(table.index)
  away = _write(away, measured, '+')
  results = results.where(away == UNKNOWN, results + ' ' + away)
  results = results.set_axis([column.heading for column in measured], axis=1)
  shown = settings(table)
  shown = shown.loc[:, shown.nunique() > 1]
  shown.columns = shown.columns.str.removeprefix('config.')
  return [
    Cells('Results', results.T.rename_axis('result')),
    Cells('Options and facts', shown.T.rename_axis('option or fact')),
  ]


def _write(
  values: pd.DataFrame, shown: Sequence[Column], sign: str | None = None
) -> pd.DataFrame:
  """Writes values, by their keys, with the sign of their formats or another."""
  texts = {}
  for key, _, form, *_ in shown:
    if sign is not None and form:
      form = sign + form.removeprefix('+')
    texts[key] = [_text(value, form) for value in values[key]]
  return pd.DataFrame(texts, index=values.index)


def _text(value: Any, form: str) -> str:
  return UNKNOWN if pd.isna(value) else f'{value:{form}}'


def _headed(title: str, texts: pd.DataFrame, section: Section) -> Cells:
  headed = texts.set_axis([c.heading for c in section.columns], axis=1)
  meanings = {c.heading: c.meaning for c in section.columns if c.meaning}
  return Cells(title, headed, meanings)
