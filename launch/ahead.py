"""Compiles steps for chips that are not here; runs nothing.

`prepare` must come before jax is imported for the first time.
"""

from collections.abc import MutableMapping
import importlib.metadata
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

from launch.hardware import CHIPS, MACHINES, Chip

# What makes the compilers work without their chips.
_ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  # No chip is touched, so others may compile as well.
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
# Choosing kernels by running them needs a GPU.
_XLA_FLAGS = '--xla_gpu_autotune_level=0'
_CUDA = ('jax-cuda12-plugin', 'jax-cuda13-plugin')
# Programs that use the SparseCore of v5p and v6e cannot be written as text.
_SPARSECORE_OPTIONS = {
  'xla_tpu_offload_gather_to_sparsecore': False,
  'xla_tpu_enable_offloading_scatter_to_sparsecore': False,
}


class Topology(NamedTuple):
  """Slices of TPU pods, or nodes of GPUs.

  Attributes:
    name: as it was given, such as 'v5e:16x16'.
    chip: a key of `CHIPS`.
    shape: sides of the torus; of GPUs, (in a node, nodes).
    slices: of TPUs, all of that shape.
    machine: a key of `MACHINES`; '' for TPUs.
  """

  name: str
  chip: str
  shape: tuple[int, ...]
  slices: int = 1
  machine: str = ''

  @property
  def size(self) -> int:
    return self.slices * math.prod(self.shape)

  @property
  def hardware(self) -> Chip:
    """The chip, with the network of its machine."""
    chip = CHIPS[self.chip]
    if not self.machine:
      return chip
    return chip._replace(network=MACHINES[self.machine][1])


class Compiled(NamedTuple):
  """A compiled step.

  Attributes:
    text: the program of one device; '' where it does not fit.
    argument_bytes: state and batch, on one device.
    temporary_bytes: all else that lives during the step, on one device.
    limit: bytes that a program may use.
  """

  text: str
  argument_bytes: int
  temporary_bytes: int
  limit: float


def parse_topology(name: str, slices: int = 1, machine: str = '') -> Topology:
  """Reads CHIP:AxB[xC], for GPUs CHIP:GPUS_OF_A_NODE[xNODES].

  Args:
    name: to be read.
    slices: of TPUs, all of that shape.
    machine: what the GPUs are in; '' is a DGX.

  Raises:
    ValueError: it is not of that form, or the chip is not known.
  """
  chip, _, sides = name.partition(':')
  sizes = tuple(int(n) for n in sides.split('x')) if _is_sizes(sides) else ()
  count = {'h100': (1, 2), 'h200': (1, 2), 'v5p': (3,)}.get(chip, (2,))
  if chip not in CHIPS or len(sizes) not in count or min(sizes) < 1:
    raise ValueError(
      f'--topology={name}: must be like v5e:16x16, v6e:16x16, v5p:4x4x8 or '
      'h100:8x4 (GPUs of a node x nodes; also h200)'
    )
  node = CHIPS[chip].node
  if node and len(sizes) == 1:
    sizes = (sizes[0], 1)
  if node and (sizes[0] > node or (sizes[0] < node and sizes[1] > 1)):
    raise ValueError(
      f'--topology={name}: a node has {node} GPUs; write {chip}:{node}x'
      f'{max(1, math.prod(sizes) // node)}'
    )
  if slices < 1 or (node and slices > 1):
    raise ValueError(
      f'--slices={slices}: must be 1 or more; of GPUs, --topology has the nodes'
    )
  machines = [m for m, (chips, _) in MACHINES.items() if chip in chips]
  if machine and machine not in machines:
    raise ValueError(
      f'--machine={machine}: with {chip} it must be '
      f'{" or ".join(machines) or "left out"}'
    )
  return Topology(name, chip, sizes, slices, machine or 'dgx' * bool(node))


def _is_sizes(text: str) -> bool:
  return re.fullmatch(r'\d+(x\d+)*', text) is not None


def prepare(environment: MutableMapping[str, str]) -> None:
  """Sets what the compilers need to work without their chips."""
  flags = f'{environment.get("XLA_FLAGS", "")} {_XLA_FLAGS}'.strip()
  environment.update(_ENVIRONMENT, XLA_FLAGS=flags)


