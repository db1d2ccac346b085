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
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import balance
from moe_jax import analysis, routing

STREAMS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.3))  # topic, drift
STRENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)
PARTS = (0.15, 0.3, 0.5, 1.0)


def make_scores(seed, sequences, length, experts, topic, drift) -> jax.Array:
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
  return jax.nn.softmax(jnp.asarray(logits, jnp.float32))


@functools.partial(jax.jit, static_argnames='k')
def prepare(scores_BxSxE, *, k):
  """Returns prices of all tokens, of each sequence, and the experts chosen."""
  experts = scores_BxSxE.shape[-1]

  def solve(scores_TxE, q_E):
    return routing.dual_iterations(
      scores_TxE, q_E, k=k, iterations=14, clip=False, cutoff='midpoint'
    )

  scores_TxE = scores_BxSxE.reshape(-1, experts)
  q_E = solve(scores_TxE, jnp.zeros(experts))
  own_BxE = jax.vmap(lambda scores_SxE: solve(scores_SxE, q_E))(scores_BxSxE)
  chosen = routing.choose(scores_TxE, q_E, k=k).experts
  return q_E, own_BxE, chosen.reshape(*scores_BxSxE.shape[:2], k)


@functools.partial(jax.jit, static_argnames='k')
def measure(scores_BxSxE, q_BxSxE, *, k):
  """Returns MaxVio of each sequence, of all, and the sum of chosen scores."""
  adjusted = scores_BxSxE - q_BxSxE
  experts_BxSxK = jax.lax.top_k(adjusted, k)[1]
  gates = jnp.take_along_axis(scores_BxSxE, experts_BxSxK, axis=-1)
  chosen = jax.nn.one_hot(experts_BxSxK, adjusted.shape[-1], dtype=jnp.int32)
  load_BxE = jnp.sum(chosen, axis=(1, 2))
  return (
    routing.max_violation(load_BxE),
    routing.max_violation(jnp.sum(load_BxE, axis=0)),
    jnp.sum(gates),
  )


def rows_of(scores_BxSxE: jax.Array, k: int) -> dict[str, np.ndarray]:
  """Returns mean and worst MaxVio, that of all, and the change of score."""
  q_E, own_BxE, experts_BxSxK = prepare(scores_BxSxE, k=k)
  spread = float(jnp.mean(jnp.std(scores_BxSxE, axis=-1)))

  def row(q_BxSxE):
    violation_B, of_all, score = measure(
      scores_BxSxE, jnp.broadcast_to(q_BxSxE, scores_BxSxE.shape), k=k
    )
    return np.array([violation_B.mean(), violation_B.max(), of_all, score])

  rows = {'one price': row(q_E)}
  for strength in STRENGTHS:
    prices, _ = routing.causal_prices(
      experts_BxSxK, q_E, strength=strength * spread
    )
    rows[f'causal, strength {strength}'] = row(prices)
  for part in PARTS:
    moved_BxE = q_E + part * (own_BxE - q_E)
    rows[f'own price, {part} of the way'] = row(moved_BxE[:, None])
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
  parser.add_argument('--sizes', default='16x4,64x8')
  parser.add_argument('--run', default='')
  parser.add_argument('--text', type=pathlib.Path)
  options = parser.parse_args()
  if options.run:
    run = analysis.Run(options.run)
    routed = run.route(options.text.read_text())
    length = run.restore().config.sequence_length
    layers, tokens, experts = routed.scores.shape
    whole = routed.scores[:, : tokens // length * length]
    parts = jnp.asarray(whole).reshape(layers, -1, length, experts)
    k = routed.experts.shape[-1]
    found = [rows_of(scores, k) for scores in parts]
    mean = {name: np.mean([r[name] for r in found], 0) for name in found[0]}
    print_rows(
      f'A run: {experts} experts, {k} a token, mean of {layers} layers, '
      f'{parts.shape[1]} sequences of {length}',
      mean,
    )
    return
  for size in options.sizes.split(','):
    experts, k = map(int, size.split('x'))
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
