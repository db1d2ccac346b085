"""Grouped products against einsum, on one device and on meshes."""

import functools
import importlib.metadata
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from moe_jax.parallel import grouped_matmul_gpu
from moe_jax.parallel.grouped_matmul import (
  TILE,
  check_compiler,
  grouped_matmul,
)

ROWS, D, F, E = 600, 3, 4, 5
LOADS = [
  [0, 0, 0, 0, 0],
  [0, 0, 600, 0, 0],
  [300, 0, 0, 300, 0],
  [257, 1, 0, 31, 33],
]


def _einsum(rows, weights, load):
  group = jnp.searchsorted(jnp.cumsum(load), jnp.arange(len(rows)), 'right')
  group = jnp.minimum(group, len(weights) - 1)
  return jnp.einsum('nd,ndf->nf', rows, weights[group])


@functools.cache
def _operands(d=D, f=F, dtype='float32'):
  generator = np.random.default_rng(1)
  return tuple(
    jnp.asarray(generator.normal(size=shape), dtype)
    for shape in [(ROWS + TILE, d), (E, d, f), (ROWS + TILE, f)]
  )


def _zero_spare(load, *arrays):
  used = jnp.arange(ROWS + TILE) < load.sum()
  return [jnp.where(used[:, None], x, 0) for x in arrays]


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(product, load, rows, weights, cotangent):
  rows, cotangent = _zero_spare(load, rows, cotangent)
  y, pullback = jax.vjp(lambda r, w: product(r, w, load), rows, weights)
  return y, *pullback(cotangent)


def _assert_close(actual, expected, tolerance):
  for a, b in zip(actual, expected, strict=True):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, atol=tolerance * np.max(np.abs(b)))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, ROWS), min_size=E, max_size=E))
