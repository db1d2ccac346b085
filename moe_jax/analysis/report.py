"""Makes one page of runs: results, figures, differences, configuration.

  python -m moe_jax.analysis.report WORKDIR... [--out=report.html]

The page is a single file that fetches nothing. Runs may be unfinished, and of
different configs.
"""

import argparse
import base64
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import datetime
import hashlib
import io
import os
import pathlib
import sys
import threading
from typing import Any
from typing import NamedTuple

import jinja2
from markupsafe import Markup
import matplotlib
from matplotlib.figure import Figure

from moe_jax.analysis import figures
from moe_jax.analysis import report_tables as tables
from moe_jax.analysis.run import Run

_SECONDS_OF_SILENCE = 5.0
_LONGEST_LABEL = 18  # characters: four fit side by side


class _Picture(NamedTuple):
  title: str
  draw: Callable[[Any], Figure]  # of runs by their names, or of a run
  caption: str
  each: bool = False  # whether there is one of every run


_PICTURES = (
  _Picture(
    'Balance over the steps',
    figures.max_violation_figure,
    'MaxVio: load of the fullest expert over the mean load, minus 1. The line '
    'is the mean over the layers, the band reaches up to the worst layer.',
  ),
  _Picture(
    'Load of each expert',
    figures.load_heatmap_figure,
    "Of each run's least balanced layer. Dark is idle, light is twice the mean "
    'load or more.',
  ),
  _Picture(
    'Loss',
    figures.loss_figure,
    'Left: cross-entropy of the training batches. Right: validation, with the '
    'q that training left.',
  ),
)


def report(
  runs: Sequence[Run], tell: Callable[[str], None] = lambda doing: None
) -> str:
  """Returns the page, HTML.

  Args:
    runs: each with one step at least.
    tell: called with what is being done.

  Raises:
    FileNotFoundError, ValueError: a file of a run is missing or damaged, or it
      has no step yet.
  """
  named = tables.name_runs(runs)
  summaries = {}
  for name, run in named.items():
    tell(f'reading {run.workdir}')
    summaries[name] = tables.summarize(run)
  compared, refusal = tables.compare(named)
  drawn = []
  for picture in _PICTURES:
    tell(f'drawing {picture.title}')
    if picture.each:
      for name, run in named.items():
        drawn.append(_draw(picture, run, f'{picture.title}: {name}'))
    else:
      drawn.append(_draw(picture, _labelled(named), picture.title))
  tell('writing')
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('moe_jax.analysis'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters['breakable'] = _breakable
  script, style = (
    environment.loader.get_source(environment, name)[0]
    for name in ('report.js', 'report.css')
  )
  return environment.get_template('report.html').render(
    title=next(iter(named)) if len(named) == 1 else f'{len(named)} runs',
    made=datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
    script=script,
    script_hash=_hash(script),
    style=style,
    style_hash=_hash(style),
    pictures=drawn,
    several=len(named) > 1,
    notes=tables.notes(named, summaries, compared, refusal),
    sections=tables.sections(named, summaries, compared),
    shared=tables.shared(named),
  )


def _draw(picture: _Picture, of: Any, title: str) -> dict[str, Any]:
  shown = {'title': title, 'caption': picture.caption}
  try:
    figure = picture.draw(of)
  except ValueError as error:  # It needs what one of the runs has not.
    return shown | {'missing': str(error)}
  file = io.BytesIO()
  with matplotlib.rc_context({'svg.hashsalt': 'moe_jax'}):
    figure.savefig(file, format='svg', metadata={'Date': None})
  width, height = figure.get_size_inches()
  return shown | {
    'data': base64.b64encode(file.getvalue()).decode(),
    'width': round(96 * width),
    'height': round(96 * height),
  }


def _labelled(named: Mapping[str, Run]) -> dict[str, Run]:
  """Names runs as legends have room for: by their methods, if these differ."""
  names = [str(run.config['method']) for run in named.values()]
  if len(set(names)) < len(names):
    names = list(named)
  labels = {}
  for number, (name, run) in enumerate(
    zip(names, named.values(), strict=True), start=1
  ):
    if len(name) > _LONGEST_LABEL:
      name = f'{number}: …{name[3 - _LONGEST_LABEL :]}'
    # matplotlib reads $ as mathematics, and leaves _names out of legends.
    space = ' ' * name.startswith('_')
    labels[space + name.replace('$', r'\$')] = run
  return labels


def _breakable(text: str) -> Markup:
  """Escapes a name; a narrow screen may break it after _ and /."""
  underscored = Markup('_<wbr>').join(text.split('_'))
  return underscored.replace('/', Markup('/<wbr>'))


def _hash(text: str) -> str:
  """What a Content-Security-Policy calls the only script, or style, it runs."""
  digest = hashlib.sha256(text.encode()).digest()
  return f'sha256-{base64.b64encode(digest).decode()}'


@contextlib.contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
  """Says every few seconds what is being done."""
  doing, done = '', threading.Event()

  def tell(what: str) -> None:
    nonlocal doing
    doing = what

  def speak() -> None:
    while not done.wait(_SECONDS_OF_SILENCE):
      print(f'report: {doing} ...', file=sys.stderr, flush=True)

  speaker = threading.Thread(target=speak, daemon=True)
  speaker.start()
  try:
    yield tell
  finally:
    done.set()
    speaker.join()


def _write(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  temporary = path.with_name(f'{path.name}.tmp')
  try:
    temporary.write_text(text, encoding='utf-8', errors='replace')
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m moe_jax.analysis.report',
    description='Makes one page, a single HTML file, of one or more runs.',
  )
  parser.add_argument('workdir', nargs='+', help='work directory of a run')
  parser.add_argument(
    '--out', default='report.html', metavar='FILE', help='default: report.html'
  )
  arguments = parser.parse_args(argv)
  out = pathlib.Path(arguments.out)
  try:
    if out.is_dir() or not out.parent.is_dir():
      raise ValueError(f'--out={out}: must be a file in an existing directory')
    runs = [Run(path) for path in arguments.workdir]
    with _telling() as tell:
      _write(out, report(runs, tell))
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(f'{out}: {out.stat().st_size / 1e6:.1f} MB')
  return 0


if __name__ == '__main__':
  sys.exit(main())
