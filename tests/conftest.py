"""Eight CPU devices for every test, arranged before jax is imported."""

import os

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
