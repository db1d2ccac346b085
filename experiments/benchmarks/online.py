"""Compares the online rules with greedy top-k on synthetic streams.

  python -m experiments.benchmarks.online [--arrivals=2048] [--seed=0]

Each stream is one of softmax scores of Gaussian logits: `iid`; `skewed`, with
a Gaussian bias per expert; `drifting`, where that bias turns into another one
from the first arrival to the last. `greedy` takes the best experts that still
have room; `closing` lets the rule before it see only experts that have.

Columns: regret in percent of the offline optimum, where a choice beyond an
expert's capacity ceil(n k / E) earns nothing, and (`all`) where everything
earns; the share of choices beyond capacity; MaxVio at the end; bytes of state;
microseconds an arrival in one compiled scan, the best of three.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import routing

SIZES = ((16, 4), (64, 8))  # experts, chosen


def closing(
  rule: routing.StreamRule, horizon: int, *, k: int
) -> routing.StreamRule:
  """Bars experts without room from a rule's choice; the state has the load."""

  def init(experts):
    return rule.init(experts), jnp.zeros(experts, jnp.int32)

  def step(state, scores_E):
    inner, load_E = state
    room_E = load_E < -(-horizon * k // scores_E.shape[0])
    inner, experts_K = rule.step(inner, jnp.where(room_E, scores_E, -jnp.inf))
    return (inner, load_E.at[experts_K].add(1)), experts_K

  return routing.StreamRule(init, step)


def make_streams(
  generator: np.random.Generator, n: int, experts: int
) -> dict[str, np.ndarray]:
  """Returns logits by the name of the stream."""
  logits = generator.normal(size=(n, experts))
  first, last = generator.normal(size=(2, experts))
  way = np.linspace(0, 1, n)[:, None]
  return {
    'iid': logits,
    'skewed': logits + first,
    'drifting': logits + (1 - way) * first + way * last,
  }


def make_rules(n: int, k: int) -> dict[str, routing.StreamRule]:
  """Returns the rules by the name of their row."""
  top_k = routing.StreamRule(
    init=lambda experts: (),
    step=lambda state, scores_E: (state, jax.lax.top_k(scores_E, k)[1]),
  )
  rules = {'greedy': closing(top_k, n, k=k)}
  for paced, t in ((False, 1), (False, 2), (False, 4), (True, 2)):
    options = {'k': k, 'iterations': t, 'paced': paced}
    name = f'T={t}{", paced" if paced else ""}'
    exact = routing.online_exact(n, **options)
    rules[f'exact, {name}'] = exact
    for bins in (100, 1000):
      rules[f'{bins} bins, {name}'] = routing.online_histogram(
        n, bins=bins, **options
      )
    if t == 2:
      rules[f'exact, {name}, closing'] = closing(exact, n, k=k)
  return rules


def measure(
  rule: routing.StreamRule, scores: jax.Array, optimum: float, k: int
) -> tuple[float, ...]:
  """Returns the columns of one row."""
  n, experts = scores.shape
  capacity = -(-n * k // experts)
  run = jax.jit(lambda scores: routing.assign_stream(rule, scores))
  choice, state = jax.block_until_ready(run(scores))
  seconds = []
  for _ in range(3):
    start = time.perf_counter()
    jax.block_until_ready(run(scores))
    seconds.append(time.perf_counter() - start)
  room = routing.within_capacity(
    choice.experts, experts=experts, capacity=capacity
  )
  return (
    100 * float(routing.regret(choice, optimum, capacity=capacity)),
    100 * float(routing.regret(choice, optimum)),
    100 * float(1 - room.mean()),
    float(routing.max_violation(choice.load)),
    sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    min(seconds) / n * 1e6,
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--arrivals', type=int, default=2048)
  parser.add_argument('--seed', type=int, default=0)
  flags = parser.parse_args()
  n = flags.arrivals
  head = '| rule | regret % | all % | beyond % | MaxVio | bytes | us |'
  for experts, k in SIZES:
    rules = make_rules(n, k)
    generator = np.random.default_rng(flags.seed)
    for name, logits in make_streams(generator, n, experts).items():
      scores = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
      optimum = routing.lp_optimum(scores, k).value
      print(f'\n{name}: n={n}, E={experts}, k={k}, optimum {optimum:.1f}\n')
      print(head, '| --- | ---: | ---: | ---: | ---: | ---: | ---: |', sep='\n')
      for row, rule in rules.items():
        regret, all_, beyond, violation, size, us = measure(
          rule, scores, optimum, k
        )
        print(
          f'| {row} | {regret:.2f} | {all_:.2f} | {beyond:.1f} '
          f'| {violation:.3f} | {size} | {us:.1f} |',
          flush=True,
        )


if __name__ == '__main__':
  main()
