import pytest

from moe_jax.runs import files
from tests import buckets
from tests.train import tiny


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  return tiny.write_text(tmp_path_factory.mktemp('text'))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def bucket():
  """A work directory in a bucket that is kept in memory."""
  buckets.empty()
  return files.open_workdir('gs://bucket/run')
