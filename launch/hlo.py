"""Reads the text of a compiled XLA program: what runs, and how often.

    from launch import hlo
    for call in hlo.collectives(compiled.as_text()):
      print(call.kind, call.count, call.bytes, call.op_name)

The body of a loop counts as often as the loop turns; of a conditional's
branches, the one that communicates most counts, since only one runs. The text
is one device's program: all bytes are one device's.
"""

from collections.abc import Mapping
import functools
import math
import re
from typing import NamedTuple

from launch import groups

KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
# Of what a scheduled program does, that which can take long.
_COMPUTES = ('convolution', 'custom-call', 'dot', 'fusion', 'while')


class Instruction(NamedTuple):
  """One line of a computation, cut into its parts.

  Attributes:
    name: unique in its computation.
    shape: of the result, as text; see `shape_bytes`.
    opcode: such as 'fusion'.
    arguments: what is between the parentheses.
    attributes: what follows them.
  """

  name: str
  shape: str
  opcode: str
  arguments: str
  attributes: str

  @property
  def operands(self) -> list[str]:
    """Names of the instructions whose results it takes."""
    return re.findall(r'%([\w.-]+)', self.arguments)

  @property
  def op_name(self) -> str:
    """Where in the JAX program it comes from; '' where that is not known."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match[1] if match else ''


class Program(NamedTuple):
  """Instructions by computation and name, and the computation that runs."""

  computations: Mapping[str, Mapping[str, Instruction]]
  entry: str


class Visit(NamedTuple):
  """An instruction that runs.

  Attributes:
    instruction: the instruction.
    computation: the name of the computation that it is in.
    count: times that it runs.
    fused: whether it is a part of a fusion, which has the costs of the whole.
    caller: where in the JAX program the innermost loop, fusion or call comes
      from that runs it and says so; '' where none does.
  """

  instruction: Instruction
  computation: str
  count: int
  fused: bool
  caller: str = ''


class Collective(NamedTuple):
  """A collective operation.

  Attributes:
    kind: one of `KINDS`, also for an asynchronous start and done, which are
      one operation.
    count: times that it runs.
    bytes: of its operands or its results, whichever are more, each time. What
      a ragged-all-to-all sends is not known; here it is the lesser of the two,
      which is what a device sends if all devices send the same.
    op_name: where in the JAX program it, or else the loop that it is in, comes
      from; '' where not known. Between slices, the compiler names loops alone.
    group: positions in the mesh of the devices of the first group that
      communicates; () for all devices.
    between_slices: whether a device exchanges this with those at its place in
      all other TPU slices.
    asynchronous: whether the program computes something before it waits for
      the result.
  """

  kind: str
  count: int
  bytes: int
  op_name: str
  group: tuple[int, ...]
  between_slices: bool = False
  asynchronous: bool = False


def parse(text: str) -> Program:
  """Reads the text of a compiled program.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry, current = {}, None, {}
  text = re.sub(r'\n(?="|}})', '', text)  # Kernels' metadata have lines.
  for line in text.splitlines():
    header = re.match(r'(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$', line)
    if header:
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif instruction := _instruction(line):
      current[instruction.name] = instruction
  if entry is None:
    raise ValueError('text: must be that of a compiled XLA program')
  return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
  start = re.match(r'\s+(?:ROOT )?%?([\w.-]+) = ', line)
  if not start:
    return None
  line = re.sub(r'/\*.*?\*/', '', line[start.end() :])
  end = _closing(line, 0) if line.startswith('(') else line.index(' ')
  shape, line = line[:end], line[end:].lstrip()
  opcode = line.partition('(')[0]
  end = _closing(line, len(opcode))
  return Instruction(
    start[1], shape, opcode, line[len(opcode) + 1 : end - 1], line[end:]
  )


def _closing(text: str, start: int) -> int:
  """Returns the end of the parentheses that open at `start`."""
  depth = 0
  for match in re.compile('[()]').finditer(text, start):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.end()
  return len(text)


def shape_bytes(shape: str) -> int:
  """Counts the bytes of an array or a tuple, without padding of its layout.

  Args:
    shape: such as 'bf16[8,128]{1,0}' or '(f32[], s32[4]{0})'.
  """
  total = 0
  for kind, bits, sizes in re.findall(
    r'\b([a-z]+)(\d*)\w*\[([\d,<=]*)\]', shape
  ):
    count = math.prod(
      int(size.strip('<=')) for size in sizes.split(',') if size
    )
    total += math.ceil(count * (8 if kind == 'pred' else int(bits or 0)) / 8)
  return total


def visits(program: Program) -> list[Visit]:
  """Lists every instruction that runs, also inside loops and fusions."""

  @functools.cache
  def visit(name: str) -> list[Visit]:
    result = []
    for instruction in program.computations[name].values():
      result.append(Visit(instruction, name, 1, False))
      names, count = called(instruction), 1
      if instruction.opcode == 'while':
        count = trip_count(program, instruction) or 1
      elif instruction.opcode == 'conditional':
        names = [max(names, key=lambda branch: _traffic(visit(branch)))]
      fused = instruction.opcode == 'fusion'
      for inner in names:
        result += [
          v._replace(
            count=count * v.count,
            fused=fused or v.fused,
            caller=v.caller or instruction.op_name,
          )
          for v in visit(inner)
        ]
    return result

  return visit(program.entry)


