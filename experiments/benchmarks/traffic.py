"""Says what each rule exchanges on a pod, and how well it balances for that.

  python -m experiments.benchmarks.traffic [--topology=v5e:16x16] \\
      [--tokens=512,4096,65536] [--size=64x8] [--batches=60]

Prints a Markdown table. All-reduces, their bytes and the time of one layer's
routing are those of a program that the chips' compiler made of the rule, top-k
and the loads; nothing of them is measured, see launch/estimate.py. MaxVio is
measured here: on the drifting stream of `balance`, its batches of 4,096 tokens
split over 8 devices, from a fifth of the batches on.
"""

import argparse
from collections.abc import Callable, Mapping
import os
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from experiments.benchmarks import arguments, balance
from launch import ahead, cost, hardware, hlo
from moe_jax import routing
from moe_jax.analysis.command_line import table
from moe_jax.parallel import mesh as meshes

PLAIN = 'plain top-k'
# The histogram is Kimi K3's, the mean over devices Marin's, see `quantile`.
RULES = {
  PLAIN: routing.unbalanced(),
  'loss_free, u=0.001': routing.loss_free(),
  'quantile, mean over devices': routing.quantile(estimator='shard_mean'),
  'quantile, 1,000 bins': routing.quantile(estimator='histogram'),
  'quantile': routing.quantile(),
  **{
    f'{rule.__name__}, T={t}': rule(t)
    for rule in (routing.bip, routing.midpoint)
    for t in (1, 2, 4)
  },
}
SPLIT = 8  # Devices that a batch of the stream is split over.
TOKENS = 512  # Of each of them.


class Traffic(NamedTuple):
  """What one layer's routing costs a device of a pod, in a forward pass.

  Attributes:
    collectives: that run.
    bytes: of all of them.
    seconds: estimated, computation and exchange.
  """

  collectives: int
  bytes: int
  seconds: float


def routed(balancer: routing.Balancer, k: int, axis_name: Any) -> Callable:
  """Returns one step of a rule on a device's tokens."""

  def step(state, scores_TxE):
    q_E, state = balancer.solve(state, scores_TxE, k=k, axis_name=axis_name)
    choice = routing.choose(scores_TxE, q_E, k=k)
    seen = balancer.observe(
      state, q_E, scores_TxE, choice, k=k, axis_name=axis_name
    )
    load_E = lax.psum(choice.load, axis_name)
    return balancer.update(state, seen, k=k), load_E, choice.experts

  return step


def traffic(
  balancer: routing.Balancer,
  topology: ahead.Topology,
  mesh: Mesh,
  tokens: int,
  experts: int,
  k: int,
) -> Traffic:
  """Compiles a step for a pod with so many tokens a chip."""
  step = jax.jit(
    jax.shard_map(
      routed(balancer, k, meshes.AXES),
      mesh=mesh,
      in_specs=(P(), meshes.BATCH),
      out_specs=(P(), P(), meshes.BATCH),
    )
  )
  scores = jax.ShapeDtypeStruct(
    (tokens * mesh.size, experts),
    jnp.float32,
    sharding=NamedSharding(mesh, meshes.BATCH),
  )
  state = balancer.init(experts)
  compiled = ahead.compile_step(step.lower(state, scores), topology)
  program, chip = hlo.parse(compiled.text), topology.hardware
  places = ahead.places(mesh, topology)
  calls = hlo.collectives(program)
  exchanging = sum(
    call.count * hardware.seconds(call, chip, places, topology.shape)
    for call in calls
  )
  computing = sum(item.seconds for item in cost.compute(program, chip, rows=0))
  return Traffic(
    sum(call.count for call in calls),
    sum(call.count * call.bytes for call in calls),
    computing + exchanging,
  )


def violations(
  balancer: routing.Balancer, experts: int, k: int, count: int
) -> np.ndarray:
  """Measures MaxVio of every batch of the stream."""
  step = jax.jit(
    jax.vmap(
      routed(balancer, k, 'device'),
      axis_name='device',
      in_axes=(None, 0),
      out_axes=(None, None, 0),
    )
  )
  source = balance.batches(0, SPLIT * TOKENS, experts, 1.0, balance.DRIFT)
  state, seen = balancer.init(experts), []
  for _ in range(count):
    scores = next(source).reshape(SPLIT, TOKENS, experts)
    state, load_E, _ = step(state, scores)
    seen.append(float(routing.max_violation(load_E)))
  return np.array(seen)


def row(
  by_tokens: Mapping[int, Traffic],
  plain: Mapping[int, Traffic],
  measured: np.ndarray,
) -> list[str]:
  """Formats the cells of a rule."""
  late = measured[len(measured) // 5 :]
  some, *_ = by_tokens.values()
  more = [
    f'{1e6 * (each.seconds - plain[tokens].seconds):.0f}'
    for tokens, each in by_tokens.items()
  ]
  return [
    f'{measured[0]:.3f}',
    f'{np.mean(late):.3f} ({np.max(late):.3f})',
    f'{some.collectives}',
    f'{some.bytes / 1e3:.1f}',
    *more,
  ]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--topology', default='v5e:16x16')
  arguments.add_sizes(parser, '512,4096,65536', '--tokens')
  arguments.add_size(parser, '64x8')
  parser.add_argument('--batches', type=int, default=60)
  options = parser.parse_args()
  ahead.prepare(os.environ)  # Before the compilers are loaded.
  jax.config.update('jax_platforms', 'cpu')
  topology = ahead.parse_topology(options.topology)
  ahead.check_installed(topology)
  devices = np.array(ahead.devices(topology))
  # One row of the torus shares the experts.
  devices = devices.reshape(-1, topology.shape[0])
  mesh = Mesh(devices, meshes.AXES)
  tokens = [n for (n,) in options.tokens]
  experts, k = options.size
  found = {
    name: {n: traffic(rule, topology, mesh, n, experts, k) for n in tokens}
    for name, rule in RULES.items()
  }
  rows = [
    [
      name,
      *row(
        found[name],
        found[PLAIN],
        violations(rule, experts, k, options.batches),
      ),
    ]
    for name, rule in RULES.items()
  ]
  headings = [
    'rule',
    'MaxVio, first',
    'later (greatest)',
    'all-reduces',
    'kB',
    *(f'us more, {n:,} tokens a chip' for n in tokens),
  ]
  print(f'{experts} experts, {k} a token, {options.topology}\n')
  print(table(headings, rows))
  of_plain = [f'{1e6 * each.seconds:.0f}' for each in found[PLAIN].values()]
  print(f'\nTimes are beyond those of {PLAIN}: {", ".join(of_plain)} us.')


if __name__ == '__main__':
  main()
