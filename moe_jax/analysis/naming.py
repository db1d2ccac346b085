"""Names of runs, from the paths of their work directories."""

from collections.abc import Sequence
import os
import pathlib


def name_paths(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
  """Names paths by as much of their ends as tells them apart.

  Returns:
    One printable line each: not every file name is one.

  Raises:
    ValueError: a path is there twice, or two differ in what cannot be shown.
  """
  parts = [
    pathlib.PurePath(''.join(c if c.isprintable() else '?' for c in path)).parts
    for path in map(os.fspath, paths)
  ]
  if len(set(parts)) < len(parts):
    raise ValueError(
      f'the same work directory twice: {", ".join(map(os.fspath, paths))}'
    )
  ends = 1
  while len({part[-ends:] for part in parts}) < len(parts):
    ends += 1
  return ['/'.join(part[-ends:]) for part in parts]
