"""Comparisons of methods as Markdown, for people."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from moe_jax.analysis.columns import BALANCE
from moe_jax.analysis.columns import COST
from moe_jax.analysis.columns import TRAINING
from moe_jax.analysis.columns import Column
from moe_jax.analysis.columns import evaluation_columns


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
  """Writes what `comparison` returned as a page of Markdown.

  The best value of a column is bold where it means something: in the balance
  table, and among losses where there are several seeds; in both cases only
  where it stands out by more than the standard deviations and the rounding.
  """
  methods = comparison['methods']
  several = any(m['standard_deviation'] for m in methods.values())
  sections = [
    '# Comparison of routing methods',
    _header(comparison),
    _notes(comparison),
    '## Balance',
    'MaxVio of a layer in a step is the load of its fullest expert over the '
    'mean load, minus 1: no unit, 0 is perfect balance, 1 is twice the mean.',
    _table(methods, BALANCE, bold=True),
    _legend(BALANCE),
    '### AvgMaxVio / SupMaxVio of each layer',
    _layer_table(methods),
    '## Training',
    _table(methods, TRAINING, bold=several),
    _legend(TRAINING),
    *_evaluation_sections(comparison, bold=several),
    '## Cost',
    _table(methods, COST, bold=False),
    _legend(COST),
  ]
  return '\n\n'.join(sections) + '\n'


def _header(comparison: Mapping[str, Any]) -> str:
  methods, config = comparison['methods'], comparison['config']
  summaries = [s for m in methods.values() for s in m['runs']]
  sizes = ('layers', 'experts', 'experts_per_token')
  rows = {
    'methods': '; '.join(
      f'{name} = `{method["runs"][0]["balancer"]}`'
      for name, method in methods.items()
    ),
    'seeds': _distinct(s['seed'] for s in summaries),
    'steps': _distinct(f'{s["steps"]:,}' for s in summaries),
    'tokens': _distinct(f'{s["tokens"]:,}' for s in summaries)
    + f' ({config["batch_size"]:,} sequences of'
    f' {config["sequence_length"]:,} a step)',
    'model': ', '.join(
      f'{size.replace("_", " ")} {config[f"model.{size}"]}' for size in sizes
    ),
    'capacity factor': config['capacity_factor'] or '0 (dropless)',
  }
  versions = []
  for name, fact in comparison['facts'].items():
    if name.startswith('versions.'):
      versions.append(f'{name.removeprefix("versions.")} {fact}')
    else:
      rows[name.replace('_', ' ')] = _fact(fact)
  if versions:
    rows['versions'] = ', '.join(versions)
  return _markdown_table(['fact', 'value'], rows.items(), align='--')


def _notes(comparison: Mapping[str, Any]) -> str:
  """Says what a reader must know before believing the tables."""
  methods = comparison['methods']
  notes = [
    note
    for name, method in methods.items()
    for summary in method['runs']
    for note in _run_notes(name, summary, comparison['config']['steps'])
  ]
  alone = [name for name in methods if len(methods[name]['runs']) == 1]
  if alone:
    notes.append(
      f'One seed ({", ".join(alone)}): how much chance does is not known, and '
      'small differences in loss mean nothing'
    )
  if len(alone) < len(methods):
    notes.append('Mean ± standard deviation over seeds (of a sample, n - 1)')
  for fact in comparison['differing_facts']:
    notes.append(f'**`{fact}` differs** between runs of one seed')
  for name, reason in comparison['not_evaluated'].items():
    notes.append(f'Not evaluated: {name}, because {reason}')
  notes.append('– is a value that is unknown or not finite')
  return '\n'.join(f'- {_one_line(note).rstrip(".")}.' for note in notes)


def _run_notes(
  method: str, summary: Mapping[str, Any], total_steps: int
) -> Iterator[str]:
  run, steps = f'{method}, seed {summary["seed"]}', summary['steps']
  if not summary['finished']:
    yield f'**{run} is not finished**: step {steps} of {total_steps}'
  if summary['first_non_finite_step'] is not None:
    step = summary['first_non_finite_step']
    yield f'**{run} diverged**: no finite loss at step {step}'
  for key, step in summary.items():
    group, _, name = key.partition('/')
    if group == 'eval' and name.endswith('/step') and step != steps:
      evaluated = name.removesuffix('/step')
      yield (
        f'{run}: the last finite evaluation on {evaluated} is of step '
        f'{_number(step, "")}'
      )


def _evaluation_sections(
  comparison: Mapping[str, Any], *, bold: bool
) -> list[str]:
  """One table for each set that any run evaluated."""
  methods = comparison['methods']
  keys = {k: None for method in methods.values() for k in method['mean']}
  sets = [
    key.split('/')[1]
    for key in keys
    if key.startswith('eval/') and key.endswith('/perplexity')
  ]
  if not sets:
    return []
  sections = ['## Language quality']
  for name in sets:
    columns = evaluation_columns(name)
    sections += [f'### {name}', _table(methods, columns, bold=bold)]
  return [
    *sections,
    '- **perplexity**: exp of the mean cross-entropy per token (no unit), at '
    'the last evaluation, with the q that training left: what a deployed '
    'model has.\n'
    '- **bits/byte**: the same cross-entropy over the bytes of the text, so '
    'that tokenizers compare.\n'
    '- **q solved**: q found anew in each evaluation batch, which sees tokens '
    'that come later; not to be had in deployment.',
  ]


def _layer_table(methods: Mapping[str, Any]) -> str:
  """AvgMaxVio and SupMaxVio of each layer, means over seeds."""
  average, sup = 'average_max_violation/', 'sup_max_violation/'
  layers = sorted(
    {
      key.removeprefix(average)
      for method in methods.values()
      for key in method['mean']
      if key.startswith(average)
    }
  )
  means = [method['mean'] for method in methods.values()]
  rows = [
    [
      layer,
      *(
        f'{_number(mean.get(average + layer), ".3f")} / '
        f'{_number(mean.get(sup + layer), ".3f")}'
        for mean in means
      ),
    ]
    for layer in layers
  ]
  return _markdown_table(['layer', *methods], rows)


def _table(
  methods: Mapping[str, Any],
  columns: Sequence[Column],
  *,
  bold: bool,
) -> str:
  cells = [[_cell(m, column) for m in methods.values()] for column in columns]
  for column, of_column in zip(columns, cells, strict=True):
    best = _lowest(methods.values(), column) if bold else None
    if best is not None:
      of_column[best] = f'**{of_column[best]}**'
  headings = ['method', *(column.heading for column in columns)]
  return _markdown_table(headings, zip(methods, *cells, strict=True))


def _cell(method: Mapping[str, Any], column: Column) -> str:
  key = column.key
  if key not in method['mean']:
    return _distinct(s.get(key, '–') for s in method['runs'])
  cell = _number(method['mean'][key], column.form)
  if method['standard_deviation'] and cell != '–':
    deviation = method['standard_deviation'][key]
    cell += f' ± {_number(deviation, column.form.removeprefix("+"))}'
  return cell


def _lowest(methods: Iterable[Mapping[str, Any]], column: Column) -> int | None:
  """Index of the method whose value is clearly the lowest, if there is one."""
  known = []
  for index, method in enumerate(methods):
    mean = method['mean'].get(column.key)
    if mean is not None:
      spread = (method['standard_deviation'] or {}).get(column.key, 0.0)
      known.append((mean, spread, index))
  if len(known) < 2:
    return None
  (mean, spread, best), *others = sorted(known)
  text = f'{mean:{column.form}}'
  clear = all(
    mean + spread < m - s and text != f'{m:{column.form}}' for m, s, _ in others
  )
  return best if clear else None


def _legend(columns: Iterable[Column]) -> str:
  return '\n'.join(
    f'- **{column.heading}**: {column.meaning}'
    for column in columns
    if column.meaning
  )


def _markdown_table(
  headings: Sequence[str],
  rows: Iterable[Sequence[Any]],
  *,
  align: str | None = None,
) -> str:
  """Writes a table; `align` has `-` (left) or `:` (right) for each column."""
  align = align or '-' + ':' * (len(headings) - 1)
  rule = ['---' + (':' if a == ':' else '') for a in align]
  lines = [headings, rule, *rows]
  return '\n'.join(
    '| ' + ' | '.join(_one_line(cell) for cell in line) + ' |' for line in lines
  )


def _one_line(text: Any) -> str:
  return ' '.join(str(text).split()).replace('|', '\\|')


def _distinct(values: Iterable[Any]) -> str:
  return ', '.join(dict.fromkeys(str(value) for value in values))


def _fact(value: Any) -> str:
  if isinstance(value, float):
    return f'{value:.5g}'
  whole = isinstance(value, int) and not isinstance(value, bool)
  return f'{value:,}' if whole else str(value)


def _number(value: float | None, form: str) -> str:
  return '–' if value is None else f'{value:{form}}'
