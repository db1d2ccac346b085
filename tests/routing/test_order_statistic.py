"""kth_largest is a sort's k-th largest, on any number of devices."""

import functools
import re

from hypothesis import given, settings
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
from moe_jax.routing import order_statistic

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
def _compiled(axis, bits_per_pass=1):
  """k is traced: one program serves every rank."""
  return jax.jit(
    lambda x, k, where: routing.kth_largest(
      x, k, axis=axis, where=where, bits_per_pass=bits_per_pass
    )
  )


@functools.cache
def _compiled_pair(axis, bits_per_pass=1):
  return jax.jit(
    lambda x, k, where: order_statistic.kth_and_next_largest(
      x, k, axis=axis, where=where, bits_per_pass=bits_per_pass
    )
  )


def _by_sorting(x, k, axis, where=True):
  """NaN and absent elements last, as -inf; beyond the last -inf as well."""
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


@settings(deadline=None, max_examples=50)
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


@pytest.mark.parametrize('bits_per_pass', [1, 8])
@settings(deadline=None, max_examples=50)
@given(
  x=MATRICES,
  where=MASKS,
  k=st.integers(1, max(SHAPE) + 1),
  axis=st.sampled_from([0, 1]),
)
def test_pair_equals_sorting(bits_per_pass, x, where, k, axis):
  kth, following = _compiled_pair(axis, bits_per_pass)(x, k, where)
  _assert_same_bits(kth, _by_sorting(x, k, axis, where))
  _assert_same_bits(following, _by_sorting(x, k + 1, axis, where))


@pytest.mark.parametrize('bits_per_pass', [2, 4, 8])
@settings(deadline=None, max_examples=25)
@given(x=MATRICES, where=MASKS, k=st.integers(1, SHAPE[0] + 1))
def test_several_bits_a_pass_equal_sorting(bits_per_pass, x, where, k):
  _assert_same_bits(
    _compiled(0, bits_per_pass)(x, k, where), _by_sorting(x, k, 0, where)
  )


@settings(deadline=None, max_examples=50)
@given(x=MATRICES, k=st.integers(1, SHAPE[1] - 1))
def test_pair_of_a_row_equals_sorting(x, k):
  pair = jax.jit(order_statistic.kth_and_next_of_row, static_argnums=1)(x, k)
  for i, actual in enumerate(pair):
    _assert_same_bits(actual, _by_sorting(x, k + i, 1))


@settings(deadline=None, max_examples=50)
@given(x=MATRICES, k=st.integers(1, SHAPE[1]))
def test_top_k_is_that_of_lax(x, k):
  x = np.where(np.isnan(x) | (x == 0), 0, x)
  actual = jax.jit(order_statistic.top_k, static_argnums=1)(x, k)
  expected = jax.lax.top_k(x, k)[1]
  assert actual.dtype == jnp.int32
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.long
def test_one_device_selects_the_same(monkeypatch):
  """There, long axes are split and tokens taken in blocks."""
  x = np.random.default_rng(0).integers(-9, 9, (96, 16)).astype(np.float32)
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  monkeypatch.setattr(order_statistic, '_BLOCK', 3)  # 48 tokens in top_k
  for axis, k in [(0, 1), (0, 40), (0, 96), (1, 5)]:
    pair = order_statistic.kth_and_next_largest(x, k, axis=axis)
    for i, actual in enumerate(pair):
      _assert_same_bits(actual, _by_sorting(x, k + i, axis))
  minus = np.arange(16, dtype=np.float32)
  pair = order_statistic.kth_and_next_of_row(x, 4, minus_E=minus)
  for i, actual in enumerate(pair):
    _assert_same_bits(actual, _by_sorting(x - minus, 4 + i, 1))
  np.testing.assert_array_equal(
    order_statistic.top_k(x, 5), jax.lax.top_k(x, 5)[1]
  )


def test_bits_per_pass_is_checked():
  with pytest.raises(ValueError, match='bits_per_pass=3'):
    routing.kth_largest(jnp.ones(4), 1, axis=0, bits_per_pass=3)


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