def called(instruction: Instruction) -> list[str]:
  """Names the computations that it runs, without reductions of pairs."""
  names = {
    'while': 'body',
    'call': 'to_apply',
    'fusion': 'calls',
    'async-start': 'calls',
    'conditional': 'branch_computations|true_computation|false_computation',
  }
  if instruction.opcode not in names:
    return []
  found = re.findall(
    rf'\b(?:{names[instruction.opcode]})=(?:\{{(.*?)\}}|%?([\w.-]+))',
    instruction.attributes,
  )
  return re.findall(r'[\w.-]+', ' '.join(map(' '.join, found)))


def _traffic(branch: list[Visit]) -> int:
  return sum(
    visit.count * shape_bytes(visit.instruction.shape)
    for visit in branch
    if _kind(visit.instruction)
  )


def trip_count(program: Program, loop: Instruction) -> int | None:
  """Returns how often a while loop turns; None where the text leaves it open.

  Where the compiler does not say, a loop that compares with one constant is
  taken to count up to it from 0, as those of `lax.scan` do.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  condition = re.search(r'condition=%?([\w.-]+)', loop.attributes)[1]
  parts = list(program.computations[condition].values())
  for part in list(parts):
    for inner in called(part):
      parts += program.computations[inner].values()
  limits = [
    int(part.arguments)
    for part in parts
    if part.opcode == 'constant' and re.fullmatch(r'\d+', part.arguments)
  ]
  counts_up = [part for part in parts if 'direction=LT' in part.attributes]
  return limits[0] if len(limits) == len(counts_up) == 1 else None


def unknown_loops(program: Program) -> int:
  """Counts loops whose turns the text does not tell; they count as one."""
  return sum(
    trip_count(program, instruction) is None
    for computation in program.computations.values()
    for instruction in computation.values()
    if instruction.opcode == 'while'
  )


def collectives(text: str | Program) -> list[Collective]:
  """Lists the collective operations that one run of the program does.

  Args:
    text: of a compiled program, or what `parse` made of it.
  """
  program = parse(text) if isinstance(text, str) else text
  return [
    Collective(
      kind,
      visit.count,
      _payload(program.computations[visit.computation], visit.instruction),
      visit.instruction.op_name or visit.caller,
      groups.first(visit.instruction.attributes),
      visit.instruction.opcode == 'recv',
      _asynchronous(program, visit),
    )
    for visit in visits(program)
    if (kind := _kind(visit.instruction)) and not _continues(program, visit)
  ]


def _kind(instruction: Instruction) -> str | None:
  """Returns the kind of a collective; None for all else.

  TPU slices exchange by a send and a receive that say what they are parts of.
  """
  kind = instruction.opcode.removesuffix('-start')
  if kind == 'recv':
    transfer = re.search(
      r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes
    )
    return transfer[1].lower().replace('_', '-') if transfer else None
  return kind if kind in KINDS else None


def _continues(program: Program, visit: Visit) -> bool:
  """Whether it is a later part of what another fusion has started.

  On TPU a collective may be spread over a chain of fusions that compute
  something else meanwhile; each of them shows it again.
  """
  computation = program.computations[visit.computation].values()
  return 'chain_id=' in visit.instruction.attributes and not any(
    '"AsyncCollectiveStart"' in other.attributes for other in computation
  )


def _asynchronous(program: Program, visit: Visit) -> bool:
  start = visit.instruction
  if visit.fused:
    return 'chain_id=' in start.attributes
  # A scheduled program is written in the order in which it runs.
  parts = list(program.computations[visit.computation].values())
  parts = parts[parts.index(start) + 1 :]
  ends = [
    place
    for place, part in enumerate(parts)
    if part.opcode.endswith('-done') and start.name in part.operands
  ]
  between = parts[: ends[0]] if ends else []
  return any(part.opcode in _COMPUTES for part in between)


def _payload(
  computation: Mapping[str, Instruction], instruction: Instruction
) -> int:
  result = instruction.shape
  if instruction.opcode.endswith('-start') or instruction.opcode == 'recv':
    # A start's shape also holds operands and contexts; its done's does not.
    result = next(
      (
        other.shape
        for other in computation.values()
        if other.opcode.endswith('-done') and instruction.name in other.operands
      ),
      result,
    )
  operands = [computation[name].shape for name in instruction.operands]
  if instruction.opcode.startswith('ragged-all-to-all'):
    # Then come the output's room and four sizes.
    return min(shape_bytes(result), shape_bytes(operands[0]))
  return max(shape_bytes(result), sum(map(shape_bytes, operands)))
