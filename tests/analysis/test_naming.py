"""Names tell runs apart and are fit to be shown."""

import pytest

from moe_jax.analysis.naming import name_paths


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
  assert name_paths(paths) == names


def test_one_path_twice():
  with pytest.raises(ValueError, match='the same work directory twice: a, a/'):
    name_paths(['a', 'a/', 'b'])


def test_names_that_look_the_same():
  with pytest.raises(ValueError, match='twice'):
    name_paths(['a\x1b', 'a\x1c'])
