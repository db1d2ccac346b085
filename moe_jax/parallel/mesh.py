"""The mesh: which device computes what and holds which parameters."""

import collections
from collections.abc import Callable, Sequence
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from moe_jax import jax_privates


class Axes(NamedTuple):
  """Names of the mesh's axes: tokens are split over both.

  Attributes:
    data: copies of the model.
    expert: experts are split over it.
  """

  data: str = 'data'
  expert: str = 'expert'


AXES = Axes()
BATCH = P(AXES)


def make_mesh(
  data: int = -1,
  expert: int = 1,
  devices: Sequence[jax.Device] | None = None,
  *,
  expert_across: bool = False,
) -> Mesh:
  """Arranges the devices as a ('data', 'expert') mesh.

  Slices of TPUs, and nodes of GPUs, which jax calls slices as well, are joined
  by a network slower than what is inside them: `data` goes across.

  Args:
    data: devices along `data`; -1 takes what is left.
    expert: devices along `expert`; -1 takes what is left.
    devices: by default all of them, over all processes.
    expert_across: whether `expert` may span slices. Every MoE layer then sends
      its rows through the network between them.

  Raises:
    ValueError: the product is not the number of devices, or `expert` spans
      slices.
  """
  devices = jax.devices() if devices is None else devices
  data, expert = _sizes(data, expert, len(devices))
  # Devices that belong to no slice, such as CPUs, are one.
  slices = collections.Counter(getattr(d, 'slice_index', 0) for d in devices)
  if len(slices) == 1:
    return _mesh(mesh_utils.create_device_mesh, (data, expert), devices)
  if len(set(slices.values())) > 1:
    raise ValueError(
      f'devices: {len(slices)} slices or nodes of unequal sizes, '
      f'{sorted(slices.values())}; all must be alike'
    )
  across = math.gcd(data, len(slices))
  expert_slices = len(slices) // across
  if expert_slices > 1 and not expert_across:
    size = len(devices) // len(slices)
    fits = [str(n) for n in range(1, size + 1) if size % n == 0]
    raise ValueError(
      f'mesh.expert={expert}: would span slices or nodes, which have {size} '
      f'devices each; {", ".join(fits)} do not, or set '
      '--config.mesh.expert_across=true, and every MoE layer sends its rows '
      'through the slower network between them'
    )
  sizes = (data // across, expert // expert_slices), (across, expert_slices)
  return _mesh(mesh_utils.create_hybrid_device_mesh, *sizes, devices)


def _mesh(create: Callable[..., np.ndarray], *arguments) -> Mesh:
  # A side of a torus may be shared by both axes, where nothing else fits.
  arranged = create(*arguments, allow_split_physical_axes=True)
  # Auto: the compiler places collectives. (Explicit has no rule for sorts and
  # gathers over a split axis.)
  return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(data: int, expert: int, count: int) -> tuple[int, int]:
  """Replaces -1; raises ValueError unless the product is `count`."""
  sizes = {'data': data, 'expert': expert}
  for name, size in sizes.items():
    if size != -1 and size < 1:
      raise ValueError(f'mesh.{name}={size}: must be 1 or more, or -1')
  if data == expert == -1:
    raise ValueError('mesh.data=-1, mesh.expert=-1: only one can be -1')
  known = abs(data * expert)
  if count % known or (known != count and -1 not in (data, expert)):
    fits = [f'{d}x{count // d}' for d in range(1, count + 1) if count % d == 0]
    raise ValueError(
      f'mesh.data={data}, mesh.expert={expert}: cannot arrange {count} '
      f'device(s); data x expert may be {", ".join(fits)}'
    )
  left = count // known
  return (left if data == -1 else data), (left if expert == -1 else expert)


def expert_sizes(experts: int, mesh: Mesh) -> list[int]:
  """Lists by how many of the mesh's devices so many experts can be shared."""
  common = math.gcd(experts, mesh.size)
  return [size for size in range(1, common + 1) if common % size == 0]


def expert_spec(
  shape: Sequence[int], mesh: Mesh, *, fsdp: bool, axes: Axes = AXES
) -> P:
  """Returns where a weight [E, in, out] of experts is.

  Experts are split over `expert`; with `fsdp`, one side of each matrix is split
  over `data`.
  """
  return P(axes.expert, *_matrix_spec(shape[1:], mesh, fsdp, axes.data))


def dense_spec(shape: Sequence[int], mesh: Mesh, *, fsdp: bool) -> P:
  """Returns where any other parameter is: on every device.

  With `fsdp`, one side of a matrix [in, out] is split over `data`.
  """
  return (
    P(*_matrix_spec(shape, mesh, fsdp, AXES.data)) if len(shape) == 2 else P()
  )


def _matrix_spec(shape, mesh, fsdp, axis) -> tuple[str | None, str | None]:
  """Splits the first side that divides evenly."""
  size = mesh.shape[axis] if fsdp else 1
  if size > 1 and shape[0] % size == 0:
    return (axis, None)
  if size > 1 and shape[1] % size == 0:
    return (None, axis)
  return (None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_dense(weight: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
  """Gathers a parameter that is split as `spec` says, for its use.

  Its gradient, in the dtype of compute, is split again as soon as it is summed.
  Left to itself, the compiler might send activations, or their gradients,
  instead of the weight.
  """
  return lax.with_sharding_constraint(weight, NamedSharding(mesh, P()))


def _gather_dense_forward(weight, mesh, spec):
  return gather_dense(weight, mesh, spec), None


def _gather_dense_backward(mesh, spec, residuals, dweight):
  for where in (P(), spec):  # Summed, then split.
    dweight = lax.with_sharding_constraint(dweight, NamedSharding(mesh, where))
  return (dweight,)


gather_dense.defvjp(_gather_dense_forward, _gather_dense_backward)


def gather_experts(
  weight_LxDxF: jax.Array, spec: P, dtype: jnp.dtype, axis: str = AXES.data
) -> jax.Array:
  """Gathers this device's experts over `data`, inside `jax.shard_map`.

  Args:
    weight_LxDxF: float32, split over `data` where `spec` says so. If it varies
      over `data` all the same, each device has a copy of its own, of which the
      gradient is its own as well.
    spec: of `expert_spec`.
    dtype: what the weights are cast to before they travel. Gradients are cast
      back before they are summed.
    axis: name of `data`.
  """
  varies = axis in jax_privates.varying_axes(weight_LxDxF)
  if varies and axis not in spec:
    return weight_LxDxF.astype(dtype)
  return _gather_experts(weight_LxDxF, spec, dtype, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_experts(weight_LxDxF, spec, dtype, axis):
  weight_LxDxF = weight_LxDxF.astype(dtype)
  if axis in spec:
    return lax.all_gather(weight_LxDxF, axis, axis=spec.index(axis), tiled=True)
  return lax.pcast(weight_LxDxF, axis, to='varying')


def _gather_experts_forward(weight_LxDxF, spec, dtype, axis):
  return _gather_experts(weight_LxDxF, spec, dtype, axis), None


def _gather_experts_backward(spec, dtype, axis, residuals, dweight_LxDxF):
  dweight_LxDxF = dweight_LxDxF.astype(jnp.float32)
  if axis not in spec:
    return (lax.psum(dweight_LxDxF, axis),)
  dweight_LxDxF = lax.psum_scatter(
    dweight_LxDxF, axis, scatter_dimension=spec.index(axis), tiled=True
  )
  return (dweight_LxDxF,)


_gather_experts.defvjp(_gather_experts_forward, _gather_experts_backward)
