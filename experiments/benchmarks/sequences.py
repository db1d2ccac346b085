"""Says what causal prices do for the balance of each sequence, and their cost.

  python -m experiments.benchmarks.sequences [--sequences=8] [--length=512] \\
      [--sizes=16x4,64x8] [--run=DIR --text=FILE]

Scores are softmax of logits: Gaussian, a bias of the expert (0.5), a bias of
the sequence (`topic`), and one that drifts within it (`drift`), a walk that
keeps 0.98 of itself. With a run, they are those of each of its layers on the
text, cut into sequences as in training.

Prices q are the midpoint rule's of all tokens. Then each token's are raised by
`causal_prices`, with a strength in units of the scores' standard deviation; or,
for comparison, moved a part of the way to prices solved on its own whole
sequence, which sees the future. Printed are MaxVio of a sequence (mean and
worst), of all tokens together, and the change of the sum of chosen scores.
"""

import argparse
import pathlib

import numpy as np
from scipy import special

from experiments.benchmarks import arguments, balance, duality
from moe_jax import analysis, routing

STREAMS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.3))  # topic, drift
STRENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)
PARTS = (0.15, 0.3, 0.5, 1.0)


def make_scores(seed, sequences, length, experts, topic, drift) -> np.ndarray:
  """Returns softmax scores, float32 [B, S, E]."""
  random = np.random.default_rng(seed)
  logits = random.normal(size=(sequences, length, experts))
  logits += 0.5 * random.normal(size=experts)
  logits += topic * random.normal(size=(sequences, 1, experts))
  walk_BxE = random.normal(size=(sequences, experts))
  for t in range(length):
    logits[:, t] += drift * walk_BxE
    fresh_BxE = random.normal(size=(sequences, experts))
    walk_BxE = 0.98 * walk_BxE + np.sqrt(1 - 0.98**2) * fresh_BxE
  return special.softmax(np.float32(logits), axis=-1)


def solve(scores_TxE: np.ndarray, k: int) -> np.ndarray:
  """Returns the prices of the midpoint rule after 14 iterations, centred."""
  q_E = np.zeros(scores_TxE.shape[1], np.float32)
  for _ in range(14):
    q_E = duality.iterate(scores_TxE, q_E, k, clip=False, cutoff='midpoint')
  return q_E - q_E.mean()


def choose(adjusted_BxSxE: np.ndarray, k: int) -> np.ndarray:
  """Returns the k best experts, int [B, S, K]; ties to the lower index."""
  return np.argsort(-adjusted_BxSxE, axis=-1, kind='stable')[..., :k]


def measure(scores_BxSxE, q_BxSxE, k: int) -> np.ndarray:
  """Returns MaxVio of a sequence, of the worst, of all; and the score."""
  _, length, experts = scores_BxSxE.shape
  experts_BxSxK = choose(scores_BxSxE - q_BxSxE, k)
  load_BxE = np.stack(
    [np.bincount(x.ravel(), minlength=experts) for x in experts_BxSxK]
  )
  most_B = load_BxE.max(axis=1) * experts / (length * k) - 1
  of_all = load_BxE.mean(axis=0).max() * experts / (length * k) - 1
  gates = np.take_along_axis(scores_BxSxE, experts_BxSxK, axis=-1)
  score = gates.sum(dtype=np.float64)
  return np.array([most_B.mean(), most_B.max(), of_all, score])


def rows_of(scores_BxSxE: np.ndarray, k: int) -> dict[str, np.ndarray]:
  """Returns what `measure` does, the score as a change in percent."""
  q_E = solve(scores_BxSxE.reshape(-1, scores_BxSxE.shape[-1]), k)
  own_BxE = np.stack([solve(scores_SxE, k) for scores_SxE in scores_BxSxE])
  spread = float(scores_BxSxE.std(axis=-1).mean())
  experts_BxSxK = choose(scores_BxSxE - q_E, k)
  rows = {'one price': measure(scores_BxSxE, q_E, k)}
  for strength in STRENGTHS:
    prices, _ = routing.causal_prices(
      experts_BxSxK, q_E, strength=strength * spread
    )
    rows[f'causal, strength {strength}'] = measure(
      scores_BxSxE, np.asarray(prices), k
    )
  for part in PARTS:
    moved_BxE = q_E + part * (own_BxE - q_E)
    rows[f'own price, {part} of the way'] = measure(
      scores_BxSxE, moved_BxE[:, None], k
    )
  first = rows['one price'][3]
  for values in rows.values():
    values[3] = 100 * (values[3] / first - 1)
  return rows


def print_rows(title: str, rows: dict[str, np.ndarray]) -> None:
  """Prints Markdown."""
  form = ('{:.3f}', '{:.3f}', '{:.3f}', '{:+.2f}')
  cells = {
    name: [f.format(value) for f, value in zip(form, values, strict=True)]
    for name, values in rows.items()
  }
  columns = ['MaxVio of a sequence', 'the worst', 'of all', 'score %']
  balance.print_table(title, columns, cells)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--sequences', type=int, default=8)
  parser.add_argument('--length', type=int, default=512)
  arguments.add_sizes(parser, '16x4,64x8')
  parser.add_argument('--run', default='')
  parser.add_argument('--text', type=pathlib.Path)
  options = parser.parse_args()
  if options.run and not options.text:
    parser.error(f'--run={options.run}: needs --text=FILE, to be routed')
  if options.run:
    run = analysis.Run(options.run)
    routed = run.route(options.text.read_text())
    length = run.restore().config.sequence_length
    layers, tokens, experts = routed.scores.shape
    whole = routed.scores[:, : tokens // length * length]
    parts = whole.reshape(layers, -1, length, experts)
    k = routed.experts.shape[-1]
    found = [rows_of(scores, k) for scores in parts]
    mean = {name: np.mean([r[name] for r in found], 0) for name in found[0]}
    print_rows(
      f'A run: {experts} experts, {k} a token, mean of {layers} layers, '
      f'{parts.shape[1]} sequences of {length}',
      mean,
    )
    return
  for experts, k in options.sizes:
    for topic, drift in STREAMS:
      scores = make_scores(
        0, options.sequences, options.length, experts, topic, drift
      )
      print_rows(
        f'{experts} experts, {k} a token, topic {topic}, drift {drift}, '
        f'{options.sequences} sequences of {options.length}',
        rows_of(scores, k),
      )


if __name__ == '__main__':
  main()
