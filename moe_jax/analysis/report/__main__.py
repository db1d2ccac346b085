"""Makes one page of runs: results, figures, differences, configuration.

  python -m moe_jax.analysis.report WORKDIR... [--out=report.html]

The page is a single file that fetches nothing. Runs may be unfinished, and of
different configs.
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys

from rich.console import Console

from moe_jax.analysis.report.page import render
from moe_jax.analysis.run import Run
from moe_jax.runs import files


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
    with Console(stderr=True).status('report') as status:
      page = render(runs, status.update)
    files.write(out, page.encode(errors='replace'))
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(f'{out}: {out.stat().st_size / 1e6:.1f} MB')
  return 0


if __name__ == '__main__':
  sys.exit(main())
