"""The tables of the report page: what runs share, and how they differ."""

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence
import json
from typing import Any
from typing import NamedTuple

from moe_jax.analysis.columns import BALANCE
from moe_jax.analysis.columns import COST
from moe_jax.analysis.columns import TRAINING
from moe_jax.analysis.columns import Column
from moe_jax.analysis.columns import evaluation_columns
from moe_jax.analysis.report.gathered import Gathered
from moe_jax.config import flatten

_UNKNOWN = '–'


class Cell(NamedTuple):
  """A cell of a table.

  Attributes:
    text: what is read.
    number: by what it is sorted; None where it is text, or unknown.
    difference: of two numbers, beside the text; '' if there is none.
  """

  text: str
  number: float | None = None
  difference: str = ''


class Table(NamedTuple):
  """A table; the first cell of a row says what the row is about."""

  title: str
  headings: Sequence[str]
  rows: Sequence[Sequence[Cell]]
  meanings: Mapping[str, str] = {}


class Section(NamedTuple):
  """Tables below a common heading."""

  title: str
  text: str
  tables: Sequence[Table]


def sections(gathered: Gathered) -> list[Section]:
  """Returns the tables of the page, those that these runs have."""
  summaries, sets = gathered.summaries, _sets(gathered.summaries)
  found = [Section('Runs', '', [_overview(gathered)])]
  if len(summaries) > 1:
    found.append(_differences(gathered))
  methods = gathered.compared['methods'] if gathered.compared else {}
  if any(method['standard_deviation'] for method in methods.values()):
    found.append(_methods(methods, sets))
  return [
    *found,
    Section(
      'Balance',
      'MaxVio of a layer in a step is the load of its fullest expert over the '
      'mean load, minus 1: no unit, 0 is perfect balance, 1 is twice the mean.',
      [_results('', BALANCE, summaries), _layers(summaries)],
    ),
    Section(
      'Quality',
      'Perplexity and bits per byte are those of the last evaluation, with the '
      'q that training left; “q solved” finds q anew in each batch.',
      [
        _results('Training', TRAINING, summaries),
        *(
          _results(f'On {name}', evaluation_columns(name), summaries)
          for name in sets
        ),
      ],
    ),
    Section('Cost', '', [_results('', COST, summaries)]),
  ]


def shared(gathered: Gathered) -> dict[str, dict[str, str]]:
  """Returns the options and facts that all runs share, by group."""
  groups = defaultdict(dict)
  first, *others = _settings(gathered)
  for option, value in first.items():
    if all(option in o and o[option] == value for o in others):
      group, _, name = option.rpartition('.')
      groups[group or 'options'][name] = _shown(value)
  return dict(groups)


def _settings(gathered: Gathered) -> list[dict[str, Any]]:
  """The options and facts of every run, by their full names."""
  settings = []
  for run in gathered.named.values():
    facts = {name: x for name, x in run.facts.items() if name != 'run'}
    settings.append(flatten(run.config | {'facts': facts}))
  return settings


def _overview(gathered: Gathered) -> Table:
  rows = []
  for name, summary in gathered.summaries.items():
    total = gathered.named[name].config['steps']
    state = 'finished' if summary['finished'] else f'of {total:,}'
    rows.append(
      [
        Cell(name),
        Cell(str(summary['method'])),
        Cell(summary['balancer']),
        Cell(str(summary['seed']), summary['seed']),
        Cell(f'{summary["steps"]:,}', summary['steps']),
        Cell(state),
        Cell(f'{summary["tokens"]:,}', summary['tokens']),
      ]
    )
  headings = ['run', 'method', 'balancer', 'seed', 'steps', 'state', 'tokens']
  return Table('', headings, rows)


def _results(
  title: str,
  columns: Sequence[Column],
  summaries: Mapping[str, Mapping[str, Any]],
) -> Table:
  rows = [
    [Cell(name), *(_cell(summary, column) for column in columns)]
    for name, summary in summaries.items()
  ]
  meanings = {c.heading: c.meaning for c in columns if c.meaning}
  return Table(title, ['run', *(c.heading for c in columns)], rows, meanings)


