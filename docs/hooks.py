"""What mkdocs calls while it builds the site."""

import html
import pathlib
import re

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_ROOT = pathlib.Path(__file__).parents[1]

# Kept with the results that it shows.
_PICTURE = _ROOT / 'experiments/results/study/max_violation.png'
_FORMULA = re.compile(
  r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the picture of the first page, which is kept with its data."""
  files.append(
    File.generated(config, 'max_violation.png', abs_src_path=str(_PICTURE))
  )
  return files


def on_page_content(content: str, **_) -> str:
  """Turns formulas from LaTeX into MathML, which browsers know by themselves.

  So pages need no script, of a network or bundled, to show them.
  """

  def to_mathml(match: re.Match[str]) -> str:
    tag, latex = match.groups()
    display = 'block' if tag == 'div' else 'inline'
    return convert(html.unescape(latex), display=display)

  return _FORMULA.sub(to_mathml, content)
