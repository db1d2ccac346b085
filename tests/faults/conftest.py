import os

import pytest

from tests.faults import harness
from tests.train import tiny


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  return tiny.write_text(tmp_path_factory.mktemp('text'))


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
  """Compiled programs, of all workers."""
  base = tmp_path_factory.getbasetemp()
  return (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'xdg'


@pytest.fixture
def trial(tmp_path, text, cache):
  """Makes commands, each with a directory of its own."""

  def make(name='trial', method='bip', prefix=(), workdir=None, **options):
    place = tmp_path / name
    return harness.Trial(place, text, cache, method, options, prefix, workdir)

  return make
