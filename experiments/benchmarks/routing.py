"""Times routing against the same rules written in PyTorch with torch.topk.

  python -m experiments.benchmarks.routing [--repeats=15] [--threads=2] \\
      [--sizes=4096x16x4,16384x64x8,65536x64x8,131072x256x8] \\
      [--models=experiments/mini_16e.py,experiments/mini_64e.py]

Sizes are tokens x experts x experts per token; solves are of 4 iterations.
Results are checked to be equal first. JAX and PyTorch take turns; printed are
medians of milliseconds, and the median and range of the ratios of pairs.
`memory` is what XLA needs at its peak beside inputs and results, in units of
the score matrix. Where torch is not installed, its columns are skipped. For
figures of one device, give JAX just one.

Then the CPU time of a layer's router with what the metrics of a step are made
of, over that without it, likewise of pairs in turns. Last, for the train step
of each model under bip: layers x solve of as many tokens as the first size
with its experts has, as a share of the time that the step takes for as many
tokens.
"""

import argparse
from collections.abc import Callable, Iterable
import dataclasses
import functools
import statistics
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import arguments, train_step
from moe_jax import config as config_lib
from moe_jax import main as command_line
from moe_jax import nn, routing
from moe_jax.nn import router
from moe_jax.routing import order_statistic

try:
  import torch
except ImportError:
  torch = None

ITERATIONS = 4
COLUMNS = ('JAX ms', 'torch ms', 'torch / JAX', 'memory')


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


def update(scores_TxE, q_E, k, balancer):
  """Runs a rule that moves q after the choice, without the choice itself."""
  state = balancer.init(scores_TxE.shape[1])._replace(q=q_E)
  first_TxK = jnp.broadcast_to(jnp.arange(k), (len(scores_TxE), k))
  choice = routing.replay(scores_TxE, first_TxK)
  seen = balancer.observe(state, q_E, scores_TxE, choice, k=k)
  return balancer.update(state, seen, k=k).q


def torch_histogram(scores, q, k, bins=1000):
  """Does what `quantile(estimator='histogram')` does after the choice."""
  tokens, experts = scores.shape
  capacity = tokens * k // experts
  p = torch.topk(scores - q, k + 1, dim=1).values[:, -1:]
  top, span = q.max() + 1, q.max() - q.min() + 2
  depth = ((top - (scores - p)) * (bins / span)).long().clamp(0, bins - 1)
  depth += torch.arange(experts) * bins
  count = torch.bincount(depth.flatten(), minlength=experts * bins)
  count = count.view(experts, bins)
  through = count.cumsum(1)
  found = (through > capacity).int().argmax(1, keepdim=True)
  inside = count.gather(1, found)
  rank = capacity - (through.gather(1, found) - inside) + 0.5
  q = (top - (found + rank / inside) * (span / bins)).squeeze(1)
  return q - q.mean()


def sinkhorn(scores_TxE, q_E, k):
  """Runs `sinkhorn` with as many iterations as the other rules."""
  balancer = routing.sinkhorn(ITERATIONS)
  return balancer.solve(routing.State(q_E), scores_TxE, k=k)[0]


def torch_sinkhorn(scores, q, k, temperature=0.02):
  """Does what `sinkhorn` does."""
  tokens, experts = scores.shape
  for _ in range(ITERATIONS):
    p = temperature * (
      torch.logsumexp((scores - q) / temperature, 1) - np.log(k)
    )
    column = torch.logsumexp((scores - p[:, None]) / temperature, 0)
    q = temperature * (column - np.log(tokens * k / experts))
  return q - q.mean()


def rounded(scores_TxE, q_E, k):
  """Rounds the choice by the prices of the midpoint rule, given."""
  tokens, experts = scores_TxE.shape
  capacity = -(-tokens * k // experts)
  return routing.round_to_capacity(scores_TxE, q_E, k=k, capacity=capacity)


def choose(scores_TxE, q_E, k):
  """Chooses the experts."""
  choice = routing.choose(scores_TxE, q_E, k=k)
  return choice.experts, choice.gates, choice.load


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
  'histogram': Task(
    functools.partial(update, balancer=routing.quantile(estimator='histogram')),
    torch_histogram,
  ),
  'sinkhorn': Task(sinkhorn, torch_sinkhorn),
  'rounding': Task(rounded),
  'choose': Task(choose, torch_choose),
  'column cutoff': Task(column_cutoff, torch_column_cutoff),
  'row cutoff': Task(row_cutoff, torch_row_cutoff),
}


def milliseconds(run: Callable[[], Any]) -> float:
  """Times one call."""
  started = time.perf_counter()
  run()
  return (time.perf_counter() - started) * 1e3


def spread(ratios: Iterable[float]) -> str:
  """Formats median and range."""
  ratios = sorted(ratios)
  return (
    f'{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})'
  )


def cpu_seconds(run: Callable[[], Any]) -> float:
  """Times one call on all cores; other programs do not count."""
  started = time.process_time()
  run()
  return time.process_time() - started


