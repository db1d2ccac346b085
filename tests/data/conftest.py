import pytest

from moe_jax import data


@pytest.fixture(scope='session')
def sotu_config(tmp_path_factory):
  return data.DataConfig(cache_dir=str(tmp_path_factory.mktemp('sotu')))


@pytest.fixture(scope='session')
def sotu(sotu_config):
  """The default data, prepared once for all tests."""
  return data.load_text(sotu_config)
