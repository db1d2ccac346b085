"""Arguments of the benchmarks, which themselves are not run by tests."""

import argparse

import pytest

from experiments.benchmarks import arguments


def test_sizes_are_as_many_numbers_as_the_default_has(capsys):
  parser = argparse.ArgumentParser()
  arguments.add_size(parser, '64x8')
  arguments.add_sizes(parser, '512x16x4,512x64x8')
  found = parser.parse_args(['--size=16x2'])
  assert found.size == (16, 2)
  assert found.sizes == [(512, 16, 4), (512, 64, 8)]
  for wrong in ('--size=16', '--size=16x2x1', '--size=0x2', '--sizes=1x2x3,'):
    with pytest.raises(SystemExit):
      parser.parse_args([wrong])
    assert 'must be like' in capsys.readouterr().err