def _all_reduces(program):
  """Counts the numbers of each all-reduce a program executes."""
  trips = {
    body: int(n)
    for body, n in re.findall(
      r'body=%?([\w.\-]+).*"known_trip_count":\{"n":"(\d+)"', program
    )
  }
  executed = []
  for computation in re.split(r'\n(?=%|ENTRY)', program):
    name = re.match(r'%?([\w.\-]+)', computation)[1]
    for types in re.findall(r'= (.*) all-reduce(?:-start)?\(', computation):
      sizes = [
        np.prod([int(n) for n in dims.split(',') if n], dtype=int)
        for dims in re.findall(r'\[([\d,]*)\]', types)
      ]
      executed += [sum(sizes)] * trips.get(name, 1)
  return executed


@pytest.mark.parametrize('bits_per_pass', [1, 2, 4, 8])
def test_number_of_all_reduces(tokens, bits_per_pass):
  x, where, k = tokens
  mesh = meshes.make_mesh()
  counts = 256 if bits_per_pass == 8 else 2**bits_per_pass - 1
  expected = [x.shape[1] * counts] * (32 // bits_per_pass)

  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(P(meshes.AXES), P(meshes.AXES)),
    out_specs=P(),
  )
  def by_hand(x, where):
    return routing.kth_largest(
      x,
      k,
      axis=0,
      where=where,
      axis_name=meshes.AXES,
      bits_per_pass=bits_per_pass,
    )

  program = by_hand.lower(x, where).compile().as_text()
  assert _all_reduces(program) == expected
  sharding = NamedSharding(mesh, P(meshes.AXES, None))
  program = (
    _compiled(0, bits_per_pass)
    .lower(*jax.device_put((x, k, where), (sharding, None, sharding)))
    .compile()
    .as_text()
  )
  assert _all_reduces(program) == expected


def test_nothing_is_gathered(tokens):
  """Neither a solve nor a choice moves a sharded score."""
  x, _, _ = tokens
  sharded = jax.device_put(x, NamedSharding(meshes.make_mesh(), meshes.BATCH))

  @jax.jit
  def route(scores, mask):
    q = routing.dual_iterations(
      scores, jnp.zeros(6), k=2, iterations=2, cutoff='midpoint', mask_T=mask
    )
    return q, routing.choose(scores, q, k=2, mask_T=mask)

  mask = jax.device_put(x[:, 0] > -1, sharded.sharding)
  program = route.lower(sharded, mask).compile().as_text()
  assert 'all-reduce' in program
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in program


@pytest.mark.parametrize('bits_per_pass', [4, 8])
def test_shard_map_leaves_every_bit(tokens, devices, bits_per_pass):
  """Over both axes of the mesh; the result is known to be replicated."""
  x, where, k = tokens
  mesh = meshes.make_mesh(-1, min(2, len(devices)), devices=devices)

  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(P(meshes.AXES), P(meshes.AXES)),
    out_specs=(P(), P()),
  )
  def select(x, where):
    return order_statistic.kth_and_next_largest(
      x,
      k,
      axis=0,
      where=where,
      axis_name=meshes.AXES,
      bits_per_pass=bits_per_pass,
    )

  for i, actual in enumerate(select(x, where)):
    _assert_same_bits(actual, _by_sorting(x, k + i, 0, where))


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


def test_subnormal_numbers_count_as_zero_on_cpu():
  """XLA's CPU code flushes them; 1.2e-38 is nearly the least normal one."""
  x = np.float32([1e-40, -1e-40, 5e-39, 0.0, 1.2e-38, -1.0])[:, None]
  found = [
    float(_compiled(0)(x, k, np.ones_like(x, bool))[0]) for k in range(1, 7)
  ]
  assert found == [np.float32(1.2e-38), 0, 0, 0, 0, -1]
  assert routing.kth_largest(x, 2, axis=0) == 0
