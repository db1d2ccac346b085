"""Writes the reference of all options from where they are declared.

python -m docs.configuration
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import inspect
import pathlib
from typing import Any

import griffe

from moe_jax import config
from moe_jax.options import Option

PAGE = pathlib.Path(__file__).parent / 'pages/configuration.md'

_START = """\
<!-- Written by `python -m docs.configuration`: change the options. -->

# Configuration

Every option is a flag, `--config.NAME=VALUE`, of `python -m moe_jax.main` and
of `python -m experiments.compare`. An experiment file, such as
`experiments/demo.py`, starts from the defaults below and sets some; flags come
last. `config.json` in a work directory has all of them, as they were in that
run.

A wrong option is refused in one line before anything is compiled. The ranges
are there to catch slips. The last column says whether an option **may change**
when a run resumes from its checkpoint:

- *yes*: it changes nothing that is computed;
- *named*: only with `--allow_config_change=NAME`;
- *no*: another value is another run, which needs another work directory.
"""

_SECTIONS = {
  'model': 'Sizes and options of the language model.',
  'losses': (
    'Losses on every router, beside the one that a balancer may have; see '
    '[A loss of your own](add_a_loss.md).'
  ),
  'optimizer': (
    'How parameters move. `learning_rate`, `warmup_steps`, `weight_decay` and '
    '`gradient_clip` hold for every optimizer.'
  ),
  'mesh': 'Devices along each axis of the mesh; see [Run on a pod](pod.md).',
  'data': 'Text to train and evaluate on.',
}

_BALANCERS = """\
## Balancers

The part after the colon in `--config=experiments/demo.py:METHOD` chooses the
balancer and its first options:

| METHOD | balancer |
| --- | --- |
{methods}

The options of one balancer are the arguments of its function.
"""


def reference() -> str:
  """Returns the page, in Markdown."""
  parts = [_START, '## Training\n', _options('')]
  for section, about in _SECTIONS.items():
    parts.append(f'## {section.capitalize()}\n\n{about}\n')
    parts.append(_options(f'{section}.'))
  parts.append(_BALANCERS.format(methods=_methods()))
  for name, function in config.BALANCERS.items():
    parts.append(f'### {name}\n\n{_summary(name, function)}\n')
    if inspect.signature(function).parameters:
      parts.append(_table(_arguments(function)))
  return '\n'.join(parts)


def _options(prefix: str) -> str:
  """Returns the table of the options of one section."""
  kind = config.Config
  if prefix:
    kind = {f.name: f.type for f in dataclasses.fields(kind)}[prefix[:-1]]
  module = griffe.load(kind.__module__)
  members = module[kind.__name__].all_members
  return _table(
    _row(
      f'{prefix}{field.name}',
      field.default,
      field.metadata[Option],
      members[field.name].docstring.value,
    )
    for field in dataclasses.fields(kind)
    if Option in field.metadata and field.name != 'balancer'
  )


def _arguments(function: Callable) -> Iterator[tuple[str, ...]]:
  docstring = griffe.Docstring(inspect.getdoc(function))
  meaning = {
    argument.name: argument.description
    for part in griffe.parse_google(docstring, warnings=False)
    if part.kind.value == 'parameters'
    for argument in part.value
  }
  for name, parameter in inspect.signature(function).parameters.items():
    said = config.ARGUMENTS.get(name, Option())
    yield _row(f'balancer.{name}', parameter.default, said, meaning[name])


def _row(
  name: str, default: Any, said: Option, meaning: str
) -> tuple[str, ...]:
  shown = str(default).lower() if isinstance(default, bool) else str(default)
  return (
    f'`{name}`',
    f'`{shown}`' if shown else 'empty',
    type(default).__name__ + _range(said),
    ' '.join(meaning.split()).replace('|', r'\|'),
    config.may_change(name),
  )


def _range(said: Option) -> str:
  if said.among:
    return ', ' + ' or '.join(value or 'empty' for value in said.among)
  if said.most is None:
    return ''
  least = said.least if said.above is None else said.above
  least, most = (
    f'{bound:,}' if isinstance(bound, int) else f'{bound:g}'
    for bound in (least, said.most)
  )
  above = said.above is not None
  return f' above {least}, to {most}' if above else f', {least} to {most}'


def _table(rows: Iterable[tuple[str, ...]]) -> str:
  head = ('option', 'default', 'type and range', 'meaning', 'may change')
  lines = [head, ('---',) * len(head), *rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _methods() -> str:
  lines = []
  for method, options in config.METHODS.items():
    values = ', '.join(f'{k}={v!r}' for k, v in options.items() if k != 'name')
    lines.append(f'| `{method}` | `{options["name"]}({values})` |')
  return '\n'.join(lines)


def _summary(name: str, function: Callable) -> str:
  first = inspect.getdoc(function).partition('\n')[0]
  return f'{first} See [{name}][moe_jax.routing.{name}].'


if __name__ == '__main__':
  PAGE.write_text(reference())
