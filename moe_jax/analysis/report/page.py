"""Puts the report page together."""

import base64
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
import datetime
import hashlib
import re
from typing import NamedTuple

import jinja2
import pandas as pd

from moe_jax.analysis import cells
from moe_jax.analysis import table as tables
from moe_jax.analysis.report.pictures import draw_all
from moe_jax.analysis.results import name_runs
from moe_jax.analysis.run import Run

_NUMBER = re.compile(r'[-+]?[\d,.]+%?( .*)?')


class Part(NamedTuple):
  """Tables below a common heading."""

  title: str
  text: str
  tables: list[cells.Cells]


def render(
  runs: Sequence[Run],
  texts: Mapping[str, str],
  tell: Callable[[str], None],
) -> str:
  """Returns the page, HTML.

  Args:
    runs: each with one step at least.
    texts: by their names; where there are any, their routes are drawn.
    tell: called with what is being done.

  Raises:
    FileNotFoundError, ValueError: a file of a run is missing or damaged, or it
      has no step yet.
  """
  named = name_runs(runs)
  tell(f'reading {len(runs)} runs')
  table = tables.tabulate(named)
  pictures = draw_all(named, texts, tell)
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('moe_jax.analysis.report'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters['hash'] = _hash
  environment.tests['number'] = _NUMBER.fullmatch
  return environment.get_template('report.html').render(
    title=f'{len(runs)} runs' if len(runs) > 1 else next(iter(named)),
    made=datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
    pictures=pictures,
    several=len(runs) > 1,
    notes=tables.notes(table),
    parts=list(_parts(table, named)),
    shared=_shared(table),
  )


def _parts(table: pd.DataFrame, named: Mapping[str, Run]) -> Iterator[Part]:
  overview, *sections = cells.sections(table)
  yield Part(overview.title, overview.text, [cells.of_runs(table, overview)])
  methods = tables.by_method(named.values())
  refusal = ''
  try:
    compared = tables.over_seeds(tables.comparison(methods))
  except ValueError as error:
    compared, refusal = None, f'Not comparable in every respect: {error}.'
  if len(named) > 1:
    yield Part(
      'Differences',
      f'Beside each result: its distance from {table.index[0]}. {refusal}',
      cells.of_differences(table),
    )
  for section in sections:
    shown = [cells.of_runs(table, section)]
    if compared and len(named) > len(methods):
      shown.append(cells.of_methods(*compared, section))
    if section.title == 'Balance':
      shown.append(cells.of_layers(table))
    yield Part(section.title, section.text, shown)


def _shared(table: pd.DataFrame) -> dict[str, dict[str, str]]:
  """Returns the options and facts that all runs share, by group."""
  shown = tables.settings(table)
  groups = defaultdict(dict)
  for key, value in shown.loc[:, shown.nunique() == 1].iloc[0].items():
    group, _, name = key.removeprefix('config.').rpartition('.')
    groups[group or 'options'][name] = value
  return groups


def _hash(text: str) -> str:
  """What a Content-Security-Policy calls the only script, or style, it runs."""
  digest = hashlib.sha256(text.encode()).digest()
  return f'sha256-{base64.b64encode(digest).decode()}'
