"""Says how near prices come to the optimum, by iterations, and who cycles.

  python -m experiments.benchmarks.duality [--seeds=2] [--iterations=1000] \\
      [--sizes=512x16x4,512x64x8] [--out=experiments/results/benchmarks]

Instances are the golden ones and fresh softmax scores of Gaussian logits with a
bias per expert. From q = 0, each rule of `dual_iterations` makes up to 1,000
iterations on one batch. Measured are the duality gap, relative to the optimum
of the linear program with k experts for every token and at most the capacity
for every expert; MaxVio of the choice; and whether the prices, as bits, come to
a fixed point, cycle, or still move at the end.

The rival is an auction with epsilon scaling: tokens bid for experts, which keep
their best bids. A round is one step that waits for the one before; its work is
that of the tokens which still bid, so the sum is given in passes over the score
matrix, of which a dual iteration makes two.

Then, with groups of experts of which a token may use some: prices that ignore
the groups (`ignored`), that are solved on the experts which compete when a
batch begins, the others at -inf (`masked`; a batch every 4 iterations), or
after each iteration (`each`), and those of `dual_iterations` with groups
(`ours`), against the optimum of the linear program with fractions of groups.
Writes duality.md, .json and .png.
"""

import argparse
import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import arguments, balance
from moe_jax import routing
from moe_jax.routing import oracle

RULES = {
  'bip': {'clip': True, 'cutoff': 'next'},
  **{c: {'clip': False, 'cutoff': c} for c in ('next', 'linear', 'kth')},
  'midpoint': {'clip': False, 'cutoff': 'midpoint'},
}
GOLDEN = pathlib.Path(__file__).parents[2] / 'tests/golden/assignment.npz'
SHOWN = (1, 2, 4, 14, 100, 1000)
SKEWS = (0.3, 2.0)
SCALES = 0.2 ** np.arange(1, 8)  # epsilon over the greatest score, in turn
GROUPS = ((256, 32, 4, 8, 2), (256, 32, 4, 8, 4))  # tokens, E, k, G, of them


def iterate(scores_TxE, q_E, k: int, *, clip: bool, cutoff: str) -> np.ndarray:
  """Does one of `dual_iterations` in NumPy, bit for bit, without compiling."""
  tokens, experts = scores_TxE.shape
  capacity = tokens * k // experts

  def cut(x, rank, way):
    x = np.partition(x, (x.shape[1] - rank - 1, x.shape[1] - rank), axis=1)
    following, kth = x[:, -rank - 1], x[:, -rank]
    length = np.where(following > -np.inf, kth - following, np.float32(0))
    point = {
      'next': following,
      'kth': kth,
      'midpoint': (kth + following) * np.float32(0.5),
      'linear': following + length * np.float32(way),
    }[cutoff]
    return np.maximum(point, np.float32(0)) if clip else point

  with np.errstate(invalid='ignore'):  # -inf less -inf.
    p_T = cut(scores_TxE - q_E, k, k / experts)
    margin_ExT = np.ascontiguousarray((scores_TxE - p_T[:, None]).T)
    margin_ExT[np.isnan(margin_ExT)] = -np.inf
    new_E = cut(margin_ExT, capacity, capacity / tokens)
  return np.where(np.isfinite(new_E), new_E, q_E)


class Trajectory(NamedTuple):
  """Prices from iteration to iteration, and how they end.

  Attributes:
    q: float32 [iterations, E] after each iteration, as far as they are new.
    period: 1 at a fixed point, more in a cycle, 0 while prices still move.
    since: the iteration after which prices are those of a later one.
  """

  q: np.ndarray
  period: int
  since: int

  def after(self, iterations: int) -> np.ndarray:
    """Returns the prices after so many iterations."""
    if self.period and iterations > self.since:
      iterations = self.since + (iterations - self.since) % self.period
    return self.q[iterations - 1] if iterations else np.zeros_like(self.q[0])


def follow(scores_TxE, k: int, iterations: int, **options) -> Trajectory:
  """Iterates from q = 0 until prices, as bits, have been seen before."""
  q_E = np.zeros(scores_TxE.shape[1], np.float32)
  seen, found = {q_E.tobytes(): 0}, []
  for t in range(1, iterations + 1):
    q_E = iterate(scores_TxE, q_E, k, **options) + np.float32(0)  # No -0.0.
    before = seen.setdefault(q_E.tobytes(), t)
    found.append(q_E)
    if before < t:
      return Trajectory(np.stack(found), t - before, before)
  return Trajectory(np.stack(found), 0, iterations)


