"""Compiles attention, forward and backward, for a chip that is not here.

  python -m tests.launch.compiled_attention TOPOLOGY SEQUENCE DOCUMENTS

prints the bytes of its temporary arrays, and the kernels that it calls. With 1
for DOCUMENTS, a sequence may hold several.
"""

import os
import re
import sys

from launch import ahead

HEADS, WIDTH = 8, 64


def main(topology, sequence, documents):
  ahead.prepare(os.environ)
  import jax
  import jax.numpy as jnp

  from moe_jax.nn.attention import attend
  from moe_jax.parallel import mesh as meshes

  device = ahead.devices(ahead.parse_topology(topology))[0]
  mesh = meshes.make_mesh(1, 1, devices=[device])
  place = jax.sharding.NamedSharding(mesh, meshes.BATCH)
  heads = jax.ShapeDtypeStruct(
    (1, int(sequence), HEADS, WIDTH), jnp.bfloat16, sharding=place
  )
  positions = jax.ShapeDtypeStruct(heads.shape[:2], jnp.int32, sharding=place)

  def loss(query, key, value, positions=None):
    y = attend(query, key, value, positions, mesh=mesh)
    return jnp.sum(jnp.square(y.astype(jnp.float32)))

  arrays = [heads] * 3 + [positions] * int(documents)
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()
  kernels = re.findall(r'splash_mha_[a-z]+|fmhaSoftmax\w*', compiled.as_text())
  print(compiled.memory_analysis().temp_size_in_bytes, *sorted({*kernels}))


if __name__ == '__main__':
  main(*sys.argv[1:])
