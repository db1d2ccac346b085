"""Compiles an MoE layer, forward and backward, for chips that are not here.

  python -m tests.launch.compiled_layer TOPOLOGY LAYER DIRECTORY

of LAYER dropless, rounded or shared, which is rounded with a shared expert,
leaves DIRECTORY/program.txt, one device's program, and DIRECTORY/flops.json,
FLOPs of one device: `jaxpr`, those of the JAX program; `compiler`, those that
the compiler counts; null where it does not. Dropless, both are those of rooms
that are full.
"""

import json
import math
import os
import pathlib
import sys

from launch import ahead

DATA, EXPERT = 2, 4  # Of the mesh.
BATCH, SEQUENCE = 8, 1024
WIDTH, HIDDEN, EXPERTS, K = 512, 1408, 64, 8
ITERATIONS = 4


def main(topology, layer, directory):
  ahead.prepare(os.environ)
  from flax import nnx
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  from launch import cost
  from moe_jax import nn, routing
  from moe_jax.parallel import mesh as meshes
  from moe_jax.parallel.compilers import compiler_options

  devices = ahead.devices(ahead.parse_topology(topology))
  mesh = meshes.make_mesh(DATA, EXPERT, devices=devices)
  config = nn.MoEConfig(
    width=WIDTH,
    hidden=HIDDEN,
    experts=EXPERTS,
    experts_per_token=K,
    shared_experts=int(layer == 'shared'),
    dtype='bfloat16',
    round_to_capacity=layer != 'dropless',
  )

  def split():
    rule = routing.bip(iterations=ITERATIONS)
    moe = nn.MoE(config, rule, mesh=mesh, rngs=nnx.Rngs(0))
    return nnx.split(moe, nnx.Param, nnx.Variable)

  def place(leaf, spec):
    return leaf.update(sharding=NamedSharding(mesh, spec))

  graphdef, params, router = nnx.eval_shape(split)
  specs = nn.parameter_specs(params, mesh, fsdp=False)
  x = jax.ShapeDtypeStruct((BATCH, SEQUENCE, WIDTH), jnp.bfloat16)

  def loss(params, router, x_BxSxD):
    moe = nnx.merge(graphdef, params, router, copy=True)
    y_BxSxD, _ = moe(x_BxSxD, train=True)
    return jnp.sum(jnp.square(y_BxSxD.astype(jnp.float32)))

  gradients = jax.jit(
    jax.grad(loss, argnums=(0, 2)),
    compiler_options=compiler_options(devices),
  )
  traced = gradients.trace(
    jax.tree.map(place, params, specs),
    jax.tree.map(lambda leaf: place(leaf, P()), router),
    place(x, meshes.BATCH),
  )
  compiled = traced.lower().compile()
  directory = pathlib.Path(directory)
  (directory / 'program.txt').write_text(compiled.as_text())
  flops = {
    'jaxpr': cost.flops(traced.jaxpr.jaxpr, mesh.size, math.inf) / mesh.size,
    'compiler': (compiled.cost_analysis() or {}).get('flops'),
  }
  (directory / 'flops.json').write_text(json.dumps(flops))


if __name__ == '__main__':
  main(*sys.argv[1:])
