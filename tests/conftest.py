"""Eight CPU devices for every test, arranged before jax is imported."""

import os
import tempfile

_COUNT = '--xla_force_host_platform_device_count'
if _COUNT not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_COUNT}=8'
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope='module', params=[1, 2, 4, 8], ids='{}devices'.format)
def devices(request):
  """The first 1, 2, 4 and 8 devices."""
  return jax.devices()[: request.param]


@pytest.fixture(scope='session', autouse=True)
def temporary_files(tmp_path_factory):
  """Keeps what libraries leave behind in a directory that pytest removes.

  TFDS leaves an empty directory for each builder whose data are not there.
  """
  folder = str(tmp_path_factory.mktemp('temporary'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TMPDIR', folder)  # For child processes.
    patch.setattr(tempfile, 'tempdir', folder)
    yield folder