def compare(
  task: Task, scores_TxE: jax.Array, q_E: jax.Array, k: int, repeats: int
) -> dict[str, str]:
  """Checks that both compute the same; returns the columns of a task's line."""
  compiled = (
    jax.jit(task.ours, static_argnums=2).lower(scores_TxE, q_E, k).compile()
  )
  runs = [lambda: jax.block_until_ready(compiled(scores_TxE, q_E))]
  if torch and task.theirs:
    scores, q = (torch.from_numpy(np.array(x)) for x in (scores_TxE, q_E))
    runs.append(lambda: task.theirs(scores, q, k))
  results = [jax.tree.leaves(run()) for run in runs]  # Slower than later ones.
  for each in zip(*results, strict=True):
    np.testing.assert_allclose(each[-1], each[0], rtol=0, atol=1e-5)
  times = [[milliseconds(run) for run in runs] for _ in range(repeats)]
  medians = [statistics.median(column) for column in zip(*times, strict=True)]
  row = {'JAX ms': f'{medians[0]:.2f}'}
  if len(runs) == 2:
    row['torch ms'] = f'{medians[1]:.2f}'
    row['torch / JAX'] = spread(theirs / ours for ours, theirs in times)
  memory = compiled.memory_analysis().temp_size_in_bytes
  row['memory'] = f'{memory / scores_TxE.nbytes:.2f}'
  return row


def share_of_step(path: str, sizes: list[tuple[int, int, int]], repeats: int):
  """Prints what part of a model's train step its solves are."""
  config = config_lib.freeze(command_line.load_experiment(path, 'bip'))
  model = config.model
  batch = min(config.batch_size, 4096 // config.sequence_length)
  config = dataclasses.replace(config, batch_size=batch, accumulation=1)
  experts_and_k = model.experts, model.experts_per_token
  tokens = next((n for n, *size in sizes if tuple(size) == experts_and_k), None)
  if tokens is None:
    print(f'{path}: left out, as no size has its experts and k {experts_and_k}')
    return
  scores = random_scores(tokens, model.experts)
  solver = jax.jit(functools.partial(solve, k=model.experts_per_token))
  text = np.random.default_rng(0).integers(
    config.data.vocabulary,
    size=(batch, config.sequence_length + 1),
    dtype=np.int32,
  )
  step, _ = train_step.our_step(config, text)
  zero = jnp.zeros(model.experts)
  runs = [step, lambda: jax.block_until_ready(solver(scores, zero))]
  for run in runs:
    run()
  times = [[milliseconds(run) for run in runs] for _ in range(repeats)]
  step_ms, solve_ms = (
    statistics.median(column) for column in zip(*times, strict=True)
  )
  per_token = step_ms / (batch * config.sequence_length)
  layers = model.layers - model.dense_layers
  share = layers * solve_ms / (tokens * per_token)
  print(
    f'{path}: {layers} layers x {solve_ms:.2f} ms for {tokens} tokens, '
    f'{share:.2%} of {per_token * 1e3:.1f} us a token'
  )


def cost_of_metrics(tokens: int, experts: int, k: int, repeats: int) -> None:
  """Prints a router's CPU time with what its metrics need, over without."""
  config = nn.MoEConfig(experts=experts, experts_per_token=k, hidden=1)
  moe = nn.MoE(config, routing.bip(ITERATIONS), rngs=nnx.Rngs(0))
  x_BxSxD = jax.random.normal(jax.random.key(1), (8, tokens // 8, config.width))

  @functools.partial(jax.jit, static_argnums=1)
  def forward(x_BxSxD, measured):
    output, moved = router.route(
      x_BxSxD,
      moe.router[...],
      moe.state.get_value(),
      moe.so_far.get_value(),
      moe.balancer,
      moe.select,
      config,
      train=True,
    )
    told = (output.sums, output.most) if measured else None
    return output.choice, moved, told

  runs = [
    lambda: jax.block_until_ready(forward(x_BxSxD, False)),
    lambda: jax.block_until_ready(forward(x_BxSxD, True)),
  ]
  for run in runs:
    run()
  times = [[cpu_seconds(run) for run in runs] for _ in range(repeats)]
  ratios = sorted(measured / plain for plain, measured in times)
  print(
    f'router of {tokens} tokens, {experts} experts, {k} per token: with '
    f'metrics {statistics.median(ratios):.3f} ({ratios[0]:.3f} to '
    f'{ratios[-1]:.3f}) of the CPU time without'
  )


def random_scores(tokens: int, experts: int) -> jax.Array:
  """Some experts are liked better, as they are before balancing."""
  logits, bias = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate([(tokens, experts), (experts,)])
  )
  return jax.nn.softmax(logits + bias)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--repeats', type=int, default=15)
  parser.add_argument('--threads', type=int, default=2, help='of torch')
  arguments.add_sizes(parser, '4096x16x4,16384x64x8,65536x64x8,131072x256x8')
  parser.add_argument(
    '--models', default='experiments/mini_16e.py,experiments/mini_64e.py'
  )
  options = parser.parse_args()
  if torch:
    torch.set_num_threads(options.threads)
  else:
    print('torch cannot be imported: no comparison')
  for tokens, experts, k in options.sizes:
    scores = random_scores(tokens, experts)
    prices = routing.midpoint().solve(
      routing.State(jnp.zeros(experts)), scores, k=k
    )[0]
    print(f'\n{tokens} tokens, {experts} experts, {k} per token')
    for i, (name, task) in enumerate(TASKS.items()):
      q_E = prices if name == 'rounding' else jnp.zeros(experts)
      row = compare(task, scores, q_E, k, options.repeats)
      if i == 0:
        print(' ' * 14 + ''.join(f'{column:>26s}' for column in COLUMNS))
      cells = [row.get(column, '') for column in COLUMNS]
      print(f'{name:14s}' + ''.join(f'{cell:>26s}' for cell in cells))
  print()
  for tokens, experts, k in options.sizes:
    cost_of_metrics(tokens, experts, k, options.repeats)
  for path in filter(None, options.models.split(',')):
    share_of_step(path, options.sizes, options.repeats)


if __name__ == '__main__':
  main()
