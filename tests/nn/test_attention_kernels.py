"""Attention's kernels: where each is taken, and that it attends as blocks do.

cuDNN's cannot run here; that of TPUs is interpreted. What the chips' compilers
make of both: tests/launch/test_compiled.py.
"""

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from moe_jax import jax_privates
from moe_jax.nn import attention, attention_kernels
from moe_jax.parallel import mesh as meshes

BATCH, SEQUENCE = 4, 384  # Three blocks of 128.


@dataclasses.dataclass(frozen=True)
class Device:
  """One that only describes itself."""

  platform: str
  id: int
  compute_capability: str
  device_kind: str = ''
  num_cores: int | None = None
  process_index: int = 0


@pytest.fixture
def device(monkeypatch):
  """Returns a function that makes a mesh of devices that are not here."""

  def make(platform, count=1, capability='9.0'):
    array = np.empty((1, count), object)
    array[0] = [Device(platform, i, capability) for i in range(count)]
    return jax.sharding.Mesh(array, meshes.AXES)

  monkeypatch.setattr(jax_privates, 'has_cudnn', lambda: True)
  return make


@pytest.mark.parametrize(
  ('name', 'dtype', 'sequence', 'width', 'documents', 'kernel'),
  [
    ('cpu', 'bfloat16', 256, 64, False, None),
    ('gpu', 'bfloat16', 250, 64, False, '_cudnn'),
    ('gpu', 'float16', 256, 128, False, '_cudnn'),
    ('gpu', 'float32', 256, 64, False, None),
    ('gpu', 'bfloat16', 256, 64, True, None),
    ('gpu', 'bfloat16', 256, 192, False, None),
    ('gpu', 'bfloat16', 256, 60, False, None),
    ('tpu', 'bfloat16', 128, 192, True, '_splash'),
    ('tpu', 'float32', 384, 24, False, '_splash'),
    ('tpu', 'bfloat16', 100, 64, False, None),
  ],
)
def test_which_kernel(device, name, dtype, sequence, width, documents, kernel):
  query = jax.ShapeDtypeStruct((2, sequence, 4, width), dtype)
  found = attention_kernels.find(query, documents=documents, mesh=device(name))
  assert (found and found.__name__) == kernel


@pytest.mark.parametrize('capability', ['7.5', 'gfx942'])
def test_other_gpus_have_none(device, capability):
  query = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
  mesh = device('gpu', capability=capability)
  assert not attention_kernels.find(query, documents=False, mesh=mesh)


def test_without_cudnn_there_is_none(device, monkeypatch):
  query = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
  monkeypatch.setattr(jax_privates, 'has_cudnn', lambda: False)
  assert not attention_kernels.find(query, documents=False, mesh=device('gpu'))


def test_nor_where_nothing_says_how_a_batch_is_split(device):
  query = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
  find = functools.partial(attention_kernels.find, query, documents=False)
  mesh = device('tpu', 4)
  for unknown in (None, mesh.abstract_mesh, mesh):  # 2 sequences, 4 devices.
    assert not find(mesh=unknown)
  assert find(mesh=device('tpu', 2))


def operands(documents):
  random = np.random.default_rng(0)

  def heads(count):
    shape = BATCH, SEQUENCE, count, 16
    return random.normal(size=shape).astype(np.float32)

  positions = None
  if documents:
    place_S = np.arange(SEQUENCE)
    starts_Bx2 = random.integers(1, SEQUENCE, (BATCH, 2))
    started_Bx2xS = np.where(
      place_S >= starts_Bx2[..., None], starts_Bx2[..., None], 0
    )
    positions = np.int32(place_S - started_Bx2xS.max(axis=1))
  return heads(4), heads(2), heads(2), positions


def outputs_and_gradients(attend, arrays):
  *arrays, positions = arrays

  def loss(*arrays):
    y = attend(*arrays, positions)
    # Not alike in all outputs.
    weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return jnp.sum(weight * y), y

  run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
  (_, y), gradients = jax.jit(run)(*arrays)
  return jax.device_get((y, gradients))


def assert_alike(actual, expected):
  compare = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4)
  jax.tree.map(compare, actual, expected)


SPLASH = functools.partial(attention_kernels._splash, interpret=True)


@pytest.mark.parametrize('documents', [False, True])
def test_splash_attends_as_blocks_do(documents):
  arrays = operands(documents)
  actual = outputs_and_gradients(functools.partial(SPLASH, scale=0.3), arrays)
  blocks = functools.partial(attention.attend, scale=0.3)
  assert_alike(actual, outputs_and_gradients(blocks, arrays))


@pytest.mark.parametrize('documents', [False, True])
@pytest.mark.parametrize('inside', [False, True])
def test_splash_on_a_mesh(monkeypatch, inside, documents):
  """In a shard_map of the caller's, as in training, or in one of its own."""
  arrays = operands(documents)
  mesh = meshes.make_mesh(2, 2, devices=jax.devices()[:4])
  own = functools.partial(attention_kernels._on_each_device, SPLASH, mesh)
  attend = functools.partial(SPLASH if inside else own, scale=0.25)

  def layers(query, *rest):
    layer = jax.checkpoint(lambda x, _: (attend(x, *rest), None))
    return lax.scan(layer, query, length=2)[0]

  def twice(query, *rest):
    return attention.attend(attention.attend(query, *rest), *rest)

  on_mesh = layers
  if inside:
    on_mesh = jax.shard_map(
      layers, mesh=mesh, in_specs=P(meshes.AXES), out_specs=P(meshes.AXES)
    )
  actual = outputs_and_gradients(on_mesh, arrays)
  assert_alike(actual, outputs_and_gradients(twice, arrays))


@pytest.mark.parametrize('width', [64, 128])
def test_cudnn_is_asked_for_causal_attention(monkeypatch, width):
  monkeypatch.setattr(
    jax_privates.fused_attention_stablehlo, 'check_cudnn_version', lambda: 91002
  )
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  query, key = shape((2, 64, 4, width)), shape((2, 64, 2, width))

  def loss(*arrays):
    y = attention_kernels._cudnn(*arrays, None, scale=0.25)
    return jnp.sum(y.astype(jnp.float32))

  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert '__cudnn$fmhaSoftmax(' in text
  assert '__cudnn$fmhaSoftmaxBackward(' in text
  assert text.count('"mask_type": "CAUSAL"'.replace('"', '\\22')) == 2
  assert text.count('"fmha_scale": 0.25'.replace('"', '\\22')) == 2