@example(LOADS[0])
@example(LOADS[1])
@example(LOADS[2])
@example(LOADS[3])
@example([16, 17, 48, 49, 96])
@example([32, 64, 256, 0, 248])
@example([1, 1, 1, 1, 1])
def test_equals_einsum(load):
  total = sum(load)
  if total > ROWS:  # Scales the loads down to what there is.
    load = [part * ROWS // total for part in load]
  load = jnp.array(load, jnp.int32)
  actual = _value_and_gradients(grouped_matmul, load, *_operands())
  expected = _value_and_gradients(_einsum, load, *_operands())
  _assert_close(actual, expected, 1e-5)
  y, drows, _ = actual
  np.testing.assert_array_equal(y[load.sum() :], 0)
  np.testing.assert_array_equal(drows[load.sum() :], 0)


def test_by_hand():
  rows = jnp.zeros((TILE + 3, 1)).at[:3, 0].set(jnp.array([1.0, 2, 3]))
  weights = jnp.array([10.0, 100, 1000])[:, None, None]
  y = grouped_matmul(rows, weights, jnp.array([2, 0, 1]))
  np.testing.assert_array_equal(y[:4, 0], [10, 20, 3000, 0])


@pytest.mark.parametrize('load', LOADS)
def test_bfloat16_is_the_rounded_float32(load):
  """Sums are of float32: only the result is rounded, to 8 bits."""
  load, half = jnp.array(load, jnp.int32), _operands(dtype='bfloat16')
  full = [x.astype(jnp.float32) for x in half]
  actual = _value_and_gradients(grouped_matmul, load, *half)
  expected = _value_and_gradients(grouped_matmul, load, *full)
  for a, b in zip(actual, expected, strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


def test_bfloat16_is_not_converted_in_the_loop():
  """On CPU, that took most of the time: of all rows, for each tile."""
  operands = *_operands(dtype='bfloat16')[:2], jnp.array(LOADS[3])
  program = jax.jit(grouped_matmul).lower(*operands).compile().as_text()
  loops = [line for line in program.splitlines() if ' while(' in line]
  assert loops and not any('bf16' in line for line in loops)


# GPU: the kernels, emulated, on widths that are no multiples of their blocks.


@pytest.fixture(scope='module')
def kernels():
  matmul, outer = (
    functools.partial(kernel, interpret=True)
    for kernel in (grouped_matmul_gpu.matmul, grouped_matmul_gpu.outer)
  )
  return jax.jit(matmul, static_argnames='contract'), jax.jit(outer)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('load', LOADS)
def test_gpu_kernels_equal_einsum(kernels, load, dtype):
  matmul, outer = kernels
  load = jnp.array(load, jnp.int32)
  rows, weights, cotangent = _operands(70, 140, dtype)
  rows, cotangent = _zero_spare(load, rows, cotangent)
  actual = (
    matmul(rows, weights, load, contract=0),
    matmul(cotangent, weights, load, contract=1),
    outer(rows, cotangent, load),
  )
  assert all(x.dtype == dtype for x in actual)
  full = [x.astype(jnp.float32) for x in (rows, weights, cotangent)]
  expected = _value_and_gradients(_einsum, load, *full)
  _assert_close(actual, expected, 1e-5 if dtype == 'float32' else 2**-8)


def test_gpu_kernel_ignores_what_is_in_spare_rows(kernels):
  rows, weights, _ = _operands(70, 140)
  load = jnp.array(LOADS[3], jnp.int32)
  rows = rows.at[load.sum() :].set(jnp.nan)
  y = kernels[0](rows, weights, load, contract=0)
  np.testing.assert_array_equal(y[load.sum() :], 0)
  assert np.all(np.isfinite(y))


# Meshes


MESH = (4, 2), ('data', 'expert'), (AxisType.Auto,) * 2


def _sharded(mesh, cast_first=False):
  """The summed sine of products on 8 devices, and its gradients."""
  both = P(('data', 'expert'))

  def local(rows, weights, load):
    if cast_first:
      weights = lax.pcast(weights, ('data',), to='varying')
    return jnp.sin(grouped_matmul(rows, weights, load))

  product = jax.shard_map(
    local, mesh=mesh, in_specs=(both, P('expert'), both), out_specs=both
  )
  return jax.value_and_grad(lambda *x: product(*x).sum(), argnums=(0, 1))


def _sharded_operands():
  """Two experts a device; rows of device i are of experts 2 (i % 2) and +1."""
  generator = np.random.default_rng(2)
  load = generator.multinomial(40, [0.25, 0.25], size=8).astype(np.int32)
  load[3] = 0
  rows = generator.normal(size=(8, 40 + TILE, D)).astype(np.float32)
  rows *= (np.arange(40 + TILE) < load.sum(axis=1)[:, None])[..., None]
  weights = generator.normal(size=(4, D, F)).astype(np.float32)
  return rows, weights, load


@pytest.mark.parametrize('cast_first', [False, True])
def test_in_shard_map_gradients_are_summed_over_replicas(cast_first):
  rows, weights, load = _sharded_operands()
  flat = rows.reshape(-1, D), weights, load.reshape(-1)

  def expected(rows, weights):
    total = 0.0
    for i in range(8):
      local = weights[2 * (i % 2) :][:2]
      y = _einsum(rows[i], local, load[i])
      total += jnp.sin(y[: load[i].sum()]).sum()
    return total

  mesh = jax.make_mesh(*MESH)
  value, (drows, dweights) = jax.jit(_sharded(mesh, cast_first))(*flat)
  expected = jax.value_and_grad(expected, argnums=(0, 1))(rows, weights)
  drows = drows.reshape(rows.shape)
  spare = np.arange(40 + TILE) >= load.sum(axis=1)[:, None]
  drows = jnp.where(spare[..., None], 0, drows)  # sine: not 0 there
  _assert_close((value, drows, dweights), (expected[0], *expected[1]), 1e-5)


# Other backends: what the program for them consists of.


@pytest.mark.parametrize(
  ('platform', 'ragged_dots', 'kernels'),
  [('cpu', 0, 0), ('cuda', 0, 3), ('rocm', 3, 0), ('tpu', 3, 0)],
)
def test_what_computes_on_each_platform(platform, ragged_dots, kernels):
  flat = [x.reshape(-1, *x.shape[2:]) for x in _sharded_operands()]
  flat[1] = _sharded_operands()[1]
  # jax 0.12 makes a kernel for one kind of GPU.
  gpu = AbstractDevice('NVIDIA H100', num_cores=132, platform='gpu')
  mesh = AbstractMesh(*MESH, abstract_device=gpu)
  traced = jax.jit(_sharded(mesh)).trace(*flat)
  program = traced.lower(lowering_platforms=(platform,)).as_text()
  assert program.count('"chlo.ragged_dot"(') == ragged_dots
  assert program.count('@__gpu$xla.gpu.triton') == kernels


@pytest.mark.parametrize(
  ('rows', 'width', 'hidden', 'forward', 'gradients'),
  [
    (1000, 512, 1408, '128,512,1408', {'128,1408,512', '128,512,1408'}),
    (1024, 4096, 1536, '128,4096,512', {'128,1536,1024', '128,1024,768'}),
    # Rows are too long for a tile: the forward pass is as the compiler likes.
    (1024, 2**15, 128, None, {'128,128,8192', '128,8192,128'}),
  ],
)
def test_tiles_on_tpu(rows, width, hidden, forward, gradients):
  """By hand: even parts of at most 2**21 weights, 2**20 sums, 8192 a side."""

  def tilings(function):
    operands = [
      jax.ShapeDtypeStruct(shape, jnp.bfloat16)
      for shape in [(rows, width), (2, width, hidden), (rows, hidden)]
    ]
    load = jax.ShapeDtypeStruct((2,), jnp.int32)
    traced = jax.jit(function).trace(*operands, load)
    program = traced.lower(lowering_platforms=('tpu',)).as_text()
    dots = re.findall(r'"chlo.ragged_dot".* : \(tensor<(\d+)x', program)
    assert dots and all(int(count) % 128 == 0 for count in dots)
    return set(re.findall(r'ragged_dot_tiling = "([\d,]+)"', program))

  def backward(rows, weights, dy, load):
    _, pullback = jax.vjp(
      lambda r, w: grouped_matmul(r, w, load), rows, weights
    )
    return pullback(dy)

  forward = {forward} - {None}
  assert tilings(lambda r, w, dy, load: grouped_matmul(r, w, load)) == forward
  assert tilings(backward) == gradients


@pytest.mark.parametrize('version', ['0.0.42.1', None])
def test_gradients_are_refused_where_they_would_be_dense(version, monkeypatch):
  def installed(package):
    if version is None:
      raise importlib.metadata.PackageNotFoundError(package)
    return version

  monkeypatch.setattr(importlib.metadata, 'version', installed)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  load = jnp.array(LOADS[3], jnp.int32)
  rows, weights, _ = _operands()
  jax.eval_shape(grouped_matmul, rows, weights, load)

  def total(weights):
    return jnp.sum(grouped_matmul(rows, weights, load))

  message = f'libtpu {version or "of unknown version"}: .* take Python 3.12'
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(jax.grad(total), weights)


def test_other_compilers_are_not_refused(monkeypatch):
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.0.50.1')
  for platform in ('cpu', 'gpu', 'tpu'):
    check_compiler(platform)
