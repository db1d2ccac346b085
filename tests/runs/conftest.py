import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import pytest

from moe_jax.runs import files
from tests.train import tiny


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  return tiny.write_text(tmp_path_factory.mktemp('text'))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


class Bucket(MemoryFileSystem):
  """Stands in for gcsfs."""

  protocol = ('gcs', 'gs')
  store, pseudo_dirs = {}, ['']

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.removeprefix('gs://'))


@pytest.fixture
def bucket():
  """A work directory in a bucket that is kept in memory."""
  for name in Bucket.protocol:
    fsspec.register_implementation(name, Bucket, clobber=True)
  Bucket.store.clear()
  return files.open_workdir('gs://bucket/run')
