"""Puts the report page together."""

import base64
from collections.abc import Callable
from collections.abc import Sequence
import datetime
import hashlib

import jinja2
from markupsafe import Markup

from moe_jax.analysis.report import tables
from moe_jax.analysis.report.gathered import gather
from moe_jax.analysis.report.gathered import notes
from moe_jax.analysis.report.pictures import draw_all
from moe_jax.analysis.run import Run


def render(
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
  gathered = gather(runs, tell)
  pictures = draw_all(gathered.named, tell)
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('moe_jax.analysis.report'),
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
    title=f'{len(runs)} runs' if len(runs) > 1 else next(iter(gathered.named)),
    made=datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
    script=script,
    script_hash=_hash(script),
    style=style,
    style_hash=_hash(style),
    pictures=pictures,
    several=len(runs) > 1,
    notes=notes(gathered),
    sections=tables.sections(gathered),
    shared=tables.shared(gathered),
  )


def _breakable(text: str) -> Markup:
  """Escapes a name; a narrow screen may break it after _ and /."""
  underscored = Markup('_<wbr>').join(text.split('_'))
  return underscored.replace('/', Markup('/<wbr>'))


def _hash(text: str) -> str:
  """What a Content-Security-Policy calls the only script, or style, it runs."""
  digest = hashlib.sha256(text.encode()).digest()
  return f'sha256-{base64.b64encode(digest).decode()}'
