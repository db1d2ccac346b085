"""Writes the reference of all options from the dataclasses that hold them.

python -m docs.configuration
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses
import inspect
import pathlib
from typing import Any

import griffe

from moe_jax import config as config_lib
from moe_jax.config import Config
from moe_jax.config import MeshConfig
from moe_jax.data import DataConfig
from moe_jax.nn import DecoderConfig
from moe_jax.options import Range

PAGE = pathlib.Path(__file__).parent / 'pages/configuration.md'

_START = """\
<!-- Written by `python -m docs.configuration`: change the docstrings. -->

# Configuration

Every option is a flag, `--config.NAME=VALUE`, of `python -m moe_jax.main` and
of `python -m experiments.compare`. An experiment file, such as
`experiments/demo.py`, starts from the defaults below and sets some; flags come
last. `config.json` in a work directory has all of them, as they were in that
run.

A wrong option is refused in one line before anything is compiled. The ranges
are there to catch slips. The last column says whether an option **may change**
when a run goes on from its checkpoint:

- *yes*: it changes nothing that is computed;
- *named*: only with `--allow_config_change=NAME`;
- *no*: another value is another run, which needs another work directory.
"""

_GROUPS = {
  'model': (DecoderConfig, 'Model', 'Sizes and options of the language model.'),
  'mesh': (
    MeshConfig,
    'Mesh',
    'Devices along each axis of the mesh; see [Run on a pod](pod.md).',
  ),
  'data': (DataConfig, 'Data', 'What text to train and evaluate on.'),
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
  names = config_lib.flatten(config_lib.to_dict(Config()))
  names = [name for name in names if not name.startswith('balancer.')]
  parts = [_START, '## Training\n']
  parts.append(_table(_option(n, Config, n) for n in names if '.' not in n))
  for group, (kind, title, about) in _GROUPS.items():
    parts.append(f'## {title}\n\n{about}\n')
    fields = [n for n in names if n.startswith(f'{group}.')]
    parts.append(
      _table(_option(n, kind, n.removeprefix(f'{group}.')) for n in fields)
    )
  parts.append(_BALANCERS.format(methods=_methods()))
  for name, function in config_lib.BALANCERS.items():
    parts.append(f'### {name}\n\n{_summary(name, function)}\n')
    if inspect.signature(function).parameters:
      parts.append(_table(_arguments(function)))
  return '\n'.join(parts)


def _option(name: str, kind: type, field: str) -> tuple[str, ...]:
  default = getattr(kind(), field)
  return _row(name, default, kind.RANGES.get(field), _described(kind)[field])


def _arguments(function: Callable) -> Iterator[tuple[str, ...]]:
  meaning = _described(function)
  for name, parameter in inspect.signature(function).parameters.items():
    allowed = config_lib.BALANCER_RANGES.get(name)
    yield _row(f'balancer.{name}', parameter.default, allowed, meaning[name])


def _row(
  name: str, default: Any, allowed: Range | None, meaning: str
) -> tuple[str, ...]:
  if config_lib.is_among(name, config_lib.MAY_CHANGE):
    change = 'yes'
  elif config_lib.is_among(name, config_lib.CHANGEABLE):
    change = 'named'
  else:
    change = 'no'
  shown = str(default).lower() if isinstance(default, bool) else str(default)
  return (
    f'`{name}`',
    f'`{shown}`' if shown else 'empty',
    type(default).__name__ + (_range(allowed) if allowed else ''),
    meaning.replace('|', r'\|'),
    change,
  )


def _range(allowed: Range) -> str:
  least, most = (
    f'{bound:,}' if isinstance(bound, int) else f'{bound:g}'
    for bound in (allowed.least, allowed.most)
  )
  return (
    f' above {least}, to {most}' if allowed.above else f', {least} to {most}'
  )


def _table(rows: Iterable[tuple[str, ...]]) -> str:
  head = ('option', 'default', 'type and range', 'meaning', 'may change')
  lines = [head, ('---',) * len(head), *rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _described(thing: Any) -> dict[str, str]:
  """Returns what docstrings say of each attribute or argument, by its name."""
  found = {}
  if isinstance(thing, type) and dataclasses.is_dataclass(thing.__base__):
    found = _described(thing.__base__)
  docstring = griffe.Docstring(inspect.getdoc(thing))
  for section in griffe.parse_google(docstring, warnings=False):
    if section.kind.value in ('attributes', 'parameters'):
      for item in section.value:
        found[item.name] = ' '.join(item.description.split())
  return found


def _methods() -> str:
  lines = []
  for method, options in config_lib.METHODS.items():
    values = ', '.join(f'{k}={v!r}' for k, v in options.items() if k != 'name')
    lines.append(f'| `{method}` | `{options["name"]}({values})` |')
  return '\n'.join(lines)


def _summary(name: str, function: Callable) -> str:
  first = inspect.getdoc(function).partition('\n')[0]
  return f'{first} See [{name}][moe_jax.routing.{name}].'


if __name__ == '__main__':
  PAGE.write_text(reference())
