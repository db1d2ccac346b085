"""Arguments that several benchmarks have."""

import argparse
from collections.abc import Callable
import re


def add_size(parser: argparse.ArgumentParser, default: str) -> None:
  """Adds --size, numbers of 1 or more such as the default's, 64x8."""
  parser.add_argument('--size', type=_size_like(default), default=default)


def add_sizes(
  parser: argparse.ArgumentParser, default: str, name: str = '--sizes'
) -> None:
  """Adds a list of sizes, separated by commas."""
  size = _size_like(default.partition(',')[0])
  parser.add_argument(
    name,
    type=lambda text: [size(part) for part in text.split(',')],
    default=default,
  )


def _size_like(example: str) -> Callable[[str], tuple[int, ...]]:
  more = example.count('x')

  def size(text: str) -> tuple[int, ...]:
    if not re.fullmatch(rf'[1-9]\d*(x[1-9]\d*){{{more}}}', text):
      raise argparse.ArgumentTypeError(f'{text!r}: must be like {example}')
    return tuple(map(int, text.split('x')))

  return size
