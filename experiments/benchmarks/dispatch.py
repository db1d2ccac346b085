"""Times a layer's experts, in several ways and in PyTorch, on given choices.

  python -m experiments.benchmarks.dispatch [--repeats=15] [--threads=2] \\
      [--sizes=2048x16x4,256x64x8,2048x64x8] [--width=512] \\
      [--hidden=1408] [--dtype=float32] [--memory=8] \\
      ['--skip=ragged_dot,torch loop']

Sizes are tokens x experts x experts per token. Each line takes tokens through
SwiGLU experts and back: `grouped` and `capacity` of moe_jax.parallel.dispatch,
the latter with room for the largest load, so that nothing is dropped;
`ragged_dot` is `grouped` with `lax.ragged_dot` in place of `grouped_matmul`;
`torch loop` selects each expert's tokens in turn, and `torch grouped_mm` sorts
them and calls torch.nn.functional.grouped_mm. `batched` is the products alone,
of equal groups that are in order already: the same FLOPs and nothing else.

All take turns; printed are medians of milliseconds, of the forward pass and of
forward and backward together (gradients of tokens, gates and weights), and the
median and range of the latter's ratios to `batched` in the same turn. Below are
parts of it: sorting the pairs of token and expert, gathering their rows, and
summing the rows' gradients, beside a pass that reads and writes as many rows.

Results are checked to be equal first. A line that would take more than --memory
GB is skipped, as `ragged_dot` is on CPU with many rows and experts. Where torch
is not installed, so are its lines. For figures of one device, give JAX just
one.
"""

import argparse
from collections.abc import Callable
import functools
import math
import statistics
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import arguments
from experiments.benchmarks.routing import milliseconds, random_scores, spread
from moe_jax import routing
from moe_jax.parallel import dispatch
from moe_jax.parallel.compilers import compiler_options

try:
  import torch
except ImportError:
  torch = None

COLUMNS = ('forward ms', 'both ms', 'both / batched')


class Problem(NamedTuple):
  """What all lines compute on; expert weights are [E, in, out]."""

  experts_TxK: jax.Array
  load_E: jax.Array
  x_TxD: jax.Array
  gates_TxK: jax.Array
  weights: dispatch.ExpertWeights


def make_problem(
  tokens: int, experts: int, k: int, *, width: int, hidden: int, dtype: str
) -> Problem:
  """Draws tokens and weights, and balances random scores by `bip`."""
  scores = random_scores(tokens, experts)
  balancer = routing.bip()
  q_E, _ = balancer.solve(balancer.init(experts), scores, k=k)
  choice = routing.choose(scores, q_E, k=k)
  shapes = [
    (tokens, width),
    (experts, width, hidden),
    (experts, width, hidden),
    (experts, hidden, width),
  ]
  keys = jax.random.split(jax.random.key(0), len(shapes))
  x, *weights = (
    (jax.random.normal(key, shape) * shape[-2] ** -0.5).astype(dtype)
    for key, shape in zip(keys, shapes, strict=True)
  )
  return Problem(
    choice.experts,
    choice.load,
    x,
    choice.gates,
    dispatch.ExpertWeights(*weights),
  )


def grouped(experts_TxK, load_E, x_TxD, gates_TxK, weights):
  """Packs the rows of all experts."""
  choice = routing.Choice(
    experts_TxK, gates_TxK, load_E, jnp.ones(gates_TxK.shape, bool)
  )
  return dispatch.grouped(x_TxD, choice, weights).y


def ragged_dot(*problem):
  """Packs the rows, and leaves the products to `lax.ragged_dot`."""
  with mock.patch.object(dispatch, 'grouped_matmul', lax.ragged_dot):
    return grouped(*problem)


def capacity(experts_TxK, load_E, x_TxD, gates_TxK, weights, *, room):
  """Gives each expert a buffer for `room` tokens."""
  choice = routing.Choice(
    experts_TxK, gates_TxK, load_E, jnp.ones(gates_TxK.shape, bool)
  )
  return dispatch.capacity(x_TxD, choice, weights, capacity=room).y


