"""The mesh: which device computes what."""

from collections.abc import Sequence
import math

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
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
