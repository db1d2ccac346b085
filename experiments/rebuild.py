"""Writes tables and figures again from stored runs; trains nothing.

  python -m experiments.rebuild experiments/results/first/*

Each directory holds runs as METHOD_seed_SEED, and of each at least its
config.json, run.json and metrics.jsonl. The table, numbers and figures that
`experiments.compare` writes go into the same directory.
"""

from collections.abc import Sequence
import pathlib
import sys

from experiments import compare
from moe_jax import analysis
from moe_jax.config import METHODS


def rebuild(directory: pathlib.Path) -> str:
  """Writes table and figures of the runs in `directory`; returns the table.

  Raises:
    ValueError: there is no run, or runs are not comparable.
  """
  runs = {
    method: [analysis.Run(path) for path in paths]
    for method in METHODS
    if (paths := sorted(directory.glob(f'{method}_seed_*')))
  }
  if not runs:
    raise ValueError(f'{directory}: has no run METHOD_seed_SEED')
  return compare.write(runs, directory)


def main(argv: Sequence[str]) -> int:
  """Runs the program; returns its exit code."""
  directories = [pathlib.Path(argument) for argument in argv[1:]]
  if not directories or {'--help', '-h'} & set(argv):
    print(__doc__)
    return 0 if directories else 2
  try:
    for directory in directories:
      rebuild(directory)
      print(f'{directory}: comparison.md, comparison.json and figures written')
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
