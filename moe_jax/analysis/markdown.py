"""Comparisons of methods as Markdown, for people."""

from collections.abc import Iterable, Iterator

import pandas as pd

from moe_jax.analysis import cells
from moe_jax.analysis.table import is_number, notes, over_seeds, settings

# Options that are told first.
_SIZES = (
  'batch_size',
  'sequence_length',
  'capacity_factor',
  'model.layers',
  'model.experts',
  'model.experts_per_token',
)


def comparison_markdown(table: pd.DataFrame) -> str:
  """Writes what `comparison` returned as a page of Markdown.

  The best value of a column is bold where it means something: in the balance
  table, and among losses where there are several seeds; in both cases only
  where it stands out by more than the standard deviations and the rounding.
  """
  return '\n\n'.join(_parts(table)) + '\n'


def _parts(table: pd.DataFrame) -> Iterator[str]:
  mean, deviation = over_seeds(table)
  seeds = table.groupby('method').size().max()
  yield '# Comparison of routing methods'
  yield _written(_facts(table), align='---')
  yield _list(notes(table))
  for section in cells.sections(table)[1:]:
    yield f'## {section.title}'
    if section.text:
      yield section.text
    bold = '**{}**' if 0 < section.seeds <= seeds else '{}'
    _, texts, meanings = cells.of_methods(mean, deviation, section, bold)
    yield _written(texts)
    yield _list(f'**{name}**: {means}' for name, means in meanings.items())
    if section.title == 'Balance':
      title, texts, _ = cells.of_layers(mean)
      yield f'### {title}'
      yield _written(texts)


def _facts(table: pd.DataFrame) -> pd.DataFrame:
  """What all runs share, and how they differ."""
  runs = table.reset_index()
  methods = runs.drop_duplicates('method')[['method', 'balancer']]
  facts = {'methods': '; '.join(f'{m} = `{b}`' for m, b in methods.to_numpy())}
  for key in ('seed', 'steps', 'tokens'):
    facts[key] = ', '.join(f'{value:,}' for value in runs[key].unique())
  shown = settings(table)
  for key in shown.columns[shown.nunique() == 1]:
    group, _, name = key.partition('.')
    if name in _SIZES or group == 'facts':
      value = table[key].iloc[0]
      value = f'{round(value, 4):,}' if is_number(value) else str(value)
      facts[name.replace('_', ' ')] = value
  return pd.DataFrame({'value': facts}).rename_axis('fact')


def _written(texts: pd.DataFrame, align: str = '---:') -> str:
  rule = ['---'] + [align] * len(texts.columns)
  lines = [[texts.index.name, *texts.columns], rule]
  lines += texts.itertuples(name=None)
  return rows(lines)


def rows(lines: Iterable[Iterable[str]]) -> str:
  """Writes lines of texts, whatever is in them, as lines of a table."""
  return '\n'.join(f'| {" | ".join(map(_one_line, line))} |' for line in lines)


def _list(items: Iterable[str]) -> str:
  return '\n'.join(f'- {_one_line(item)}' for item in items)


def _one_line(text: str) -> str:
  return ' '.join(text.split()).replace('|', '\\|')
