"""Says how well each rule balances, on scores whose best assignment is known.

  python -m experiments.benchmarks.balance [--tokens=2048] [--seeds=5] \\
      [--batches=100] [--sizes=16x4,64x8]

Scores are softmax of Gaussian logits with a Gaussian bias per expert. Prints
Markdown tables: one batch from q = 0, and a stream of fresh batches whose bias
drifts, with q kept from batch to batch. `objective` is the sum of the chosen
scores over that of the best assignment with even loads, by linear programming:
above 1 is possible, as nothing holds the choice to even loads. `rounded` is the
same after `round_to_capacity`, which holds it, so 1 is the best. The standard
deviation over seeds or batches is in parentheses.
"""

import argparse
from collections.abc import Iterator
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import arguments
from moe_jax import routing

SKEWS = (0.3, 1.0, 2.0)  # standard deviation of the bias of experts
DRIFT = 0.1  # how much of the bias is new in each batch of the stream
LAST = 3  # batches of the stream whose best assignment is computed

FRESH = {
  'plain top-k': routing.unbalanced(),
  **{
    f'{name}, T={t}': rule(t)
    for t in (1, 2, 4, 8, 14)
    for name, rule in (
      ('bip', routing.bip),
      ('bip, no clip', functools.partial(routing.bip, clip=False)),
      ('midpoint', routing.midpoint),
    )
  },
  'sinkhorn, 8 iterations': routing.sinkhorn(8),
}

STREAM = {
  'plain top-k': routing.unbalanced(),
  'loss_free, u=0.001': routing.loss_free(),
  'loss_free, u=0.01': routing.loss_free(0.01),
  'loss_free, proportional, u=0.01': routing.loss_free(
    0.01, rule='proportional'
  ),
  'quantile': routing.quantile(),
  'quantile, EMA 0.5': routing.quantile(ema=0.5),
  'quantile, histogram': routing.quantile(estimator='histogram'),
  'sinkhorn, 8 iterations': routing.sinkhorn(8),
  **{
    f'{name}, T={t}{", lag" if lag else ""}': rule(t, lag=lag)
    for lag in (False, True)
    for t in (1, 4)
    for name, rule in (
      ('bip', routing.bip),
      ('bip, no clip', functools.partial(routing.bip, clip=False)),
      ('midpoint', routing.midpoint),
    )
  },
}


class Measured(NamedTuple):
  """Of one batch under one rule.

  Attributes:
    violation: MaxVio.
    idlest: MinVio.
    objective: sum of the chosen scores.
    rounded: the same after rounding.
  """

  violation: float
  idlest: float
  objective: float
  rounded: float


@functools.partial(jax.jit, static_argnames=('balancer', 'k'))
def step(balancer, state, scores_TxE, *, k):
  """One step of a rule; returns its state and what is measured."""
  tokens, experts = scores_TxE.shape
  q_E, state = balancer.solve(state, scores_TxE, k=k)
  choice = routing.choose(scores_TxE, q_E, k=k)
  seen = balancer.observe(state, q_E, scores_TxE, choice, k=k)
  rounded = routing.round_to_capacity(
    scores_TxE, q_E, k=k, capacity=-(-tokens * k // experts)
  )
  measured = Measured(
    routing.max_violation(choice.load),
    routing.min_violation(choice.load),
    jnp.sum(choice.gates),
    jnp.sum(rounded.gates),
  )
  return balancer.update(state, seen, k=k), measured


def batches(
  seed: int, tokens: int, experts: int, skew: float, drift: float
) -> Iterator[jax.Array]:
  """Yields the scores of one batch after the other, without end."""
  random = np.random.default_rng(seed)
  bias_E = random.normal(size=experts)
  while True:
    logits = random.normal(size=(tokens, experts)) + skew * bias_E
    yield jax.nn.softmax(jnp.asarray(logits, jnp.float32))
    # A walk that keeps its variance.
    bias_E = np.sqrt(1 - drift**2) * bias_E + drift * random.normal(
      size=experts
    )


def optimum(scores_TxE: jax.Array, k: int) -> float:
  """Returns the best objective with even loads and k experts a token."""
  return routing.lp_optimum(scores_TxE, k, rows_equal=True).value


def cell(values) -> str:
  """Formats mean and standard deviation."""
  return f'{np.mean(values):.3f} ({np.std(values):.3f})'


def print_table(title: str, columns: list[str], rows: dict[str, list[str]]):
  """Prints Markdown."""
  print(f'\n### {title}\n\n| rule | {" | ".join(columns)} |')
  print('| --- |' + ' ---: |' * len(columns))
  for name, cells in rows.items():
    print(f'| {name} | {" | ".join(cells)} |', flush=True)


def fresh(tokens: int, experts: int, k: int, skew: float, seeds: int) -> None:
  """Prints the table of one batch from q = 0, for several seeds."""
  scores = [
    next(batches(seed, tokens, experts, skew, DRIFT)) for seed in range(seeds)
  ]
  best = np.array([optimum(s, k) for s in scores])
  rows = {}
  for name, balancer in FRESH.items():
    start = balancer.init(experts)
    seen = [step(balancer, start, s, k=k)[1] for s in scores]
    seen = Measured(*np.array(seen, np.float64).T)
    rows[name] = [
      cell(seen.violation),
      cell(seen.idlest),
      cell(seen.objective / best),
      f'{np.mean(seen.rounded / best):.5f}',
    ]
  print_table(
    f'One batch from q = 0: {tokens} tokens, {experts} experts, {k} a token, '
    f'bias {skew}, {seeds} seeds',
    ['MaxVio', 'MinVio', 'objective', 'rounded'],
    rows,
  )


def stream(tokens: int, experts: int, k: int, skew: float, count: int) -> None:
  """Prints the table of a drifting stream, q kept from batch to batch."""
  source = batches(0, tokens, experts, skew, DRIFT)
  scores = [next(source) for _ in range(count)]
  best = np.array([optimum(s, k) for s in scores[-LAST:]])
  rows = {}
  for name, balancer in STREAM.items():
    state, seen = balancer.init(experts), []
    for s in scores:
      state, measured = step(balancer, state, s, k=k)
      seen.append(measured)
    seen = Measured(*np.array(seen, np.float64).T)
    late = slice(count // 5, None)
    rows[name] = [
      f'{seen.violation[0]:.3f}',
      cell(seen.violation[late]),
      f'{np.max(seen.violation[late]):.3f}',
      cell(seen.objective[-LAST:] / best),
      f'{np.mean(seen.rounded[-LAST:] / best):.5f}',
    ]
  print_table(
    f'Stream: {count} batches of {tokens} tokens, {experts} experts, {k} a '
    f'token, bias {skew}, drift {DRIFT}',
    [
      'MaxVio, first',
      f'MaxVio, from batch {count // 5} on',
      'greatest of these',
      f'objective, last {LAST}',
      f'rounded, last {LAST}',
    ],
    rows,
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--tokens', type=int, default=2048)
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--batches', type=int, default=100)
  arguments.add_sizes(parser, '16x4,64x8')
  options = parser.parse_args()
  for experts, k in options.sizes:
    for skew in SKEWS:
      fresh(options.tokens, experts, k, skew, options.seeds)
    stream(options.tokens, experts, k, 1.0, options.batches)


if __name__ == '__main__':
  main()
