"""Eight CPU devices for every test, arranged before jax is imported."""

import importlib.metadata
import os
import tempfile


def _add_flag(name, value):
  flags = os.environ.get('XLA_FLAGS', '')
  if name not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {name}={value}'


_add_flag('--xla_force_host_platform_device_count', 8)
if os.environ.get('JAX_DISABLE_MOST_OPTIMIZATIONS'):
  # The quick suite compiles in half the time without the newer emitters; later
  # versions of jax end at a flag that they do not know.
  _add_flag('--xla_cpu_parallel_codegen_split_count', 1)
  if importlib.metadata.version('jaxlib').startswith('0.10.'):
    _add_flag('--xla_cpu_use_fusion_emitters', 'false')
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