class Auction(NamedTuple):
  """What an auction found, and its work.

  Attributes:
    q: float64 [E].
    assignment: bool [T, E], k experts a token, no expert over capacity.
    rounds: steps that wait for each other.
    passes: of the bidding tokens, over the score matrix.
  """

  q: np.ndarray
  assignment: np.ndarray
  rounds: int
  passes: float


def auction(scores_TxE: np.ndarray, k: int, scales=SCALES) -> Auction:
  """Assigns k experts to each token by bids, for smaller and smaller epsilons.

  Each token bids for its best experts by score minus price, as high as the best
  one that it would not get allows, plus epsilon. An expert with more bids than
  its capacity keeps the highest, and its price is the lowest of them. It ends
  within T k epsilon of the optimum.

  References:
    Bertsekas, Annals of Operations Research 14 (1988), for the transportation
    problem; all tokens without their experts bid at once (Jacobi).
  """
  tokens, experts = scores_TxE.shape
  capacity = -(-tokens * k // experts)
  spare = capacity * experts - tokens * k
  wanted_T = np.full(tokens, k)
  s_TxE = np.float64(scores_TxE)
  if spare:  # One more bidder fills what is left over, at no score.
    s_TxE = np.concatenate([s_TxE, np.zeros((1, experts))])
    wanted_T = np.append(wanted_T, spare)
  q_E, rounds, passes = np.zeros(experts), 0, 0.0
  for scale in scales:
    epsilon = scale * np.abs(s_TxE).max()
    bid_TxE = np.full(s_TxE.shape, -np.inf)
    while True:
      missing_T = wanted_T - np.isfinite(bid_TxE).sum(axis=1)
      bidders = np.flatnonzero(missing_T)
      if not len(bidders):
        break
      rounds, passes = rounds + 1, passes + len(bidders) / tokens
      _bid(s_TxE, q_E, bid_TxE, bidders, missing_T[bidders], epsilon)
      order_TxE = np.argsort(-bid_TxE, axis=0, kind='stable')
      np.put_along_axis(bid_TxE, order_TxE[capacity:], -np.inf, axis=0)
      least_E = np.take_along_axis(bid_TxE, order_TxE[capacity - 1][None], 0)[0]
      q_E = np.where(np.isfinite(least_E), least_E, q_E)
  return Auction(q_E, np.isfinite(bid_TxE[:tokens]), rounds, passes)


def _bid(s_TxE, q_E, bid_TxE, bidders, missing_B, epsilon) -> None:
  """Adds the bids of tokens for as many experts as they are missing."""
  value_BxE = s_TxE[bidders] - q_E
  value_BxE[np.isfinite(bid_TxE[bidders])] = -np.inf  # It has these.
  order_BxE = np.argsort(-value_BxE, axis=1, kind='stable')
  sorted_BxE = np.take_along_axis(value_BxE, order_BxE, axis=1)
  next_B = np.take_along_axis(sorted_BxE, missing_B[:, None], axis=1)
  rank, place = np.nonzero(np.arange(s_TxE.shape[1]) < missing_B[:, None])
  at = order_BxE[rank, place]
  offer = q_E[at] + sorted_BxE[rank, place] - next_B[rank, 0] + epsilon
  bid_TxE[bidders[rank], at] = offer


class Instance(NamedTuple):
  """A batch, experts per token, and the best sum of scores, loads even."""

  scores: np.ndarray
  k: int
  optimum: float


def instances(sizes, seeds: int) -> dict[str, Instance]:
  """Returns instances by their names."""
  golden = np.load(GOLDEN)
  fields = ('scores', 'k', 'lp_rows_equal_optimum')
  found = {
    str(name): Instance(*(golden[f'{name}__{field}'] for field in fields))
    for name in golden['instances']
  }
  for tokens, experts, k in sizes:
    for skew in SKEWS:
      for seed in range(seeds):
        scores = next(balance.batches(seed, tokens, experts, skew, 0.0))
        name = f'fresh_{tokens}_{experts}_{k}, bias {skew}, seed {seed}'
        optimum = routing.lp_optimum(scores, k, rows_equal=True).value
        found[name] = Instance(np.asarray(scores), k, optimum)
  return found


def violation(scores_TxE: np.ndarray, q_E: np.ndarray, k: int) -> float:
  """Returns MaxVio of the choice by s - q."""
  tokens, experts = scores_TxE.shape
  adjusted = scores_TxE - np.float32(q_E)
  chosen = np.argsort(-adjusted, axis=1, kind='stable')[:, :k]
  load = np.bincount(chosen.ravel(), minlength=experts)
  return float(load.max() * experts / (tokens * k) - 1)


def measure(name: str, instance: Instance, iterations: int) -> list[dict]:
  """Returns one row for each rule, and two for the auction."""
  scores_TxE, k, optimum = instance
  k, optimum = int(k), float(optimum)

  def gap(q_E):
    value = oracle.dual_value(scores_TxE, q_E, k, rows_equal=True)
    return value / optimum - 1

  rows = []
  shown = [t for t in SHOWN if t <= iterations]
  for rule, options in RULES.items():
    path = follow(scores_TxE, k, iterations, **options)
    q_of = {t: path.after(t) for t in shown}
    rows.append(
      {'instance': name, 'rule': rule}
      | {'period': path.period, 'since': path.since}
      | {f'gap_{t}': gap(q_E) for t, q_E in q_of.items()}
      | {
        f'violation_{t}': violation(scores_TxE, q_E, k)
        for t, q_E in q_of.items()
      }
    )
  for scales in (SCALES[:4], SCALES):
    sold = auction(scores_TxE, k, scales)
    value = np.float64(scores_TxE)[sold.assignment].sum()
    rows.append(
      {'instance': name, 'rule': 'auction', 'epsilon': scales[-1]}
      | {'rounds': sold.rounds, 'passes': sold.passes, 'gap': gap(sold.q)}
      | {'assignment': value / optimum - 1}
      | {'violation': violation(scores_TxE, sold.q, k)}
    )
  return rows


def competing(scores_TxE, q_E, groups: int, chosen: int) -> np.ndarray:
  """Marks the experts of each token's best groups, as `routing.choose` does."""
  tokens, experts = scores_TxE.shape
  adjusted = (scores_TxE - q_E).reshape(tokens, groups, -1)
  value_TxG = np.sort(adjusted, axis=-1)[..., -2:].sum(axis=-1)
  best_TxM = np.argsort(-value_TxG, axis=1, kind='stable')[:, :chosen]
  marked_TxG = np.zeros((tokens, groups), bool)
  np.put_along_axis(marked_TxG, best_TxM, True, axis=1)
  return np.repeat(marked_TxG, experts // groups, axis=1)


@functools.partial(jax.jit, static_argnames=('k', 'groups', 'groups_per_token'))
def _ours(scores_TxE, iterations, **options):
  return routing.dual_iterations(
    scores_TxE,
    jnp.zeros(scores_TxE.shape[1]),
    iterations=iterations,
    clip=False,
    cutoff='midpoint',
    **options,
  )


def grouped_prices(scores_TxE, k, groups, chosen, iterations, how):
  """Runs the midpoint rule under group limits, minded as `how` says."""
  if how == 'ours':
    limits = {'groups': groups, 'groups_per_token': chosen}
    return np.asarray(_ours(scores_TxE, iterations, k=k, **limits))
  q_E = np.zeros(scores_TxE.shape[1], np.float32)
  again = {'ignored': iterations + 1, 'each': 1, 'masked': 4}[how]
  may_TxE = np.ones(scores_TxE.shape, bool)
  for t in range(iterations):
    if how != 'ignored' and t % again == 0:
      may_TxE = competing(scores_TxE, q_E, groups, chosen)
    limited_TxE = np.where(may_TxE, scores_TxE, np.float32(-np.inf))
    q_E = iterate(limited_TxE, q_E, k, clip=False, cutoff='midpoint')
  return q_E


def measure_groups(seeds: int) -> list[dict]:
  """Returns one row for each instance and way."""
  rows = []
  for tokens, experts, k, groups, chosen in GROUPS:
    limits = {'groups': groups, 'groups_per_token': chosen}
    for seed in range(seeds):
      scores = np.asarray(
        next(balance.batches(seed, tokens, experts, 1.0, 0.0))
      )
      bound = routing.lp_optimum(scores, k, rows_equal=True, **limits).value
      free = routing.lp_optimum(scores, k, rows_equal=True).value
      for how in ('ignored', 'masked', 'each', 'ours'):
        for iterations in (4, 8, 16):
          q = grouped_prices(scores, k, groups, chosen, iterations, how)
          may_TxE = competing(scores, q, groups, chosen)
          limited = np.where(may_TxE, scores, np.float32(-np.inf))
          order = np.argsort(q - limited, axis=1, kind='stable')[:, :k]
          objective = np.take_along_axis(np.float64(scores), order, 1).sum()
          rows.append(
            {'tokens': tokens, 'experts': experts, 'k': k, **limits}
            | {'seed': seed, 'how': how, 'iterations': iterations}
            | {'violation': violation(limited, q, k)}
            | {'objective': objective / bound, 'bound_over_free': bound / free}
          )
  return rows


def table(columns: dict[str, str], rows: list[dict]) -> str:
  """Returns Markdown; `columns` gives each one's format."""
  lines = [
    f'| {" | ".join(columns)} |',
    '| --- |' + ' ---: |' * (len(columns) - 1),
  ]
  for row in rows:
    cells = [format(row[name], form) for name, form in columns.items()]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def medians(rows: list[dict], iterations: int) -> str:
  """Returns each rule's gap and MaxVio by iterations, over all instances."""
  shown = [t for t in SHOWN if t <= iterations]
  parts = []
  for measured in ('gap', 'violation'):
    found = []
    for rule in RULES:
      of_rule = [row for row in rows if row['rule'] == rule]
      values = {
        f'T={t}': float(np.median([row[f'{measured}_{t}'] for row in of_rule]))
        for t in shown
      }
      found.append({measured: rule} | values)
    columns = {measured: ''} | {f'T={t}': '.2e' for t in shown}
    parts.append(table(columns, found))
  return '\n\n'.join(parts)


def figure(rows: list[dict], iterations: int, path: pathlib.Path) -> None:
  """Draws the gap by passes over the scores, one line a rule."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  shown = [t for t in SHOWN if t <= iterations]
  drawing, axes = pyplot.subplots(figsize=(7, 4), layout='constrained')
  for rule in RULES:
    of_rule = [row for row in rows if row['rule'] == rule]
    gaps = [np.median([row[f'gap_{t}'] for row in of_rule]) for t in shown]
    axes.plot([2 * t for t in shown], gaps, marker='o', label=rule)
  sold = [row for row in rows if row['rule'] == 'auction']
  axes.scatter(
    [row['passes'] for row in sold],
    [max(row['gap'], 1e-9) for row in sold],
    marker='x',
    color='black',
    label='auction, each instance',
  )
  axes.set(xscale='log', yscale='log')
  axes.set(xlabel='passes over the scores', ylabel='duality gap / optimum')
  axes.legend()
  drawing.savefig(path, dpi=120)


def report(rows: list[dict], grouped: list[dict], options) -> str:
  """Returns the Markdown of all tables."""
  ends = [row for row in rows if row['rule'] in RULES]
  sold = [row for row in rows if row['rule'] == 'auction']
  worst = f'gap_{max(t for t in SHOWN if t <= options.iterations)}'
  sizes = ','.join('x'.join(map(str, size)) for size in options.sizes)
  return '\n\n'.join(
    [
      '# Duality gaps, cycles and an auction',
      f'`python -m experiments.benchmarks.duality --seeds={options.seeds} '
      f'--iterations={options.iterations} --sizes={sizes}`',
      'Medians over all instances: the duality gap relative to the optimum, '
      'and MaxVio, after T iterations on one batch from q = 0.',
      medians(rows, options.iterations),
      'How prices end: period 1 is a fixed point, more a cycle, 0 neither.',
      table(
        {'instance': '', 'rule': '', 'period': 'd', 'since': 'd', worst: '.2e'},
        ends,
      ),
      'The auction, down to two epsilons (over the greatest score). '
      '`assignment` is its score relative to the optimum; its loads are even.',
      table(
        {'instance': '', 'epsilon': '.0e', 'rounds': 'd', 'passes': '.1f'}
        | {'gap': '.2e', 'assignment': '.2e', 'violation': '.3f'},
        sold,
      ),
      'Under group limits, midpoint. `objective` is relative to the bound of '
      'the linear program with fractions of groups, which no choice with even '
      'loads exceeds; `bound_over_free` is that bound over the optimum without '
      'limits.',
      table(
        {'how': '', 'iterations': 'd', 'experts': 'd', 'k': 'd'}
        | {'groups': 'd', 'groups_per_token': 'd', 'seed': 'd'}
        | {'violation': '.3f', 'objective': '.4f', 'bound_over_free': '.4f'},
        grouped,
      ),
    ]
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--seeds', type=int, default=2)
  parser.add_argument('--iterations', type=int, default=1000)
  arguments.add_sizes(parser, '512x16x4,512x64x8')
  parser.add_argument(
    '--out', type=pathlib.Path, default='experiments/results/benchmarks'
  )
  options = parser.parse_args()
  rows = []
  for name, instance in instances(options.sizes, options.seeds).items():
    rows += measure(name, instance, options.iterations)
    print(name, flush=True)
  grouped = measure_groups(options.seeds)
  options.out.mkdir(parents=True, exist_ok=True)
  text = report(rows, grouped, options)
  (options.out / 'duality.md').write_text(text + '\n')
  (options.out / 'duality.json').write_text(
    json.dumps({'prices': rows, 'groups': grouped}, indent=1) + '\n'
  )
  figure(rows, options.iterations, options.out / 'duality.png')
  print(text)


if __name__ == '__main__':
  main()