def _cell(
  summary: Mapping[str, Any],
  column: Column,
  base: Mapping[str, Any] | None = None,
) -> Cell:
  """A value of a run, with its difference from that of another one."""
  value = summary.get(column.key)
  if value is None or not column.form:
    return Cell(_UNKNOWN if value is None else str(value))
  before = None if base is None else base.get(column.key)
  signed = f'+{column.form.removeprefix("+")}'
  difference = '' if before is None else f'{value - before:{signed}}'
  return Cell(f'{value:{column.form}}', value, difference)


def _layers(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
  average, sup = 'average_max_violation/', 'sup_max_violation/'
  layers = sorted(
    {
      key.removeprefix(average)
      for summary in summaries.values()
      for key in summary
      if key.startswith(average)
    }
  )
  columns = {
    f'{what}, {name}' if len(summaries) > 1 else what: (key, summary)
    for name, summary in summaries.items()
    for what, key in (('AvgMaxVio', average), ('SupMaxVio', sup))
  }
  rows = [
    [
      Cell(layer),
      *(
        _cell(summary, Column(key + layer, '', '.3f', ''))
        for key, summary in columns.values()
      ),
    ]
    for layer in layers
  ]
  return Table('By layer', ['layer', *columns], rows)


def _sets(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
  keys = dict.fromkeys(key for summary in summaries.values() for key in summary)
  return [
    key.removeprefix('eval/').removesuffix('/perplexity')
    for key in keys
    if key.startswith('eval/') and key.endswith('/perplexity')
  ]


def _columns(sets: Sequence[str]) -> list[Column]:
  """Every result, those on a set with its name."""
  evaluated = [
    column._replace(heading=f'{column.heading}, {name}')
    for name in sets
    for column in evaluation_columns(name)
  ]
  return [c for c in (*BALANCE, *TRAINING, *evaluated, *COST) if c.form]


def _methods(
  methods: Mapping[str, Mapping[str, Any]], sets: Sequence[str]
) -> Section:
  rows = []
  for column in _columns(sets):
    cells = []
    for method in methods.values():
      cell = _cell(method['mean'], column)
      deviation = (method['standard_deviation'] or {}).get(column.key)
      if deviation is not None:
        form = column.form.removeprefix('+')
        cell = cell._replace(difference=f'± {deviation:{form}}')
      cells.append(cell)
    rows.append([Cell(column.heading), *cells])
  headings = [f'{name} ({len(m["runs"])})' for name, m in methods.items()]
  return Section(
    'Methods',
    'Mean ± standard deviation over the seeds (of a sample, n - 1), so many as '
    'the headings say.',
    [Table('', ['result', *headings], rows)],
  )


def _differences(gathered: Gathered) -> Section:
  summaries = gathered.summaries
  first, *others = summaries
  results = [
    [
      Cell(column.heading),
      _cell(summaries[first], column),
      *(_cell(summaries[o], column, summaries[first]) for o in others),
    ]
    for column in _columns(_sets(summaries))
  ]
  settings = _settings(gathered)
  differing = []
  for option in dict.fromkeys(name for flat in settings for name in flat):
    values = [flat.get(option) for flat in settings]
    if any(value != values[0] for value in values):
      differing.append([Cell(option), *(Cell(_shown(v)) for v in values)])
  return Section(
    'Differences',
    f'Beside each result: how far it is from that of {first}.',
    [
      Table('Results', ['result', *summaries], results),
      Table('Options and facts', ['option or fact', *summaries], differing),
    ],
  )


def _shown(value: Any) -> str:
  """Writes an option as a flag has it."""
  if value is None:
    return _UNKNOWN
  if value == '':
    return '(empty)'
  return value if isinstance(value, str) else json.dumps(value)
