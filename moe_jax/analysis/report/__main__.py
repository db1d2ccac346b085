"""Makes one page of runs: results, figures, differences, configuration.

  python -m moe_jax.analysis.report WORKDIR... [--out=report.html] \\
      [--text=a.txt --text=b.txt]

The page is a single file that fetches nothing. Runs may be unfinished, and of
different configs. With texts, each of them a domain, it shows which experts
the checkpoints send them to: --text for each, its first 20,000 characters.

Exit codes: 0 done; 2 refused (bad input).
"""

from collections.abc import Sequence
import pathlib
import sys

from rich.console import Console

from moe_jax.analysis.command_line import Parser, answer, check_output
from moe_jax.analysis.report.page import render
from moe_jax.analysis.run import Run
from moe_jax.runs import files

_CHARACTERS = 20_000  # of a text


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  return answer(lambda: _answer(argv))


def _answer(argv: Sequence[str] | None) -> str:
  parser = Parser(description=__doc__)
  parser.add_argument('workdir', nargs='+')
  parser.add_argument('--out', default='report.html')
  parser.add_argument('--text', action='append', default=[])
  options = parser.parse_args(argv)
  out = pathlib.Path(options.out)
  check_output('out', str(out))
  runs = [Run(path) for path in options.workdir]
  with Console(stderr=True).status('report') as status:
    page = render(runs, _read(options.text), status.update)
  files.write(out, page.encode(errors='replace'))
  return f'{out}: {out.stat().st_size / 1e6:.1f} MB'


def _read(paths: Sequence[str]) -> dict[str, str]:
  """Returns the starts of texts, by the names of their files."""
  texts = {}
  for path in paths:
    name = pathlib.Path(path).stem
    if name in texts:
      raise ValueError(f'--text={path}: there is another text named {name}')
    try:
      text = pathlib.Path(path).read_text(encoding='utf-8')[:_CHARACTERS]
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(f'--text={path}: cannot be read: {error}') from error
    if not text:
      raise ValueError(f'--text={path}: is empty')
    texts[name] = text
  return texts


if __name__ == '__main__':
  sys.exit(main())
