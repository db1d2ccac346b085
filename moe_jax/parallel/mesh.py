"""The mesh: which device computes what and holds which parameters."""

from collections.abc import Sequence
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Tokens are split over both axes, experts over the second.
AXES = ('data', 'expert')
BATCH = P(AXES)


def make_mesh(
  data: int = -1,
  expert: int = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Arranges the devices as a ('data', 'expert') mesh.

  Args:
    data: devices along `data`; -1 takes what is left.
    expert: devices along `expert`; -1 takes what is left.
    devices: by default all of them, over all processes.

  Raises:
    ValueError: the product is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count, sizes = len(devices), {'data': data, 'expert': expert}
  for name, size in sizes.items():
    if size != -1 and size < 1:
      raise ValueError(f'mesh.{name}={size}: must be 1 or more, or -1')
  known = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) == 2:
    raise ValueError('mesh.data=-1, mesh.expert=-1: only one can be -1')
  if count % known or (not free and known != count):
    fits = [f'{d}x{count // d}' for d in range(1, count + 1) if count % d == 0]
    raise ValueError(
      f'mesh.data={data}, mesh.expert={expert}: cannot arrange {count} '
      f'device(s); data x expert may be {", ".join(fits)}'
    )
  shape = [count // known if size == -1 else size for size in sizes.values()]
  # Auto: the compiler places collectives. (Explicit, make_mesh's default, has
  # no rule for sorts and gathers over a split axis.)
  return jax.make_mesh(
    shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
  )


def expert_spec(shape: Sequence[int], mesh: Mesh, *, fsdp: bool) -> P:
  """Returns where a weight [E, in, out] of experts is.

  Experts are split over `expert`; with `fsdp`, one side of each matrix is split
  over `data`.
  """
  return P('expert', *_matrix_spec(shape[1:], mesh, fsdp))


def dense_spec(shape: Sequence[int], mesh: Mesh, *, fsdp: bool) -> P:
  """Returns where any other parameter is: on every device.

  With `fsdp`, one side of a matrix [in, out] is split over `data`.
  """
  return P(*_matrix_spec(shape, mesh, fsdp)) if len(shape) == 2 else P()


def _matrix_spec(shape, mesh, fsdp) -> tuple[str | None, str | None]:
  """Splits the first side that divides evenly."""
  size = mesh.shape['data'] if fsdp else 1
  if size > 1 and shape[0] % size == 0:
    return ('data', None)
  if size > 1 and shape[1] % size == 0:
    return (None, 'data')
  return (None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_dense(weight: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
  """Gathers a parameter that is split as `spec` says, for its use.

  Its gradient is split again, as soon as it is summed. Left to itself, the
  compiler might send activations, or their gradients, instead of the weight.
  """
  return lax.with_sharding_constraint(weight, NamedSharding(mesh, P()))


def _gather_dense_forward(weight, mesh, spec):
  return gather_dense(weight, mesh, spec), None


def _gather_dense_backward(mesh, spec, residuals, dweight):
  for where in (P(), spec):  # Summed, then split: one reduce-scatter.
    dweight = lax.with_sharding_constraint(dweight, NamedSharding(mesh, where))
  return (dweight,)


gather_dense.defvjp(_gather_dense_forward, _gather_dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_experts(
  weight_LxDxF: jax.Array, spec: P, dtype: jnp.dtype
) -> jax.Array:
  """Gathers this device's experts over `data`, inside `jax.shard_map`.

  Args:
    weight_LxDxF: float32, split over `data` where `spec` says so.
    spec: of `expert_spec`.
    dtype: what the weights are cast to before they travel. Gradients are cast
      back before they are summed.
  """
  weight_LxDxF = weight_LxDxF.astype(dtype)
  if 'data' in spec:
    return lax.all_gather(
      weight_LxDxF, 'data', axis=spec.index('data'), tiled=True
    )
  return lax.pcast(weight_LxDxF, 'data', to='varying')


def _gather_experts_forward(weight_LxDxF, spec, dtype):
  return gather_experts(weight_LxDxF, spec, dtype), None


def _gather_experts_backward(spec, dtype, residuals, dweight_LxDxF):
  dweight_LxDxF = dweight_LxDxF.astype(jnp.float32)
  if 'data' not in spec:
    return (lax.psum(dweight_LxDxF, 'data'),)
  dweight_LxDxF = lax.psum_scatter(
    dweight_LxDxF, 'data', scatter_dimension=spec.index('data'), tiled=True
  )
  return (dweight_LxDxF,)


gather_experts.defvjp(_gather_experts_forward, _gather_experts_backward)
