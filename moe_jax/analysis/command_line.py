"""What the programs of this folder share: options, refusals and tables."""

import argparse
from collections.abc import Callable, Iterable
import pathlib
import sys
from typing import Any, NoReturn

from moe_jax.analysis import markdown


class Parser(argparse.ArgumentParser):
  """Prints its description as help; refuses arguments in one line."""

  def format_help(self) -> str:
    """Returns the description, which is the docstring of a program."""
    return self.description

  def error(self, message: str) -> NoReturn:
    """Raises ValueError, where argparse prints the usage and exits."""
    raise ValueError(message)


def check_output(name: str, path: str) -> None:
  """Raises ValueError unless a file can be made there; '' is none."""
  file = pathlib.Path(path)
  if path and (file.is_dir() or not file.parent.is_dir()):
    raise ValueError(
      f'--{name}={path}: must be a file in an existing directory'
    )


def answer(program: Callable[[], str]) -> int:
  """Prints what a program returns, or in one line why it cannot.

  Returns:
    The exit code: 0 answered, 2 refused.
  """
  try:
    text = program()
  except (ValueError, OSError) as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
  print(text)
  return 0


def table(columns: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
  """Writes a table in Markdown; floats with four digits."""
  columns = list(columns)
  lines = [columns, ['---'] * len(columns), *rows]
  return markdown.rows(map(_cell, line) for line in lines)


def _cell(value: Any) -> str:
  return f'{value:.4g}' if isinstance(value, float) else str(value)
