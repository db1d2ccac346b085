import pytest

from tests.train import tiny


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  return tiny.write_text(tmp_path_factory.mktemp('text'))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
