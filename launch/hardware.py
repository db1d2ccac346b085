"""What chips can do, as their vendors state it, and what an exchange costs.

Nothing here was measured. Sources, read in November 2026:

    TPU     cloud.google.com/tpu/docs/v5e, /v5p and /v6e: peak, HBM, ICI ports
            and bidirectional ICI bandwidth of a chip. A port sends at half of
            that, divided by the ports. Of the memory, what libtpu 0.0.52 lets a
            program use, as its refusals say.
    DCN     the same pages: 6.4 Tb/s for a v5e pod of 256 chips, 25.6 Tb/s for
            one of v6e, 50 Gb/s for each chip of v5p. Its latency, 50
            microseconds a collective, is a guess.
    H100    glennklockwood.com/garden/processors/h100, which collects NVIDIA's
            figures of the H100 SXM (989.4 TFLOP/s dense bfloat16, 3.35 TB/s,
            NVLink 900 GB/s both ways together); memory: XLA's description of
            the device. H200: nvidia.com/en-us/data-center/h200, the same but
            for 141 GB at 4.8 TB/s.
    network cloud.google.com/compute/docs/gpus/gpu-network-bandwidth: a
            a3-highgpu-8g has 4 ports of 200 Gb/s for its 8 GPUs (TCPX, no
            InfiniBand), a3-megagpu-8g 8 of 200 (TCPXO), a3-ultragpu-8g 8 of
            400 (RoCE). A DGX or HGX has 8 of 400 (InfiniBand NDR), see
            docs.nvidia.com/dgx/dgxh100-user-guide.
    clock   peak / FLOPs of all matrix units in one cycle. The compiler's cycles
            for a bfloat16 product of 8192 x 8192 matrices then give 88 % (v5e),
            90 % (v5p) and, with the options of moe_jax/parallel/compilers.py,
            90 % (v6e) of the peak.

Measured by others, of v5p and v6e, and not used here: exchanges between
neighbours pass 86 GB/s where vendors state 100, after 2 to 5 microseconds
(github.com/marin-community/marin/issues/6736).
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

from launch.hlo import Collective
from moe_jax.parallel.peaks import PEAK_FLOPS


class Chip(NamedTuple):
  """One accelerator.

  Attributes:
    peak: bfloat16 FLOP/s.
    hbm: bytes of memory that a program may use.
    bandwidth: of that memory, bytes/s.
    link: bytes/s that one port sends, to a neighbour in the torus; for a GPU,
      all that it sends within its node.
    hop: seconds of latency from neighbour to neighbour; for a GPU, of a
      collective within a node.
    clock: Hz of the compiler's cycles; 0 where it does not estimate cycles.
    ring: TPU: sides of the torus that are multiples of it are rings, others
      are lines.
    node: GPU: GPUs of a node.
    network: bytes/s that one sends to other slices; for a GPU, to other nodes.
    far: seconds of latency of a collective between slices or nodes.
  """

  peak: float
  hbm: float
  bandwidth: float
  link: float
  hop: float
  clock: float = 0.0
  ring: int = 0
  node: int = 0
  network: float = 0.0
  far: float = 0.0


_GIB = 2**30
_MXU = 2 * 128 * 128  # FLOPs of one matrix unit of that size in a cycle
CHIPS = {
  'v5e': Chip(
    peak=PEAK_FLOPS['TPU v5 lite'],
    hbm=15.75 * _GIB,
    bandwidth=819e9,
    link=400e9 / 2 / 4,
    hop=1e-6,
    clock=PEAK_FLOPS['TPU v5 lite'] / (4 * _MXU),
    ring=16,
    network=6.4e12 / 8 / 256,
    far=50e-6,
  ),
  'v5p': Chip(
    peak=PEAK_FLOPS['TPU v5p'],
    hbm=95.73 * _GIB,
    bandwidth=2765e9,
    link=1200e9 / 2 / 6,
    hop=1e-6,
    clock=PEAK_FLOPS['TPU v5p'] / (8 * _MXU),
    ring=4,
    network=50e9 / 8,
    far=50e-6,
  ),
  'v6e': Chip(
    peak=PEAK_FLOPS['TPU v6 lite'],
    hbm=31.24 * _GIB,
    bandwidth=1640e9,
    link=800e9 / 2 / 4,
    hop=1e-6,
    clock=PEAK_FLOPS['TPU v6 lite'] / (16 * _MXU),
    ring=16,
    network=25.6e12 / 8 / 256,
    far=50e-6,
  ),
  'h100': Chip(
    peak=PEAK_FLOPS['NVIDIA H100 80GB HBM3'],
    hbm=84942979072,
    bandwidth=3.35e12,
    link=450e9,
    hop=10e-6,
    node=8,
    network=400e9 / 8,
    far=10e-6,
  ),
}
CHIPS['h200'] = CHIPS['h100']._replace(hbm=150e9, bandwidth=4.8e12)

# Of a node of 8 GPUs: its GPUs, and what each of them sends to other nodes.
MACHINES = {
  'dgx': (('h100', 'h200'), 400e9 / 8),
  'a3-highgpu-8g': (('h100',), 4 * 200e9 / 8 / 8),
  'a3-megagpu-8g': (('h100',), 200e9 / 8),
  'a3-ultragpu-8g': (('h200',), 400e9 / 8),
}

ASSUMPTIONS = (
  'peaks, memory and links are those that vendors state, see '
  'launch/hardware.py; nothing was measured',
  'TPU: collectives over several sides of the torus use all links of those '
  'sides evenly; an all-to-all is limited by the middle of the longest side; '
  '1 microsecond a hop, one traversal a collective',
  'GPU: rings at full NVLink speed within a node and at the full speed of the '
  "machine's network between nodes (--machine; by default a DGX, 400 Gb/s for "
  'each GPU); 10 microseconds a collective within a node, 20 across',
  'several slices: what the compiler sends between them is alone on the '
  "chip's share of the data-centre network, 50 microseconds a collective",
)


def seconds(
  call: Collective,
  chip: Chip,
  places: Sequence[tuple[int, ...]],
  shape: Sequence[int],
) -> float:
  """Estimates how long one run of a collective takes, alone on its links.

  Args:
    call: what is exchanged.
    chip: the hardware.
    places: of each device of the mesh: its slice and its coordinates in the
      torus; of a GPU, its node and its number there.
    shape: sides of the torus; unused for GPUs.
  """
  group = [places[i] for i in call.group] or list(places)
  if chip.node:
    return _network(call, chip, group)
  if call.between_slices:
    slices = len({place[0] for place in places})
    size = _passes(call.kind) * call.bytes * (1 - 1 / slices)
    return chip.far + size / chip.network
  # The program is one slice's.
  return _torus(call, chip, sorted({place[1:] for place in group}), shape)


def _passes(kind: str) -> int:
  # An all-reduce is a reduce-scatter and an all-gather.
  return 2 if kind == 'all-reduce' else 1


def _torus(call, chip, group, shape) -> float:
  if len(group) == 1:
    return 0.0
  sides = []
  for places, size in zip(zip(*group, strict=True), shape, strict=True):
    if count := len(set(places)) - 1:
      stride = (max(places) - min(places)) / count
      ring = size % chip.ring == 0 and (count + 1) * stride == size
      sides.append(((count + 1) * stride, stride, 2 if ring else 1))
  # On a line, the device at its end sends and receives by one link.
  latency = chip.hop * sum(length / ways for length, _, ways in sides)
  if call.kind in ('collective-permute', 'collective-broadcast'):
    return latency + call.bytes / chip.link
  # Groups that are interleaved (stride > 1) share their links.
  rate = chip.link * sum(ways / stride for _, stride, ways in sides)
  transfer = _passes(call.kind) * call.bytes * (1 - 1 / len(group)) / rate
  if call.kind.endswith('all-to-all'):
    # A quarter of all bytes crosses the middle of a line, in each direction;
    # in a ring, two links share that.
    middle = max(length / (4 * ways) for length, _, ways in sides)
    transfer = max(transfer, call.bytes * middle / chip.link)
  return latency + transfer


def _network(call, chip, group) -> float:
  if len(group) == 1:
    return 0.0
  nodes = len({node for node, _ in group})
  local = len(group) / nodes
  latency = chip.hop + (chip.far if nodes > 1 else 0.0)
  if call.kind.endswith('all-to-all'):
    inside, outside = (local - 1) / len(group), 1 - 1 / nodes
  elif call.kind in ('collective-permute', 'collective-broadcast'):
    inside, outside = float(nodes == 1), float(nodes > 1)
  else:
    # By node first, so that each GPU carries its part to the other nodes.
    inside = _passes(call.kind) * (1 - 1 / local)
    outside = _passes(call.kind) * (1 - 1 / nodes) / local
  transfer = call.bytes * (inside / chip.link + outside / chip.network)
  return latency + transfer


def human(count: float, unit: str = 'B') -> str:
  """Writes a number of bytes or FLOPs with three digits."""
  if count == 0:
    return f'0 {unit}'
  power = min(max(int(math.log(abs(count), 1000)), 0), 5)
  prefix = ('', 'k', 'M', 'G', 'T', 'P')[power]
  return f'{count / 1000**power:.3g} {prefix}{unit}'
