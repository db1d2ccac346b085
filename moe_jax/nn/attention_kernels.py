"""Causal attention by libraries' kernels: memory is linear in the sequence.

Shape letters: B batch, S sequence, H query heads, G key/value heads, W head
width.
"""

from collections.abc import Callable
import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax import jax_privates
from moe_jax.parallel import mesh as meshes

_LANES, _TPU_BLOCK = 128, 512  # Queries and keys of a block, at least, at most.
_CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)
_CUDNN_WIDTH = 128


def find(
  query_BxSxHxW: jax.Array, *, documents: bool, mesh: Mesh | None
) -> Callable[..., jax.Array] | None:
  """Returns the kernel that can attend with such queries, or None.

  On NVIDIA GPUs since Ampere it is cuDNN's, for 16-bit numbers in heads of up
  to 128, where a sequence is one document. On TPUs it is splash attention, for
  sequences of a multiple of 128 tokens.

  Args:
    query_BxSxHxW: or anything of its shape and dtype.
    documents: whether a sequence may hold several.
    mesh: of the devices that attend. None has no kernel: nothing says where
      the arrays are, and a compiler would not know how to split one.

  Returns:
    A function of query, key, value [B, S, G, W], positions_BxS or None, and
    `scale`.
  """
  if not isinstance(mesh, Mesh):
    return None
  device = mesh.devices.flat[0]
  batch, sequence, _, width = query_BxSxHxW.shape
  if device.platform == 'tpu' and sequence % _LANES == 0:
    kernel = _splash
  elif (
    device.platform == 'gpu'
    and not documents
    and query_BxSxHxW.dtype in _CUDNN_DTYPES
    and width <= _CUDNN_WIDTH
    and width % 8 == 0
    and _has_cudnn(device)
  ):
    kernel = _cudnn
  else:
    return None
  manual = jax.sharding.get_abstract_mesh().manual_axes
  if mesh.size == 1 or set(meshes.AXES) <= set(manual):
    return kernel
  if batch % mesh.size:  # The MoE layers say so.
    return None
  return functools.partial(_on_each_device, kernel, mesh)


def _has_cudnn(device: jax.Device) -> bool:
  # Those of AMD have names in place of numbers.
  major = re.match(r'(\d+)\.', getattr(device, 'compute_capability', ''))
  return bool(major) and int(major[1]) >= 8 and jax_privates.has_cudnn()


def _on_each_device(kernel, mesh, *arrays, scale):
  """Kernels do not know how to split a batch over devices."""
  return jax.shard_map(
    functools.partial(kernel, scale=scale),
    mesh=mesh,
    in_specs=P(meshes.AXES),
    out_specs=P(meshes.AXES),
  )(*arrays)


def _cudnn(query_BxSxHxW, key_BxSxGxW, value_BxSxGxW, _, *, scale):
  return jax.nn.dot_product_attention(
    query_BxSxHxW,
    key_BxSxGxW,
    value_BxSxGxW,
    scale=scale,
    is_causal=True,
    implementation='cudnn',
  )


def _splash(
  query_BxSxHxW,
  key_BxSxGxW,
  value_BxSxGxW,
  positions_BxS,
  *,
  scale,
  interpret=False,
):
  scale = query_BxSxHxW.shape[-1] ** -0.5 if scale is None else scale
  heads = (
    x.swapaxes(1, 2) for x in (query_BxSxHxW, key_BxSxGxW, value_BxSxGxW)
  )
  documents_BxS = None
  if positions_BxS is not None:
    documents_BxS = jnp.cumsum(positions_BxS == 0, axis=1, dtype=jnp.int32)
  return _splash_BxHxSxW(scale, interpret, *heads, documents_BxS).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _splash_BxHxSxW(scale, interpret, query, key, value, documents):
  kernel = functools.partial(_splash_kernel, scale, interpret)
  return jax_privates.untracked(kernel, documents, query, key, value)


def _splash_forward(scale, interpret, query, key, value, documents):
  def attend(query, key, value, documents):
    kernel = functools.partial(_splash_kernel, scale, interpret, documents)
    return jax.vjp(kernel, query, key, value)

  return jax_privates.untracked(attend, query, key, value, documents)


def _splash_backward(scale, interpret, pull_back, dy):
  del scale, interpret
  gradients = jax_privates.untracked(lambda f, dy: f(dy), pull_back, dy)
  return *gradients, None


_splash_BxHxSxW.defvjp(_splash_forward, _splash_backward)


def _splash_kernel(scale, interpret, documents_BxS, query, key, value):
  # Late, as it takes a while to import.
  from jax.experimental.pallas.ops.tpu import splash_attention

  heads, sequence = query.shape[1:3]
  size = math.gcd(sequence, _TPU_BLOCK)
  kernel = splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask(
      [splash_attention.CausalMask((sequence, sequence))] * heads
    ),
    block_sizes=splash_attention.BlockSizes(
      *(size,) * 3,
      block_q_dkv=size,
      block_kv_dkv=size,
      block_kv_dkv_compute=size,
      block_q_dq=size,
      block_kv_dq=size,
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )

  def of_sequence(query, key, value, documents_S):
    documents = documents_S
    if documents is not None:
      documents = splash_attention.SegmentIds(q=documents_S, kv=documents_S)
    return kernel(query, key, value, documents)

  return jax.vmap(of_sequence)(query * scale, key, value, documents_BxS)
