"""Names tell runs apart and are fit to be shown."""

import pytest

from moe_jax.analysis import Run
from moe_jax.analysis.results import name_runs


@pytest.mark.parametrize(
  ('paths', 'names'),
  [
    (['runs/x'], ['x']),
    (['runs/x/', '/tmp/y'], ['x', 'y']),
    (['/a/x', '/b/x', '/b/y'], ['a/x', 'b/x', 'b/y']),
    (['/c/a/x', '/d/a/x'], ['c/a/x', 'd/a/x']),
    (['gs://bucket/x', 'y'], ['x', 'y']),
    (['a\x1b[2J\nb\udcff'], ['a?[2J?b?']),
  ],
)
def test_names(paths, names):
  runs = [Run(path) for path in paths]
  assert name_runs(runs) == dict(zip(names, runs, strict=True))


def test_one_path_twice():
  with pytest.raises(ValueError, match='the same work directory twice: .*/a, '):
    name_runs([Run(path) for path in ('a', 'a/', 'b')])


def test_names_that_look_the_same():
  with pytest.raises(ValueError, match='twice'):
    name_runs([Run(path) for path in ('a\x1b', 'a\x1c')])
