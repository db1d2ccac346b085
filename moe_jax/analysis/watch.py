"""Shows runs while they train.

  python -m moe_jax.analysis.watch WORKDIR... [--once]

A live table on a terminal; plain lines elsewhere, one a run at most every ten
seconds. Ends when all runs are finished, or by Ctrl-C.
"""

import argparse
from collections.abc import Sequence
import contextlib
import datetime
import itertools
import math
import os
import sys
import time

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moe_jax.analysis.follow import Followed
from moe_jax.analysis.naming import name_paths

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_LINES = 10.0
_BLOCKS = '▁▂▃▄▅▆▇█'
_ASCII = '_.-=+*#@'  # for terminals that have no others
_CELL = 38  # characters of a sparkline with its name and value, at least
_HEADINGS = ('step', 'loss', 'MaxVio', 'tokens/s', 'skipped', 'state')
_STYLES = {'running': '', 'finished': 'green', 'no step yet': 'dim'}


def sparkline(
  values: Sequence[float], *, top: float, width: int, blocks: str = _BLOCKS
) -> str:
  """Draws values from 0 to `top` as blocks of eight heights.

  Args:
    values: where there are more than `width`, means of neighbours are drawn.
    top: what is as high as a block can be.
    width: of the line, in characters, at most.
    blocks: eight characters, from the lowest to the highest.
  """
  parts = np.array_split(values, min(width, len(values))) if len(values) else []
  shares = [part.mean() / top if top else 0 * part.mean() for part in parts]
  return ''.join(
    blocks[int(np.clip(share * 8, 0, 7))] if math.isfinite(share) else '?'
    for share in shares
  )


def state(run: Followed, now: float) -> str:
  """Returns the time left of a run that trains, else what it does."""
  found = run.state(now)
  if found == 'running':
    return f'{_duration((run.total - run.step) * run.step_seconds)} left'
  return f'silent {_duration(run.silent(now))}' if found == 'silent' else found


def cells(run: Followed, now: float) -> dict[str, str]:
  """Returns what is said of a run that has begun, by headings."""
  return {
    'step': f'{run.step:,}/{run.total:,}',
    'loss': _number(run.last['train/loss']),
    'MaxVio': _number(run.last['router/max_violation']),
    'tokens/s': f'{run.last["time/tokens_per_second"]:,.0f}',
    'skipped': f'{run.last.get("train/skipped_steps", 0):,}',
    'state': state(run, now),
  }


def view(runs: Sequence[Followed], console: Console, now: float) -> Group:
  """Returns the table of all runs, and sparklines of each, as far as they fit.

  Args:
    runs: at least one.
    console: for its size and what characters it has.
    now: seconds since the epoch.
  """
  table = Table(box=None, padding=(0, 2, 0, 0), header_style='dim')
  # The other columns need that much; a long name is cut, numbers are not.
  table.add_column('run', no_wrap=True, max_width=max(8, console.width - 68))
  for heading in _HEADINGS:
    table.add_column(heading, justify='right', no_wrap=True)
  for run in runs:
    said = cells(run, now) if run.steps else {'state': state(run, now)}
    style = _STYLES.get(run.state(now), 'yellow')
    said['state'] = Text(said['state'], style)
    table.add_row(Text(run.name), *(said.get(h, '') for h in _HEADINGS))
  begun = [run for run in runs if run.steps]
  room = console.height - len(runs) - 2
  blocks = _BLOCKS if console.encoding.startswith('utf') else _ASCII
  parts = [table]
  for run in begun:
    rows = room // len(begun) - 3  # An empty line and two of text.
    if rows > 0:
      parts.append(_sparklines(run, console.width, rows, blocks))
  return Group(*parts)


def line(run: Followed, now: float) -> str:
  """Returns the state of a run in one line."""
  if not run.steps:
    return f'{run.name}: {state(run, now)}'
  said = cells(run, now)
  last = said.pop('state')
  numbers = [f'{heading} {text}' for heading, text in said.items()]
  return f'{run.name}: {"  ".join([*numbers, *_evaluations(run), last])}'


def _sparklines(run: Followed, width: int, rows: int, blocks: str) -> Group:
  """A heading and, below it, the loss and MaxVio of each layer."""
  columns = max(1, width // _CELL)
  layers = run.layers
  most = rows * columns - 1
  by_mean = sorted(layers, key=lambda layer: -sum(layers[layer]))
  shown = {layer: layers[layer] for layer in sorted(by_mean[:most])}
  top = np.nanmax([0.0, *itertools.chain(*shown.values())])
  title = (
    f'{run.name[:20]}: steps {run.steps[0]["step"]:,} to {run.step:,}, '
    f'MaxVio 0 to {_number(top)}'
  )
  if len(shown) < len(layers):
    title += f', worst {len(shown)} of {len(layers)} layers'
  losses = np.array([step['train/loss'] for step in run.steps])
  lowest, highest = np.nanmin([*losses, np.inf]), np.nanmax([*losses, -np.inf])
  lines = {'loss': (losses - lowest, highest - lowest, losses[-1])}
  lines |= {name: (values, top, values[-1]) for name, values in shown.items()}
  name_width = max(map(len, lines))
  line_width = width // columns - name_width - 11
  texts = [
    Text(f'{name:{name_width}} ', 'dim')
    + Text(f'{_number(value):>7} ')
    + Text(
      sparkline(values, top=most_of, width=line_width, blocks=blocks), 'cyan'
    )
    for name, (values, most_of, value) in lines.items()
  ]
  grid = Columns(texts, column_first=True, equal=True, padding=(0, 2))
  heading = [Text(title, 'bold', no_wrap=True)]
  if run.evaluations:
    heading.append(Text('  '.join(_evaluations(run)), no_wrap=True))
  return Group('', *heading, grid)


def _evaluations(run: Followed) -> list[str]:
  return [
    f'{name} perplexity {_number(value)} (step {step:,})'
    for name, (step, value) in run.evaluations.items()
  ]


def _number(value: float) -> str:
  return f'{value:,.3f}' if math.isfinite(value) else 'not finite'


def _duration(seconds: float) -> str:
  return str(datetime.timedelta(seconds=round(seconds)))


def _watch(runs: Sequence[Followed], once: bool) -> None:
  console = Console()
  live, printed = None, {}
  if console.is_terminal and not console.is_dumb_terminal:
    live = Live(console=console, auto_refresh=False)
  with live or contextlib.nullcontext():
    while True:
      now = time.time()
      for run in runs:
        run.look()
        news = (run.step, run.state(now))
        if not live and printed.get(run) != news:
          print(line(run, now), flush=True)
          printed[run] = news
      if live:
        live.update(view(runs, console, now), refresh=True)
      if once or all(run.finished for run in runs):
        return
      time.sleep(_SECONDS_BETWEEN_LOOKS if live else _SECONDS_BETWEEN_LINES)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m moe_jax.analysis.watch',
    description='Shows runs while they train; ends when they are finished, or '
    'by Ctrl-C.',
  )
  parser.add_argument('workdir', nargs='+', help='work directory of a run')
  parser.add_argument(
    '--once', action='store_true', help='show how they stand now, and end'
  )
  arguments = parser.parse_args(argv)
  sys.stdout.reconfigure(errors='replace')  # Names may be in any script.
  try:
    paths = arguments.workdir
    _watch(list(map(Followed, paths, name_paths(paths))), arguments.once)
  except KeyboardInterrupt:
    pass
  except BrokenPipeError:  # `| head` has seen enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except KeyError as error:
    print(f'error: no run of this version: {error} is missing', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
