"""Estimates what a program costs: FLOPs of JAX's, seconds of the compiled one.

A compiled operation takes as long as the compiler estimates. Where it does not
(GPUs, kernels, gathers, sorts, what is not fused), it takes as long as its
FLOPs at the peak or its bytes at the memory's bandwidth, whichever is longer.
"""

from collections.abc import Sequence
import math
import re
from typing import NamedTuple

from jax.extend import core

from launch import hlo
from launch.hardware import Chip

ASSUMPTIONS = (
  "compute: the compiler's estimated cycles, times the trips of loops; without "
  'such (kernels, gathers, sorts, copies and sums that are not fused; all on '
  'GPUs) FLOPs at the peak or bytes at the bandwidth of memory, whichever '
  'takes longer, which is optimistic',
  'gathers, scatters and sorts read as many bytes as they write',
  "attention's kernels reach half of the peak; FlashAttention-2 was measured "
  'at 35 % of an H100, FlashAttention-3 at 75 % (arXiv 2407.08608)',
  'grouped products have as many rows on each device as perfectly balanced '
  'experts, whatever room there is for more',
)

# Take no time, or overlap with what does.
_FREE = (
  'after-all',
  'bitcast',
  'call',
  'conditional',
  'constant',
  'get-tuple-element',
  'parameter',
  'partition-id',
  'recv',
  'send',
  'tuple',
  'while',
)
_FREE_CALLS = ('AllocateBuffer', 'ConcatBitcast', 'AsyncCollective')
# Not fused. Of these, the compiler of TPUs states as many cycles for an entry
# of bfloat16 as for one of float32: a matrix of 8192 x 8192 would be negated at
# 17 or 35 % of the memory's bandwidth on v6e, while a fusion that adds three
# reaches 88 %.
_UNFUSED = (
  'add',
  'broadcast',
  'convert',
  'copy',
  'multiply',
  'negate',
  'reduce',
  'select',
  'subtract',
  'transpose',
)

_KERNEL_SHARE = 0.5  # Of the peak, see above.
# Products of [S, W] and [W, S], or [S, S] and [S, W], in kernels of causal
# attention, by parts of their names in programs.
_ATTENTION = {
  'fmhaSoftmaxBackward': 5,
  'fmhaSoftmax': 2,
  'dot_product_attention_bwd': 5,
  'dot_product_attention_fwd': 2,
  'splash_mha_fwd': 2,
  'splash_mha_dq': 3,
  'splash_mha_dkv': 4,
}


class Cost(NamedTuple):
  """What one instruction costs a step.

  Attributes:
    seconds: over all its runs.
    known: whether the compiler estimated it.
    op_name: where in the JAX program it comes from.
  """

  seconds: float
  known: bool
  op_name: str


def compute(program: hlo.Program, chip: Chip, rows: float) -> list[Cost]:
  """Estimates all operations but collectives.

  Args:
    program: the compiled step.
    chip: what runs it.
    rows: (token, expert) pairs of a device in one grouped product.
  """
  costs = []
  for visit in hlo.visits(program):
    instruction = visit.instruction
    if visit.fused or _is_free(instruction):
      continue
    cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    fused = instruction.opcode not in _UNFUSED
    known = bool(cycles and chip.clock and fused)
    seconds = (
      int(cycles[1]) / chip.clock
      if known
      else _roofline(program, visit, chip, rows)
    )
    op_name = _op_name(program, instruction) or visit.caller
    costs.append(Cost(visit.count * seconds, known, op_name))
  return costs


def _op_name(program: hlo.Program, instruction: hlo.Instruction) -> str:
  """Takes the name of a nameless fusion from what it fuses."""
  inner = [
    other.op_name
    for name in hlo.called(instruction)
    for other in program.computations[name].values()
  ]
  return next(filter(None, [instruction.op_name, *reversed(inner)]), '')


def _is_free(instruction: hlo.Instruction) -> bool:
  opcode = instruction.opcode
  return (
    opcode in (*_FREE, *hlo.KINDS)
    or opcode.endswith(('-start', '-done', '-update'))
    or any(f'"{call}' in instruction.attributes for call in _FREE_CALLS)
  )


