"""kth_largest is a sort's k-th largest, on any number of devices."""

import functools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.parallel import mesh as meshes

SHAPE = (8, 5)
# Few distinct values, so that most draws have ties. (No subnormals: XLA's CPU
# code flushes them to zero.)
VALUES = st.one_of(
  st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 3e38, -3e38]),
  st.floats(width=32, allow_subnormal=False),
)
MATRICES = arrays.arrays(np.float32, SHAPE, elements=VALUES)
MASKS = arrays.arrays(bool, SHAPE)


@functools.cache
def _compiled(axis):
  """k is traced: one program serves every rank."""
  return jax.jit(
    lambda x, k, where: routing.kth_largest(x, k, axis=axis, where=where)
  )


def _by_sorting(x, k, axis, where=True):
  """NaN and absent elements last, as -inf; -inf, too, beyond the last."""
  x = np.where(where & ~np.isnan(x), x, -np.inf).astype(np.float32)
  if k > x.shape[axis]:
    return np.full(np.delete(x.shape, axis), -np.inf, np.float32)
  return np.take(np.sort(x, axis), x.shape[axis] - k, axis)


def _assert_same_bits(actual, expected):
  assert actual.dtype == jnp.float32
  # Adding 0 turns -0.0 into 0.0, the one of the two that is returned.
  np.testing.assert_array_equal(
    np.asarray(actual).view(np.uint32), (expected + 0.0).view(np.uint32)
  )


@settings(deadline=None, max_examples=100)
@given(
  x=MATRICES,
  where=MASKS,
  k=st.integers(1, max(SHAPE) + 1),
  axis=st.sampled_from([0, 1, -1]),
)
def test_equals_sorting(x, where, k, axis):
  everywhere = np.ones(SHAPE, bool)
  _assert_same_bits(_compiled(axis)(x, k, everywhere), _by_sorting(x, k, axis))
  _assert_same_bits(
    _compiled(axis)(x, k, where), _by_sorting(x, k, axis, where)
  )


@settings(deadline=None, max_examples=25)
@given(x=MATRICES, k=st.integers(1, SHAPE[0]))
def test_bfloat16_is_selected_exactly(x, k):
  x = jnp.asarray(x).astype(jnp.bfloat16)
  _assert_same_bits(
    _compiled(0)(x, k, np.ones(SHAPE, bool)),
    _by_sorting(np.asarray(x.astype(jnp.float32)), k, 0),
  )


@pytest.mark.parametrize(
  ('x', 'k', 'expected'),
  [
    ([3, 1, 3, 2], 2, 3),
    ([3, 1, 3, 2], 3, 2),
    ([-0.0, 0.0, -1], 2, 0),
    ([np.inf, -np.inf, 5], 1, np.inf),
    ([np.nan, -np.inf, 5], 1, 5),
    ([np.nan, -3, 5], 2, -3),
    ([np.nan, -3, 5], 3, -np.inf),
    ([4, 2], 3, -np.inf),
  ],
)
def test_by_hand(x, k, expected):
  result = routing.kth_largest(jnp.array(x, jnp.float32), k, axis=0)
  assert result == expected
  assert not np.signbit(result) or expected < 0


def test_where_broadcasts_and_leaves_nothing():
  x = jnp.arange(6.0).reshape(3, 2)
  rows = jnp.array([True, False, True])[:, None]
  largest = functools.partial(routing.kth_largest, x, axis=0)
  np.testing.assert_array_equal(largest(2, where=rows), [0, 1])
  np.testing.assert_array_equal(largest(1, where=rows & False), [-np.inf] * 2)


@pytest.fixture(scope='module')
def tokens():
  """Scores with ties across shards, a mask, and a rank in the middle."""
  generator = np.random.default_rng(0)
  x = generator.normal(size=(64, 6)).astype(np.float32)
  x[:, 1] = np.round(x[:, 1])
  x[::3, 2] = -np.inf
  where = generator.random((64, 1)) < 0.8
  return x, where, 20


def test_sharding_leaves_every_bit(tokens, devices):
  x, where, k = tokens
  sharding = NamedSharding(
    meshes.make_mesh(devices=devices), P(meshes.AXES, None)
  )
  actual = _compiled(0)(
    jax.device_put(x, sharding), k, jax.device_put(where, sharding)
  )
  _assert_same_bits(actual, _by_sorting(x, k, 0, where))


def test_shard_map_leaves_every_bit(tokens, devices):
  """Over both axes of the mesh; the result is known to be replicated."""
  x, where, k = tokens
  mesh = meshes.make_mesh(-1, min(2, len(devices)), devices=devices)

  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(P(meshes.AXES), P(meshes.AXES)),
    out_specs=P(),
  )
  def select(x, where):
    return routing.kth_largest(x, k, axis=0, where=where, axis_name=meshes.AXES)

  _assert_same_bits(select(x, where), _by_sorting(x, k, 0, where))


def test_dual_iterations_do_not_depend_on_the_devices(tokens, devices):
  x, where, _ = tokens
  scores = jax.nn.softmax(jnp.where(jnp.isinf(x), 0.0, x) * 2)
  mask = jnp.asarray(where[:, 0])  # Shards have unequal numbers of tokens.
  mesh = meshes.make_mesh(devices=devices)
  solve = functools.partial(routing.dual_iterations, k=2, iterations=4)
  expected = jax.jit(solve)(scores, jnp.zeros(6), mask_T=mask)
  assert np.any(expected != 0)

  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(P(meshes.AXES), P(), P(meshes.AXES)),
    out_specs=P(),
  )
  def by_hand(scores, q, mask):
    return solve(scores, q, mask_T=mask, axis_name=meshes.AXES)

  np.testing.assert_array_equal(by_hand(scores, jnp.zeros(6), mask), expected)
  sharded = jax.device_put(scores, NamedSharding(mesh, meshes.BATCH))
  actual = jax.jit(solve)(sharded, jnp.zeros(6), mask_T=mask)
  np.testing.assert_array_equal(actual, expected)