def batched(experts_TxK, load_E, x_TxD, gates_TxK, weights):
  """Does as many FLOPs, with nothing to sort, gather or mix."""
  del gates_TxK
  experts, k = load_E.shape[0], experts_TxK.shape[1]
  x_ExCxD = jnp.tile(x_TxD, (k, 1)).reshape(experts, -1, x_TxD.shape[1])
  gate_ExCxF = jnp.einsum('ecd,edf->ecf', x_ExCxD, weights.gate_ExDxF)
  up_ExCxF = jnp.einsum('ecd,edf->ecf', x_ExCxD, weights.up_ExDxF)
  hidden_ExCxF = jax.nn.silu(gate_ExCxF) * up_ExCxF
  return jnp.einsum('ecf,efd->ecd', hidden_ExCxF, weights.down_ExFxD)


def torch_loop(experts_TxK, load_E, x_TxD, gates_TxK, weights):
  """Applies one expert after the other to the tokens that chose it."""
  y_TxD = torch.zeros_like(x_TxD)
  for expert, (gate, up, down) in enumerate(zip(*weights, strict=True)):
    token, rank = torch.where(experts_TxK == expert)
    x = x_TxD[token]
    y = (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down
    y = y * gates_TxK[token, rank, None].to(y.dtype)
    y_TxD = y_TxD.index_add(0, token, y)
  return y_TxD


def torch_grouped(experts_TxK, load_E, x_TxD, gates_TxK, weights):
  """Sorts the rows by expert, multiplies them in one call, adds them up."""
  order = torch.argsort(experts_TxK.flatten(), stable=True)
  token = order // experts_TxK.shape[1]
  product = functools.partial(
    torch.nn.functional.grouped_mm, offs=load_E.cumsum(0, dtype=torch.int32)
  )
  gate, up, down = weights
  x = x_TxD[token]
  hidden = torch.nn.functional.silu(product(x, gate)) * product(x, up)
  y = product(hidden, down) * gates_TxK.flatten()[order, None].to(x.dtype)
  return torch.zeros_like(x_TxD).index_add(0, token, y)


class Line(NamedTuple):
  """Calls that compute a line of the table once, and GB they need if known."""

  forward: Callable[[], Any]
  both: Callable[[], Any]
  memory: float = 0.0


def jax_line(function: Callable[..., jax.Array], problem: Problem) -> Line:
  """Compiles a function of a problem."""

  def both(problem, dy):
    choice, operands = problem[:2], problem[2:]
    y, pullback = jax.vjp(functools.partial(function, *choice), *operands)
    return y, pullback(dy)

  jit = functools.partial(
    jax.jit, compiler_options=compiler_options(jax.devices())
  )
  dy = jnp.ones_like(jax.eval_shape(function, *problem))
  forward = jit(function).lower(*problem).compile()
  both = jit(both).lower(problem, dy).compile()
  return Line(
    lambda: jax.block_until_ready(forward(*problem)),
    lambda: jax.block_until_ready(both(problem, dy)),
    both.memory_analysis().temp_size_in_bytes / 1e9,
  )


def torch_line(function: Callable[..., Any], problem: Problem) -> Line:
  """Copies a problem to torch."""

  def copy(x):
    # NumPy has no bfloat16 that torch knows.
    wide = x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    tensor = torch.from_numpy(np.array(wide))
    return tensor.to(torch.bfloat16) if wide is not x else tensor

  problem = jax.tree.map(copy, problem)
  operands = jax.tree.leaves(problem[2:])
  for operand in operands:
    operand.requires_grad_()
  dy = torch.ones_like(problem.x_TxD)

  def both():
    y = function(*problem)
    return y, torch.autograd.grad(y, operands, dy)

  return Line(torch.no_grad()(lambda: function(*problem)), both)


def lines(problem: Problem, skip: list[str]) -> dict[str, Line]:
  """Returns all lines but those to skip, `batched` first."""
  room = int(problem.load_E.max())
  ours = {
    'batched': batched,
    'grouped': grouped,
    'capacity': functools.partial(capacity, room=room),
    'ragged_dot': ragged_dot,
  }
  theirs = {'torch loop': torch_loop, 'torch grouped_mm': torch_grouped}
  if not torch:
    theirs = {}
  return {
    name: make(function, problem)
    for functions, make in ((ours, jax_line), (theirs, torch_line))
    for name, function in functions.items()
    if name == 'batched' or name not in skip
  }


def check(table: dict[str, Line], tolerance: float) -> None:
  """Raises an AssertionError if lines differ in value or gradients."""
  results = {
    name: [
      np.asarray(x.float().detach() if torch and torch.is_tensor(x) else x)
      for x in jax.tree.leaves(line.both())
    ]
    for name, line in table.items()
    if name != 'batched'
  }
  expected = next(iter(results.values()))
  for name, result in results.items():
    for a, b in zip(result, expected, strict=True):
      a, b = (x.astype(np.float32) for x in (a, b))
      np.testing.assert_allclose(
        a, b, atol=tolerance * np.abs(b).max(), rtol=0, err_msg=name
      )


def compare(table: dict[str, Line], repeats: int) -> None:
  """Prints the lines of one size."""
  times = []
  for turn in range(repeats + 1):
    columns = [
      [milliseconds(run) for run in line[:2]] for line in table.values()
    ]
    if turn:  # The first one is slower.
      times.append(columns)
  medians = np.median(times, axis=0)
  print(' ' * 16 + ''.join(f'{column:>26s}' for column in COLUMNS))
  for i, name in enumerate(table):
    ratio = spread(turn[i][1] / turn[0][1] for turn in times)
    cells = [*(f'{median:.1f}' for median in medians[i]), ratio]
    print(f'{name:16s}' + ''.join(f'{cell:>26s}' for cell in cells))


def _wait_for(run: Callable[[], jax.Array]) -> None:
  jax.block_until_ready(run())


def compare_moves(problem: Problem, repeats: int) -> None:
  """Prints how long rows take to travel, beside a pass over as many."""
  k = problem.experts_TxK.shape[1]
  order_N = jnp.argsort(problem.experts_TxK.reshape(-1), stable=True)
  token_N = order_N // k
  row_TxK = jnp.argsort(order_N).reshape(-1, k)
  x_NxD = problem.x_TxD[token_N]

  def there(x_TxD):
    return dispatch.take_rows(x_TxD, token_N, row_TxK)

  def back(dy_NxD):
    _, pullback = jax.vjp(there, problem.x_TxD)
    return pullback(dy_NxD)

  calls = {
    'pass over rows': functools.partial(jax.jit(lambda x: 2 * x), x_NxD),
    'sort pairs': functools.partial(
      jax.jit(functools.partial(jnp.argsort, stable=True)),
      problem.experts_TxK.reshape(-1),
    ),
    'gather rows': functools.partial(jax.jit(there), problem.x_TxD),
    'sum gradients': functools.partial(jax.jit(back), x_NxD),
  }
  waited = [functools.partial(_wait_for, run) for run in calls.values()]
  times = [list(map(milliseconds, waited)) for _ in range(repeats + 1)]
  times = times[1:]  # The first one is slower.
  for name, column in zip(calls, zip(*times, strict=True), strict=True):
    ratio = spread(t / turn[0] for t, turn in zip(column, times, strict=True))
    print(
      f'{name:16s}{statistics.median(column):26.2f} ms, to the pass {ratio}'
    )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--repeats', type=int, default=15)
  parser.add_argument('--threads', type=int, default=2, help='of torch')
  arguments.add_sizes(parser, '2048x16x4,256x64x8,2048x64x8')
  parser.add_argument('--width', type=int, default=512)
  parser.add_argument('--hidden', type=int, default=1408)
  parser.add_argument(
    '--dtype', default='float32', choices=['float32', 'bfloat16']
  )
  parser.add_argument('--memory', type=float, default=8.0, help='GB of a line')
  parser.add_argument('--skip', default='', help='lines, separated by commas')
  options = parser.parse_args()
  if torch:
    torch.set_num_threads(options.threads)
  else:
    print('torch cannot be imported: no comparison')
  for tokens, experts, k in options.sizes:
    if tokens * k % experts:
      multiple = experts // math.gcd(k, experts)
      parser.error(
        f'--sizes={tokens}x{experts}x{k}: {tokens} x {k} rows are not '
        f'{experts} equal groups; tokens must be a multiple of {multiple}'
      )
    problem = make_problem(
      tokens,
      experts,
      k,
      width=options.width,
      hidden=options.hidden,
      dtype=options.dtype,
    )
    violation = routing.max_violation(problem.load_E)
    print(
      f'\n{tokens} tokens, {experts} experts, {k} per token, '
      f'{options.width} x {options.hidden}, {options.dtype}; '
      f'MaxVio {violation:.2f}'
    )
    table = lines(problem, options.skip.split(','))
    for name, line in list(table.items()):
      if line.memory > options.memory:
        print(f'{name} is skipped: it would take {line.memory:.1f} GB')
        del table[name]
    check(table, 1e-5 if options.dtype == 'float32' else 2e-2)
    compare(table, options.repeats)
    compare_moves(problem, options.repeats)


if __name__ == '__main__':
  main()
