"""Models that barely fit: one copy in memory, each device with its part."""

import json
import os
import resource
import subprocess
import sys

from etils import epath
import numpy as np
import pytest

from moe_jax.hf import architectures, tensor_files, tensors
from moe_jax.hf.tensor_files import Planned

_EXPERTS, _LAYERS, _WIDTH, _HIDDEN = 8, 5, 1024, 8192

# Prints the peak of its memory, in bytes.
_IMPORT = """
import resource, sys
import jax
from moe_jax import hf
from moe_jax.parallel import mesh

jax.jit(lambda x: x + 1)(0.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hf.import_model(*sys.argv[1:], mesh=mesh.make_mesh(1, 8))
print(before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_model(folder):
  """Writes a Mixtral of 4 GB of random numbers; returns its bytes."""
  public = {
    'model_type': 'mixtral',
    'hidden_act': 'silu',
    'hidden_size': _WIDTH,
    'intermediate_size': _HIDDEN,
    'num_hidden_layers': _LAYERS,
    'num_attention_heads': 8,
    'num_key_value_heads': 2,
    'num_local_experts': _EXPERTS,
    'num_experts_per_tok': 2,
    'rms_norm_eps': 1e-5,
    'rope_theta': 1e6,
    'vocab_size': 1000,
    'max_position_embeddings': 1024,
  }
  (folder / 'config.json').write_text(json.dumps(public))
  random = np.random.default_rng(0)
  architecture, config = architectures.read(public)
  head = config.head_width
  sides = {
    'embedding': (1000, _WIDTH),
    'output': (1000, _WIDTH),
    'router': (_EXPERTS, _WIDTH),
    'gate': (_HIDDEN, _WIDTH),
    'up': (_HIDDEN, _WIDTH),
    'down': (_WIDTH, _HIDDEN),
    'query': (8 * head, _WIDTH),
    'key': (2 * head, _WIDTH),
    'value': (2 * head, _WIDTH),
    'out': (_WIDTH, 8 * head),
  }
  planned = {}
  for row in tensors.table(architecture, config, public):
    shape = next(
      (sides[k] for k in reversed(row.ours) if k in sides), (_WIDTH,)
    )
    for _, name in row.names():
      planned[name] = Planned(
        'F32',
        shape,
        lambda shape=shape: random.random(shape, np.float32) - 0.5,
      )
  tensor_files.write(epath.Path(folder), planned, shard=10**9)
  return sum(tensor.size for tensor in planned.values())


@pytest.mark.long
def test_four_gigabytes_are_held_once(tmp_path):
  folder = tmp_path / 'public'
  folder.mkdir()
  size = write_model(folder)
  assert 4e9 < size < 4.3e9
  flags = '--xla_force_host_platform_device_count=8'
  done = subprocess.run(
    [sys.executable, '-c', _IMPORT, str(folder), str(tmp_path / 'run')],
    env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
    check=True,
    capture_output=True,
    text=True,
  )
  before, peak = map(int, done.stdout.split())
  assert peak - before < 1.3 * size, (before, peak, size)
  # Nor here, where it was written tensor by tensor.
  own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  assert own < size
