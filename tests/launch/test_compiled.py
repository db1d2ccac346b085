"""What compilers make of an MoE layer, and of attention.

Of the layer: its FLOPs, its arrays, its collectives.

They need no chips, but they are not in requirements-dev.txt: `make test-newer`
installs them.
"""

import collections
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys

import pytest

from launch import hlo
from tests.launch.compiled_layer import (
  BATCH,
  DATA,
  EXPERT,
  EXPERTS,
  HIDDEN,
  ITERATIONS,
  SEQUENCE,
  WIDTH,
  K,
)

ROOT = pathlib.Path(__file__).parents[2]
PAIRS = BATCH * SEQUENCE * K // (DATA * EXPERT)  # Of one device.
LOCAL = EXPERTS // EXPERT
# What multiplies groups of rows, and does not say how.
KERNELS = ('"tpu_custom_call"', '"__gpu$xla.gpu.triton"')
# Index arithmetic of the TPU's compiler.
OTHER_CALLS = (
  *('AllocateBuffer', 'AssumeGatherIndicesInBound', 'ConcatBitcast'),
  'GatherScatterIndicesBitpacked',
)

pytestmark = pytest.mark.long


def compiler(name):
  missing = importlib.util.find_spec(name) is None
  return pytest.mark.skipif(missing, reason=f'{name}: make test-newer has it')


libtpu, cuda = compiler('libtpu'), compiler('jax_cuda12_plugin')


def compile_layer(topology, name, directory):
  command = ['-m', 'tests.launch.compiled_layer', topology, name, directory]
  done = subprocess.run(
    [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
  )
  assert not done.returncode, done.stderr
  return hlo.parse((directory / 'program.txt').read_text())


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(('v5e:2x4', 'dropless'), marks=libtpu),
    pytest.param(('v5e:2x4', 'rounded'), marks=libtpu),
    pytest.param(('h100:8', 'dropless'), marks=cuda),
    pytest.param(('h100:8', 'rounded'), marks=cuda),
  ],
  ids='-'.join,
)
def layer(request, tmp_path_factory):
  """Whether it rounds, its program and its FLOPs."""
  directory = tmp_path_factory.mktemp('layer')
  program = compile_layer(*request.param, directory)
  flops = json.loads((directory / 'flops.json').read_text())
  return request.param[1] == 'rounded', program, flops


def sizes(shape):
  """Returns the sides of each array of a shape."""
  return [
    [int(side) for side in sides.split(',') if side]
    for sides in re.findall(r'[a-z]\d*\[([\d,]*)\]', shape)
  ]


def product_flops(program, visit):
  """Counts what a matrix product costs; 0 for all else."""
  instruction = visit.instruction
  shapes = [
    program.computations[visit.computation][name].shape
    for name in instruction.operands
  ]
  result, attributes = sizes(instruction.shape)[0], instruction.attributes
  if instruction.opcode == 'dot':
    axes = re.search(r'lhs_contracting_dims=\{([\d,]+)\}', attributes)[1]
    left = sizes(shapes[0])[0]
    summed = math.prod(left[int(axis)] for axis in axes.split(','))
  elif instruction.opcode == 'convolution':
    # On TPU, so are products written. A batch is a window that takes one.
    assert 'window=' not in attributes or 'lhs_dilate=' in attributes
    kernel = re.search(r'dim_labels=\w+_(\w+)->', attributes)[1]
    summed = sizes(shapes[1])[0][kernel.index('i')]
  elif any(kernel in attributes for kernel in KERNELS):
    flat = [
      array
      for shape in (*shapes, instruction.shape)
      for array in sizes(shape)
      if len(array) == 2
    ]
    if not flat:  # Where groups begin.
      return 0
    (rows, inner), (_, outer) = flat
    return 2 * rows * inner * outer
  else:
    calls = re.search(r'custom_call_target="(\S+)"', attributes)
    assert calls is None or calls[1] in OTHER_CALLS, calls[1]
    return 0
  return 2 * math.prod(result) * summed


def test_flops_are_those_of_the_jaxpr(layer):
  _, program, flops = layer
  counted = sum(
    visit.count * product_flops(program, visit) for visit in hlo.visits(program)
  )
  assert flops['jaxpr'] / 1.2 < counted < 1.2 * flops['jaxpr']
  if flops['compiler']:  # It knows what its kernels do.
    assert flops['compiler'] < 1.2 * flops['jaxpr']


