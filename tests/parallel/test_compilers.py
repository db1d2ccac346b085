"""Options of the compilers: those that a slice can have."""

import jax
import pytest

from moe_jax.parallel.compilers import compiler_options, refusal_explained
from tests.parallel.test_mesh import gpus, pod

ASYNCHRONOUS = 'xla_tpu_enable_async_all_to_all'


@pytest.mark.parametrize(
  ('kind', 'sides', 'possible'),
  [
    ('TPU v5 lite', (4, 4), True),
    ('TPU v5 lite', (8, 8), True),
    # libtpu 0.0.50.1: 'not supported on limited ICI'.
    ('TPU v5 lite', (8, 16), False),
    ('TPU v5 lite', (16, 16), False),
    ('TPU v6 lite', (16, 16), True),
    ('TPU v5', (8, 8, 8), True),
  ],
)
def test_exchanges_are_asynchronous_where_they_can(kind, sides, possible):
  assert (ASYNCHRONOUS in compiler_options(pod(kind, sides))) == possible


def test_each_platform_has_its_own():
  assert compiler_options(jax.devices('cpu')) == {
    'xla_backend_optimization_level': 1
  }
  assert all(name.startswith('xla_gpu') for name in compiler_options(gpus(1)))


@pytest.mark.parametrize('kind', ['TPU v5 lite', 'TPU v6 lite', 'TPU v5'])
def test_tiles_of_products_are_larger_on_v6e(kind):
  larger = 'xla_tpu_scoped_vmem_limit_kib' in compiler_options(
    pod(kind, (4, 4))
  )
  assert larger == (kind == 'TPU v6 lite')


def test_a_refusal_over_several_slices_is_explained():
  """By libtpu 0.0.50.1: tests/launch/test_plan.py needs bfloat16 there."""
  reason = 'UNIMPLEMENTED: AllReduceScatterFusion not implemented for 2nd-minor'
  with pytest.raises(ValueError, match='^model.dtype=float32: .*bfloat16'):
    with refusal_explained():
      raise jax.errors.JaxRuntimeError(reason)
