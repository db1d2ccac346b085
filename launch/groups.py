"""Reads which devices of the mesh take part in a collective."""

from collections.abc import Callable, Mapping
import math
import re

import numpy as np


def first(attributes: str) -> tuple[int, ...]:
  """Reads the first group; () where there is none, which means all devices.

  Args:
    attributes: of an instruction, as text.
  """
  for pattern, read in _GROUPS.items():
    match = re.search(pattern, attributes)
    if match:
      return tuple(int(device) for device in read(*match.groups()))
  return ()


def _strided(groups: str, sizes: str, order: str | None) -> np.ndarray:
  """0..7 as [4, 2], transposed, as two groups of 4: [2,4]<=[4,2]T(1,0)."""
  sizes = [int(size) for size in sizes.split(',')]
  devices = np.arange(math.prod(sizes)).reshape(sizes)
  if order:
    devices = devices.transpose([int(axis) for axis in order.split(',')])
  return devices.reshape([int(size) for size in groups.split(',')])[0]


def _along_axes(axes: str, chosen: str) -> np.ndarray:
  """Devices that differ in 'b' alone: mesh['a'=4,'b'=2] {'b'}."""
  sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes))
  devices = np.arange(math.prod(map(int, sizes.values())))
  devices = devices.reshape([int(size) for size in sizes.values()])
  chosen = re.findall(r"'([^']+)'", chosen)
  return devices[
    tuple(slice(None) if axis in chosen else 0 for axis in sizes)
  ].ravel()


# The four ways in which XLA writes them.
_GROUPS: Mapping[str, Callable] = {
  r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?': _strided,
  r'replica_groups=mesh\[(.*?)\] ?\{(.*?)\}': _along_axes,
  r'replica_groups=\{\{([\d,]+)\}': lambda group: group.split(','),
  # A permutation has pairs; as a group, the first one.
  r'source_target_pairs=\{\{([\d,]+)\}': lambda pair: pair.split(','),
}