def check_installed(topology: Topology) -> None:
  """Raises ValueError if the compiler for a topology is missing."""
  packages, file = (
    (_CUDA, 'requirements-cuda.txt')
    if CHIPS[topology.chip].node
    else (('libtpu',), 'requirements-tpu.txt')
  )
  if not set(packages) & set(versions()):
    raise ValueError(
      f'--topology={topology.name}: its compiler, {packages[0]}, is not '
      f'installed; pip install -r {file}'
    )


def versions() -> dict[str, str]:
  """Returns the versions of jax and of the compilers that are installed."""
  found = {}
  for package in ('jax', 'libtpu', *_CUDA):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      pass
  return found


def devices(topology: Topology) -> list[Any]:
  """Returns the topology's devices, which cannot run anything.

  Raises:
    ValueError: the compiler knows no such topology.
  """
  from jax.experimental import topologies

  try:
    if CHIPS[topology.chip].node:
      from moe_jax import jax_privates

      jax_privates.assume_cudnn()
      here = pathlib.Path(__file__).parent
      local, nodes = topology.shape
      found = topologies.get_topology_desc(
        platform='cuda',
        target_config=(here / f'{topology.chip}.txtpb').read_text(),
        topology=f'1x{nodes}x{local}',
      )
    else:
      found = topologies.get_topology_desc(
        platform='tpu', topology_name=topology.name, num_slices=topology.slices
      )
  except Exception as error:  # jax's, whose type is not public.
    raise ValueError(f'--topology={topology.name}: {error}') from error
  return list(found.devices)


def places(mesh, topology: Topology) -> list[tuple[int, ...]]:
  """Returns where each device of the mesh is, as `hardware.seconds` wants."""
  if CHIPS[topology.chip].node:
    return [divmod(d.id, topology.shape[0]) for d in mesh.devices.flat]
  sides = len(topology.shape)
  return [
    (getattr(d, 'slice_index', 0), *d.coords[:sides]) for d in mesh.devices.flat
  ]


def memory_limit(topology: Topology) -> float:
  """Returns the bytes that a program may use of a chip's memory.

  On GPUs, jax takes a fraction when it starts, and no more later.
  """
  chip = CHIPS[topology.chip]
  return chip.hbm * (memory_fraction() if chip.node else 1)


def output(path: str) -> pathlib.Path:
  """Returns where results go, '' for nowhere.

  Raises:
    ValueError: no file can be written there.
  """
  out = pathlib.Path(path)
  if path and (out.is_dir() or not out.parent.is_dir()):
    raise ValueError(f'--out={out}: must be a file in a directory that exists')
  return out


def memory_fraction() -> float:
  """Reads what jax reads: the share of a GPU's memory that it takes.

  Raises:
    ValueError: it is no number above 0 and at most 1.
  """
  text = os.environ.get('XLA_CLIENT_MEM_FRACTION') or '0.75'
  try:
    fraction = float(text)
  except ValueError:
    fraction = 0.0
  if not 0 < fraction <= 1:
    raise ValueError(
      f'XLA_CLIENT_MEM_FRACTION={text}: must be above 0, at most 1'
    )
  return fraction


def compile_step(lowered, topology: Topology) -> Compiled:
  """Compiles a lowered step. That it does not fit is also a result.

  Raises:
    ValueError: the compiler refuses the step for another reason.
  """
  # Late, as it imports jax.
  from moe_jax.parallel import compilers

  options = _SPARSECORE_OPTIONS if topology.chip in ('v5p', 'v6e') else {}
  try:
    with compilers.refusal_explained():
      compiled = lowered.compile(compiler_options=options)
  except Exception as error:  # jax's, whose type is not public.
    sizes = _amounts(str(error)) if 'HbmOom' in str(error) else []
    if len(sizes) < 2:
      reason = str(error).partition('\n')[0]
      raise ValueError(
        f'--topology={topology.name}: its compiler refuses: {reason}'
      ) from error
    used, limit = sizes[:2]
    return Compiled('', 0, int(used), limit)
  memory = compiled.memory_analysis()
  # Results that are not written over arguments need room of their own.
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Compiled(
    compiled.as_text(),
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes + results,
    memory_limit(topology),
  )


def _amounts(message: str) -> list[float]:
  """Reads amounts of memory such as 15.75G."""
  return [
    float(number) * 1024.0 ** ('KMGT'.index(unit) + 1)
    for number, unit in re.findall(r'([\d.]+)([KMGT])\b', message)
  ]
