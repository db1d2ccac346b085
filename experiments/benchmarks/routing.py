"""Times routing against the same rules written in PyTorch with torch.topk.

  python -m experiments.benchmarks.routing [--repeats=15] [--threads=2] \\
      [--sizes=4096x16x4,16384x64x8,65536x64x8,131072x256x8]

Sizes are tokens x experts x experts per token; solves are of 4 iterations. JAX
and PyTorch take turns; printed are medians of milliseconds, and the median and
range of the ratios of pairs. `memory` is what XLA needs at its peak beside
inputs and results, in units of the score matrix. Where torch is not installed,
its columns are left out. For figures of one device, give JAX just one.
"""

import argparse
from collections.abc import Callable
import functools
import statistics
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import routing
from moe_jax.routing import order_statistic

try:
  import torch
except ImportError:
  torch = None

ITERATIONS = 4


class Task(NamedTuple):
  """One line of the table.

  Attributes:
    ours: `(scores_TxE, q_E, k) -> result`, jitted here with k static.
    theirs: the same of torch tensors, or None.
  """

  ours: Callable[..., Any]
  theirs: Callable[..., Any] | None = None


def solve(scores_TxE, q_E, k, **options):
  """Runs a rule of `dual_iterations`."""
  return routing.dual_iterations(
    scores_TxE, q_E, k=k, iterations=ITERATIONS, **options
  )


def torch_solve(scores, q, k, clip=True, cutoff='next'):
  """Does what `solve` does, with torch.topk."""
  tokens, experts = scores.shape
  capacity = tokens * k // experts

  def cut(x, rank, dim):
    largest = torch.topk(x, rank + 1, dim=dim).values
    after = largest.select(dim, rank)
    if cutoff == 'midpoint':
      after = (largest.select(dim, rank - 1) + after) * 0.5
    return after.clamp(min=0) if clip else after

  for _ in range(ITERATIONS):
    p = cut(scores - q, k, 1)
    q = cut(scores - p[:, None], capacity, 0)
  return q


def choose(scores_TxE, q_E, k):
  """Chooses the experts."""
  return routing.choose(scores_TxE, q_E, k=k)


def torch_choose(scores, q, k):
  """Does what `choose` does."""
  experts = torch.topk(scores - q, k, dim=1).indices
  load = torch.bincount(experts.flatten(), minlength=scores.shape[1])
  return experts, scores.gather(1, experts), load


def column_cutoff(scores_TxE, q_E, k):
  """Selects what is left over by a full expert."""
  rank = scores_TxE.shape[0] * k // scores_TxE.shape[1] + 1
  return routing.kth_largest(scores_TxE, rank, axis=0)


def torch_column_cutoff(scores, q, k):
  """Does what `column_cutoff` does."""
  rank = scores.shape[0] * k // scores.shape[1] + 1
  return torch.topk(scores, rank, dim=0).values[-1]


def row_cutoff(scores_TxE, q_E, k):
  """Selects each token's best expert but k."""
  return order_statistic.kth_and_next_of_row(scores_TxE, k)[1]


def torch_row_cutoff(scores, q, k):
  """Does what `row_cutoff` does."""
  return torch.topk(scores, k + 1, dim=1).values[:, -1]


def _rule(**options) -> Task:
  return Task(
    functools.partial(solve, **options),
    functools.partial(torch_solve, **options),
  )


# The line's name -> its task; a new rule is one more entry.
TASKS = {
  'bip': _rule(),
  'quantile rule': _rule(clip=False),
  'midpoint': _rule(clip=False, cutoff='midpoint'),
  'choose': Task(choose, torch_choose),
  'column cutoff': Task(column_cutoff, torch_column_cutoff),
  'row cutoff': Task(row_cutoff, torch_row_cutoff),
}


def milliseconds(run: Callable[[], Any]) -> float:
  """Times one call."""
  started = time.perf_counter()
  run()
  return (time.perf_counter() - started) * 1e3


def compare(
  task: Task, scores_TxE: jax.Array, k: int, repeats: int
) -> dict[str, str]:
  """Returns the columns of a task's line."""
  q_E = jnp.zeros(scores_TxE.shape[1])
  compiled = (
    jax.jit(task.ours, static_argnums=2).lower(scores_TxE, q_E, k).compile()
  )
  runs = [lambda: jax.block_until_ready(compiled(scores_TxE, q_E))]
  if torch and task.theirs:
    scores, q = (torch.from_numpy(np.array(x)) for x in (scores_TxE, q_E))
    runs.append(lambda: task.theirs(scores, q, k))
  for run in runs:
    run()  # The first one is slower.
  times = [[milliseconds(run) for run in runs] for _ in range(repeats)]
  medians = [statistics.median(column) for column in zip(*times, strict=True)]
  row = {'JAX ms': f'{medians[0]:.2f}'}
  if len(runs) == 2:
    ratios = sorted(theirs / ours for ours, theirs in times)
    row['torch ms'] = f'{medians[1]:.2f}'
    row['torch / JAX'] = (
      f'{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})'
    )
  memory = compiled.memory_analysis().temp_size_in_bytes
  row['memory'] = f'{memory / scores_TxE.nbytes:.2f}'
  return row


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--repeats', type=int, default=15)
  parser.add_argument('--threads', type=int, default=2, help='of torch')
  parser.add_argument(
    '--sizes', default='4096x16x4,16384x64x8,65536x64x8,131072x256x8'
  )
  options = parser.parse_args()
  if torch:
    torch.set_num_threads(options.threads)
  else:
    print('torch cannot be imported: no comparison')
  for size in options.sizes.split(','):
    tokens, experts, k = map(int, size.split('x'))
    # Experts differ in how much they are liked, as they do before balancing.
    logits, bias = (
      jax.random.normal(jax.random.key(i), shape)
      for i, shape in enumerate([(tokens, experts), (experts,)])
    )
    scores = jax.nn.softmax(logits + bias)
    print(f'\n{tokens} tokens, {experts} experts, {k} per token')
    for i, (name, task) in enumerate(TASKS.items()):
      row = compare(task, scores, k, options.repeats)
      if i == 0:
        print(' ' * 14 + ''.join(f'{column:>26s}' for column in row))
      print(f'{name:14s}' + ''.join(f'{value:>26s}' for value in row.values()))


if __name__ == '__main__':
  main()
