"""Times a whole MoE layer beside MaxText's, on the same weights and tokens.

  python -m experiments.benchmarks.layer [--repeats=5] [--size=2048x16x4] \\
      [--width=512] [--hidden=1408]

The size is tokens x experts x experts per token. Each line routes tokens and
takes them through the experts and back, in float32; all take turns. Printed are
medians of milliseconds, and median and range of the ratios to the first line in
the same turn. The outputs of dropless lines are checked to be equal first.

It needs Python 3.12 and `pip install maxtext` (0.2.5). MaxText is made for TPUs
and GPUs, whose kernels are not timed here.
"""

import argparse
from collections.abc import Callable
import os
import statistics
from typing import Any

from flax import nnx
from flax.linen import partitioning
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import maxtext
from maxtext.configs import pyconfig
from maxtext.layers import initializers
from maxtext.layers import moe as maxtext_moe
from maxtext.utils import maxtext_utils
import numpy as np

from experiments.benchmarks import arguments
from experiments.benchmarks.routing import milliseconds, spread
from moe_jax import nn, routing

SEQUENCES = 4
DROPLESS = ('moe_jax, dropless', 'MaxText, ragged_dot', 'MaxText, all experts')
# Our names of weights -> MaxText's.
WEIGHTS = {'router': 'gate.kernel', 'gate': 'wi_0', 'up': 'wi_1', 'down': 'wo'}
MAXTEXT = {
  'MaxText, capacity 1.0': {'sparse_matmul': False, 'capacity_factor': 1.0},
  'MaxText, ragged_dot': {'sparse_matmul': True},
  'MaxText, all experts': {'sparse_matmul': False},
}


def line(model: nnx.Module, apply: Callable, x_BxSxD: jax.Array) -> Callable:
  """Compiles a layer, forward and backward; returns what runs it once.

  What that returns is its output and the gradients of weights and tokens.
  """
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  @jax.jit
  def both(params, x_BxSxD):
    def forward(params, x_BxSxD):
      y_BxSxD = apply(nnx.merge(graphdef, params, rest, copy=True), x_BxSxD)
      return jnp.sum(jnp.square(y_BxSxD)), y_BxSxD

    grad = jax.grad(forward, argnums=(0, 1), has_aux=True)
    gradients, y_BxSxD = grad(params, x_BxSxD)
    return y_BxSxD, gradients

  return lambda: jax.block_until_ready(both(params, x_BxSxD))


def ours(
  options: argparse.Namespace, experts: int, k: int, x_BxSxD: jax.Array
) -> tuple[nn.MoE, dict[str, Callable]]:
  """Returns our layer, and its lines."""
  rules = {
    'moe_jax, dropless': (routing.unbalanced(), False),
    'moe_jax, midpoint T=4, rounded': (routing.midpoint(4), True),
  }
  lines = {}
  for name, (balancer, rounded) in rules.items():
    config = nn.MoEConfig(
      width=options.width,
      hidden=options.hidden,
      experts=experts,
      experts_per_token=k,
      shared_experts=0,
      round_to_capacity=rounded,
    )
    layer = nn.MoE(config, balancer, rngs=nnx.Rngs(0))
    lines[name] = line(layer, lambda m, x: m(x, train=True)[0], x_BxSxD)
  return layer, lines


def theirs(
  options: argparse.Namespace,
  experts: int,
  k: int,
  x_BxSxD: jax.Array,
  layer: nn.MoE,
  given: dict[str, Any],
) -> Callable:
  """Returns a line of MaxText's layer with the weights of ours."""
  settings = {
    'run_name': 'layer',
    'hardware': 'cpu',
    'skip_jax_distributed_system': True,
    'enable_checkpointing': False,
    'decoder_block': 'mixtral',
    'base_emb_dim': options.width,
    'base_mlp_dim': options.hidden,
    'base_moe_mlp_dim': options.hidden,
    'num_experts': experts,
    'num_experts_per_tok': k,
    'megablox': False,
    'per_device_batch_size': SEQUENCES,
    'max_target_length': x_BxSxD.shape[1],
    'dtype': 'float32',
    'weight_dtype': 'float32',
    **given,
  }
  base = os.path.join(os.path.dirname(maxtext.__file__), 'configs', 'base.yml')
  flags = [f'{name}={value}' for name, value in settings.items()]
  config = pyconfig.initialize(['', base, *flags])
  mesh = Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
  with mesh, partitioning.axis_rules(config.logical_axis_rules):
    model = maxtext_moe.RoutedMoE(
      config,
      experts,
      k,
      mesh,
      initializers.nd_dense_init(1.0, 'fan_in', 'truncated_normal'),
      ('embed', 'mlp'),
      nnx.Rngs(0),
      intermediate_dim=options.hidden,
      dtype=jnp.float32,
      weight_dtype=jnp.float32,
    )
    for name, path in WEIGHTS.items():
      *parents, last = path.split('.')
      parent = model
      for each in parents:
        parent = getattr(parent, each)
      getattr(parent, last)[...] = getattr(layer, name)[...]
    run = line(model, lambda m, x: m(x)[0], x_BxSxD)
    run()  # Traced while mesh and rules hold.
  return run


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--repeats', type=int, default=5)
  arguments.add_size(parser, '2048x16x4')
  parser.add_argument('--width', type=int, default=512)
  parser.add_argument('--hidden', type=int, default=1408)
  options = parser.parse_args()
  tokens, experts, k = options.size
  shape = (SEQUENCES, tokens // SEQUENCES, options.width)
  x_BxSxD = jax.random.normal(jax.random.key(0), shape)
  layer, lines = ours(options, experts, k, x_BxSxD)
  lines |= {
    name: theirs(options, experts, k, x_BxSxD, layer, given)
    for name, given in MAXTEXT.items()
  }
  expected, *others = (lines[name]()[0] for name in DROPLESS)
  for found in others:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
  times = []
  for turn in range(options.repeats + 1):
    taken = [milliseconds(run) for run in lines.values()]
    if turn:  # The first one is slower.
      times.append(taken)
  print(f'{tokens} tokens, {experts} experts, {k} a token, {shape[-1]} wide')
  for name, column in zip(lines, zip(*times, strict=True), strict=True):
    ratio = spread(t / turn[0] for t, turn in zip(column, times, strict=True))
    print(f'{name:32s} {statistics.median(column):8.0f} ms  {ratio}')


if __name__ == '__main__':
  main()