def _roofline(program, visit, chip, rows) -> float:
  computation = program.computations[visit.computation]
  instruction = visit.instruction
  shapes = [computation[name].shape for name in instruction.operands]
  shapes.append(instruction.shape)
  is_call = instruction.opcode == 'custom-call'
  if is_call and 'expert' in instruction.op_name:
    flops, size = _grouped_product(shapes, rows)
  elif is_call and (
    needed := _attention_flops(
      f'{instruction.name} {instruction.attributes}',
      [sizes for shape in shapes[:-1] for sizes in _sizes(shape)],
    )
  ):
    flops, size = needed / _KERNEL_SHARE, sum(map(hlo.shape_bytes, shapes))
  else:
    flops = sum(
      _dot_flops(program.computations[name], inner)
      for name, inner in _products(program, visit)
    )
    size = 2 * hlo.shape_bytes(instruction.shape)
    if flops or instruction.opcode in _UNFUSED:
      size = sum(map(hlo.shape_bytes, shapes))
  return max(flops / chip.peak, size / chip.bandwidth)


def _products(program, visit):
  """Yields the matrix products of an instruction or its fusion."""
  pending = [(visit.computation, visit.instruction)]
  while pending:
    name, instruction = pending.pop()
    if instruction.opcode == 'dot' or 'gemm' in instruction.attributes:
      yield name, instruction
    for called in hlo.called(instruction):
      pending += [(called, i) for i in program.computations[called].values()]


def _dot_flops(computation, product: hlo.Instruction) -> float:
  """2 x (size of the result) x (size of what is summed over)."""
  axes = re.search(
    r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)', product.attributes
  )
  if not axes:
    return 0.0
  left = _sizes(computation[product.operands[0]].shape)[0]
  summed = [left[int(axis)] for axis in re.findall(r'\d+', axes[1])]
  return 2.0 * math.prod(_sizes(product.shape)[0]) * math.prod(summed)


def _grouped_product(shapes: Sequence[str], rows: float) -> tuple[float, float]:
  """Returns FLOPs and bytes of a grouped product with that many rows.

  Two of its three arrays are [room for rows, K] and [room, N], one [E, K, N].
  """
  flat, size = [], 0.0
  for shape in shapes:
    for array in _arrays(shape):
      sizes, share = _sizes(array)[0], 1.0
      if len(sizes) == 2 and not array.startswith('s32'):
        flat.append(sizes)
        share = min(1.0, rows / sizes[0])
      size += share * hlo.shape_bytes(array)
  if len(flat) != 2:
    return 0.0, size
  (room, k), (_, n) = flat
  return 2.0 * min(room, rows) * k * n, size


def _attention_flops(name: str, operands: Sequence[Sequence[int]]) -> float:
  """Returns the FLOPs of a kernel of causal attention, 0 of anything else.

  Half of the scores are not computed. Queries are the greatest operand of three
  axes or more: [B, S, H, W], [B, H, S, W] or, of one sequence, [H, S, W]. No
  text has fewer tokens than heads.
  """
  products = next((n for part, n in _ATTENTION.items() if part in name), 0)
  operands = [shape for shape in operands if len(shape) > 2]
  if not products or not operands:
    return 0.0
  query = max(operands, key=math.prod)
  return float(products * math.prod(query) * max(query[-3:-1]))


def _arrays(shape: str) -> list[str]:
  return re.findall(r'[a-z]+\d*\w*\[[\d,]*\]', shape)


def _sizes(shape: str) -> list[list[int]]:
  return [
    [int(size) for size in re.findall(r'\d+', array.partition('[')[2])]
    for array in _arrays(shape)
  ]


def flops(jaxpr: core.Jaxpr, devices: int, rows: float) -> float:
  """Counts the FLOPs of matrix products in a JAX program, over all devices.

  What is recomputed counts; of branches, the most costly one.

  Args:
    jaxpr: of the step.
    devices: of the mesh, each of which runs what is inside a `shard_map`.
    rows: (token, expert) pairs of a device in one grouped product.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    name, parameters = equation.primitive.name, equation.params
    if name == 'dot_general':
      (axes, _), _ = parameters['dimension_numbers']
      left = equation.invars[0].aval.shape
      size = equation.outvars[0].aval.size
      total += 2.0 * size * math.prod(left[axis] for axis in axes)
    elif name == 'ragged_dot_general':
      arrays = [v.aval.shape for v in (*equation.invars[:2], *equation.outvars)]
      (room, k), (_, n) = (array for array in arrays if len(array) == 2)
      total += 2.0 * min(room, rows) * k * n
    elif kernel := _attention_flops(
      f'{name} {parameters.get("name", "")}',
      [v.aval.shape for v in equation.invars],
    ):
      total += kernel
      continue
    inner = [
      flops(sub, devices, rows) for sub in core.jaxprs_in_params(parameters)
    ]
    if name == 'cond':
      inner = [max(inner)]
    times = parameters['length'] if name == 'scan' else 1
    times *= devices if name == 'shard_map' else 1
    total += times * sum(inner)
  return total