def test_nothing_is_as_large_as_a_mask(layer):
  """No array of all tokens or rows and all experts, not even in a fusion."""
  rounded, program, _ = layer
  room = PAIRS if rounded else EXPERT * PAIRS
  # Gate and up are one product on GPUs.
  largest = max(room * HIDDEN, 2 * LOCAL * WIDTH * HIDDEN)
  for computation in program.computations.values():
    for instruction in computation.values():
      for array in sizes(instruction.shape):
        assert math.prod(array) < 1.1 * largest, instruction


def test_nothing_else_is_communicated(layer, request):
  rounded, program, _ = layer
  found = collections.Counter()
  for each in hlo.collectives(program):
    found[each.kind, each.bytes, len(each.group)] += each.count
  # There and back, forward and backward.
  row = 2 * WIDTH
  kind = 'all-to-all' if rounded else 'ragged-all-to-all'
  spare = 0 if rounded else 256 * row
  assert found.pop((kind, PAIRS * row + spare, EXPERT)) == 4
  # Each pass of an order statistic: 8 of its 32 bits on TPUs, else 4.
  counts, passes = (256, 4) if 'v5e' in request.node.name else (15, 8)
  solving = found.pop(('all-reduce', counts * EXPERTS * 4, 8))
  assert solving == ITERATIONS * passes
  assert found.pop(('all-reduce', WIDTH * EXPERTS * 4, 8)) == 1  # The router's.
  if rounded:  # Gates, and their gradients.
    assert found.pop((kind, PAIRS * 4, EXPERT)) == 2
  else:  # Loads; TPUs gather them by adding to zeros.
    loads = EXPERT * EXPERTS * 4
    gathers = [each for each in found if each[1:] == (loads, EXPERT)]
    assert [found.pop(each) for each in gathers] == [1]
  # Gradients of three weights; some are sent together.
  assert {(kind, group) for kind, _, group in found} == {('all-reduce', DATA)}
  total = sum(size * count for (_, size, _), count in found.items())
  assert total == 3 * LOCAL * WIDTH * HIDDEN * 4


@pytest.mark.parametrize(
  'topology',
  [pytest.param('v5e:2x4', marks=libtpu), pytest.param('h100:8', marks=cuda)],
)
def test_products_are_computed_while_rows_travel(topology, tmp_path):
  """Between start and done; the shared expert's are among them."""
  program = compile_layer(topology, 'shared', tmp_path)
  waiting, meanwhile = {}, []
  for name, computation in program.computations.items():
    for instruction in computation.values():
      if instruction.opcode == 'all-to-all-start':
        waiting[instruction.name] = []
      elif instruction.opcode == 'all-to-all-done':
        meanwhile.append(waiting.pop(instruction.operands[0]))
      else:
        for products in waiting.values():
          products += products_of(program, name, instruction)
  assert len(meanwhile) == 6  # Four of rows, two of gates.
  assert sum(map(bool, meanwhile)) >= 4, meanwhile
  assert any('shard_map' not in name for name in sum(meanwhile, [])), meanwhile


def products_of(program, computation, instruction):
  """Tells where an instruction's products, or its fusion's, come from."""
  parts = [(computation, instruction)]
  for name in hlo.called(instruction):
    parts += [(name, part) for part in program.computations[name].values()]
  return [
    part.op_name
    for name, part in parts
    if product_flops(program, hlo.Visit(part, name, 1, False))
  ]


SPLASH = ['splash_mha_dkv', 'splash_mha_dq', 'splash_mha_fwd']
CUDNN = ['fmhaSoftmax', 'fmhaSoftmaxBackward']


@pytest.mark.parametrize(
  ('topology', 'documents', 'kernels'),
  [
    pytest.param('v5e:2x4', 0, SPLASH, marks=libtpu),
    pytest.param('v5e:2x4', 1, SPLASH, marks=libtpu),
    pytest.param('h100:8', 0, CUDNN, marks=cuda),
  ],
)
def test_attention_stores_no_scores(topology, documents, kernels):
  """Its memory grows as the sequence does, forward and backward."""
  needed = []
  for sequence in (16_384, 32_768):
    command = ['-m', 'tests.launch.compiled_attention', topology]
    command += [str(sequence), str(documents)]
    done = subprocess.run(
      [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    size, *found = done.stdout.split()
    assert found == kernels
    needed.append(int(size))
  assert needed[1] < 2.5 * needed[0]  # Scores would be 4 times as many.
