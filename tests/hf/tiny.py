"""A work directory of ours before its first step; a tokenizer of few words."""

import json

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config as config_lib
from moe_jax import nn
from moe_jax.hf import importing
from moe_jax.parallel import mesh as meshes
from moe_jax.train import state as states

WORDS = ['balance', 'expert', 'token', 'router', 'of', 'the', 'a', 'load']


def trained(workdir, prices=0.0, **model):
  """Writes a work directory as a run of ours leaves it; returns its state."""
  options = config_lib.default_config('bip')
  options.update(batch_size=1, sequence_length=16)
  options.data.update(vocabulary=300)
  options.model.update(
    {
      'width': 16,
      'hidden': 24,
      'layers': 2,
      'heads': 2,
      'kv_heads': 1,
      'experts': 4,
      'experts_per_token': 2,
      **model,
    }
  )
  config = config_lib.freeze(options)
  mesh = meshes.make_mesh(1, 1, devices=jax.devices()[:1])
  state = states.make_training(config, mesh).init()
  random = np.random.default_rng(1)
  params = jax.tree.map(  # Biases and norms have nothing to say at first.
    lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32),
    state.params,
  )
  layers = options.model.layers - options.model.dense_layers
  q_LxE = prices * np.random.default_rng(0).normal(size=(layers, 4))
  router = nn.carry_prices(jnp.float32(q_LxE), state.router)
  workdir.mkdir()
  importing._write(epath.Path(workdir), config, params, router, None)
  return params, q_LxE.astype(np.float32)


def write_tokenizer(path, end):
  """Writes a tokenizer of few words, as the golden models have few tokens."""
  ids = {word: i for i, word in enumerate([end, *WORDS])}
  added = {'id': 0, 'content': end, 'special': True}
  plain = ('single_word', 'lstrip', 'rstrip', 'normalized')
  path.write_text(
    json.dumps(
      {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': [added | dict.fromkeys(plain, False)],
        'normalizer': None,
        'pre_tokenizer': {'type': 'Whitespace'},
        'post_processor': None,
        'decoder': None,
        'model': {
          'type': 'WordLevel',
          'vocab': ids,
          'unk_token': end,
        },
      }
    )
  )
