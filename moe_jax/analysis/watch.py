"""Shows runs while they train.

  python -m moe_jax.analysis.watch WORKDIR... [--once]

A live table on a terminal; plain lines elsewhere, one a run at most every ten
seconds. Ends when all runs are finished, or by Ctrl-C.
"""

import argparse
from collections.abc import Sequence
import contextlib
import math
import os
import sys
import time
from typing import Any

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
_STYLES = {'running': '', 'finished': 'green', 'waiting': 'dim'}


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
  count = min(width, len(values))
  line = ''
  for i in range(count):
    first, end = i * len(values) // count, (i + 1) * len(values) // count
    mean = sum(values[first:end]) / (end - first)
    if math.isfinite(mean):
      height = int(mean / top * len(blocks)) if top > 0 else 0
      line += blocks[min(max(height, 0), len(blocks) - 1)]
    else:
      line += '?'
  return line


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
  for heading in ('step', 'loss', 'MaxVio', 'tokens/s', 'skipped', 'time left'):
    table.add_column(heading, justify='right', no_wrap=True)
  for run in runs:
    state = Text(_state(run, now), _STYLES.get(run.state(now), 'yellow'))
    if not run.steps:
      table.add_row(Text(run.name), '', '', '', '', '', state)
      continue
    if run.state(now) == 'running':
      state = Text(_duration(run.seconds_left))
    table.add_row(
      Text(run.name),
      f'{run.step:,}/{run.total:,}',
      _number(run.last['train/loss']),
      _number(run.last['router/max_violation']),
      f'{run.last["time/tokens_per_second"]:,.0f}',
      f'{run.last.get("train/skipped_steps", 0):,}',
      state,
    )
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
    return f'{run.name}: {_state(run, now)}'
  last, layers = run.last, run.layers
  worst = max(layers, key=lambda layer: layers[layer][-1], default='')
  parts = [
    f'{run.name}: step {run.step:,}/{run.total:,}',
    f'loss {_number(last["train/loss"])}',
    f'MaxVio {_number(last["router/max_violation"])}'
    + (f' (worst: {worst} {_number(layers[worst][-1])})' if worst else ''),
    f'{last["time/tokens_per_second"]:,.0f} tokens/s',
  ]
  if last.get('train/skipped_steps'):
    parts.append(f'{last["train/skipped_steps"]:,} steps skipped')
  if run.evaluations:
    parts.append(_evaluations(run))
  if run.state(now) == 'running':
    parts.append(f'{_duration(run.seconds_left)} left')
  else:
    parts.append(_state(run, now))
  return '  '.join(parts)


def _sparklines(run: Followed, width: int, rows: int, blocks: str) -> Group:
  """A heading and, below it, the loss and MaxVio of each layer."""
  columns = max(1, width // _CELL)
  layers = shown = run.layers
  most = rows * columns - 1
  if len(shown) > most:  # Those that matter most, in their order.
    by_mean = sorted(shown, key=lambda layer: -sum(shown[layer]))
    shown = {layer: layers[layer] for layer in sorted(by_mean[:most])}
  violations = [v for of in shown.values() for v in of if math.isfinite(v)]
  top = max(violations, default=0.0)
  title = (
    f'{run.name[:20]}: steps {run.steps[0]["step"]:,} to {run.step:,}, '
    f'MaxVio 0 to {_number(top)}'
  )
  if len(shown) < len(layers):
    title += f', worst {len(shown)} of {len(layers)} layers'
  losses = [step['train/loss'] for step in run.steps]
  finite = [loss for loss in losses if math.isfinite(loss)]
  lowest, highest = min(finite, default=0.0), max(finite, default=0.0)
  above = [loss - lowest for loss in losses]
  lines = {'loss': (above, highest - lowest, losses[-1])}
  lines |= {name: (values, top, values[-1]) for name, values in shown.items()}
  grid = Table.grid(padding=(0, 2, 0, 0))
  for _ in range(columns):
    grid.add_column(no_wrap=True)
  name_width = max(map(len, lines))
  line_width = width // columns - name_width - 11
  cells = [
    Text(f'{name:{name_width}} ', 'dim')
    + Text(f'{_number(value):>7} ')
    + Text(
      sparkline(values, top=most_of, width=line_width, blocks=blocks), 'cyan'
    )
    for name, (values, most_of, value) in lines.items()
  ]
  height = math.ceil(len(cells) / columns)
  for row in range(height):
    grid.add_row(*cells[row::height])
  parts = ['', Text(title, 'bold', no_wrap=True)]
  if run.evaluations:
    parts.append(Text(_evaluations(run), no_wrap=True))
  return Group(*parts, grid)


def _evaluations(run: Followed) -> str:
  return 'perplexity: ' + ', '.join(
    f'{name} {_number(value)} (step {step:,})'
    for name, (step, value) in run.evaluations.items()
  )


def _state(run: Followed, now: float) -> str:
  state = run.state(now)
  if state == 'waiting':
    return 'no step yet'
  if state == 'silent':
    return f'silent {_duration(now - run.written)}'
  return state


def _number(value: float) -> str:
  return f'{value:,.3f}' if math.isfinite(value) else 'not finite'


def _duration(seconds: float) -> str:
  """Writes a time in its two largest units."""
  if not math.isfinite(seconds):
    return '?'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f'{days} d {hours} h'
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {rest} s' if minutes else f'{rest} s'


def _print_news(
  runs: Sequence[Followed], printed: dict[Followed, tuple[Any, float]]
) -> None:
  """Prints a line of each run that has news, if the last was long ago.

  Args:
    runs: all of them.
    printed: what was printed of each, and when; is kept up to date.
  """
  now = time.time()
  for run in runs:
    news = (run.step, run.state(now))
    before, when = printed.get(run, (None, -math.inf))
    due = now - when >= _SECONDS_BETWEEN_LINES or run.finished
    if news != before and due:
      print(line(run, now), flush=True)
      printed[run] = news, now


def _watch(runs: Sequence[Followed], once: bool) -> None:
  console = Console()
  live, printed = None, {}
  if console.is_terminal and not console.is_dumb_terminal:
    live = Live(console=console, auto_refresh=False)
  with live or contextlib.nullcontext():
    while True:
      for run in runs:
        run.look()
      if live:
        live.update(view(runs, console, time.time()), refresh=True)
      else:
        _print_news(runs, printed)
      if once or all(run.finished for run in runs):
        return
      time.sleep(_SECONDS_BETWEEN_LOOKS)


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
  except (ValueError, OSError) as error:
    if isinstance(error, BrokenPipeError):  # `| head` has seen enough.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 0
    print(f'error: {error}', file=sys.stderr)
    return 2
  except KeyError as error:
    print(f'error: no run of this version: {error} is missing', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    pass
  return 0


if __name__ == '__main__':
  sys.exit(main())
