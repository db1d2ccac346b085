"""Options of attention, against the formulas in NumPy; golden models have more.

tests/hf holds normalization, partial rotation and latent attention against
transformers.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import nn
from moe_jax.nn.attention import Attention

CONFIG = nn.DecoderConfig(
  width=6, heads=4, kv_heads=2, head_size=4, rope_theta=10.0
)


def attention(config):
  """Builds attention, all of whose parameters are random."""
  layer = Attention(config, rngs=nnx.Rngs(0))
  random = np.random.default_rng(0)
  state = nnx.state(layer, nnx.Param)
  nnx.update(
    layer,
    jax.tree.map(
      lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), state
    ),
  )
  return layer


def by_hand(layer, config, x_SxD):
  """Attends in float64, a head and a position at a time."""
  params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))

  def project(name, x):
    y = x @ np.float64(params[name]['kernel'])
    return y + np.float64(params[name].get('bias', 0.0))

  def norm(name, x):
    mean = np.mean(x**2, axis=-1, keepdims=True)
    scale = np.float64(params[name]['scale'])
    return x / np.sqrt(mean + config.norm_epsilon) * scale

  def heads(name, count):
    y = project(name, x_SxD)
    normed = name != 'value' and config.query_key_norm
    if normed == 'whole':
      y = norm(f'{name}_norm', y)
    if config.query_key_value_clip:
      y = np.clip(y, -config.query_key_value_clip, config.query_key_value_clip)
    y = y.reshape(len(y), count, -1)
    if normed == 'head':
      y = norm(f'{name}_norm', y)
    return y

  def turned(y_SxHxW):
    size = config.rotary_size or config.head_width
    y_SxHxW = y_SxHxW.copy()
    for s, row in enumerate(y_SxHxW):
      for j in range(0, size, 2):
        turn = np.exp(1j * s * config.rope_theta ** (-j / size))
        pair = (row[:, j] + 1j * row[:, j + 1]) * turn
        row[:, j], row[:, j + 1] = pair.real, pair.imag
    return y_SxHxW

  query = turned(heads('query', config.heads))
  key = turned(heads('key', config.kv_heads))
  value = heads('value', config.kv_heads)
  out = np.zeros((len(x_SxD), config.heads, config.head_width))
  for s in range(len(x_SxD)):
    for h in range(config.heads):
      g = h * config.kv_heads // config.heads
      logits = key[: s + 1, g] @ query[s, h] / np.sqrt(config.head_width)
      weights = np.exp(logits - logits.max())
      out[s, h] = weights / weights.sum() @ value[: s + 1, g]
  return project('out', out.reshape(len(out), -1))


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'attention_bias': 'inputs', 'rotary_size': 2},
    {'attention_bias': 'all', 'query_key_norm': 'head'},
    {'query_key_norm': 'whole', 'query_key_value_clip': 0.5},
  ],
  ids=str,
)
def test_attention_is_as_the_formulas_say(options):
  config = dataclasses.replace(CONFIG, **options)
  layer = attention(config)
  x_SxD = np.random.default_rng(1).normal(size=(5, 6))
  y, _ = layer(jnp.asarray(x_SxD[None], jnp.float32))
  np.testing.assert_allclose(y[0], by_hand(layer, config, x_SxD), atol=2e-5)
  biased = {
    name
    for name, part in nnx.to_pure_dict(nnx.state(layer, nnx.Param)).items()
    if 'bias' in part
  }
  of_inputs = {'query', 'key', 'value'}
  expected = {'none': set(), 'inputs': of_inputs, 'all': of_inputs | {'out'}}
  assert biased == expected[config.attention_bias]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rotary_size': 3}, 'rotary_size=3: must be even, and at most'),
    ({'rotary_size': 66}, 'width of a head, 64'),
    ({'latent_size': 8}, 'rotary_size=0: must be between 0 and the width'),
    ({'latent_size': 8, 'rotary_size': 64}, 'rotary_size=64: must be between'),
    (
      {'latent_size': 8, 'rotary_size': 8, 'attention_bias': 'all'},
      'attention_bias=all: works without latent attention only, but',
    ),
    ({'value_size': 8}, 'value_size=8: works in latent attention only, but'),
    ({'query_latent_size': 8}, 'query_latent_size=8: works in latent'),
    ({'query_key_norm': 'both'}, "query_key_norm='both': must be one of"),
    ({'query_key_value_clip': -1.0}, 'query_key_value_clip=-1.0: must be 0'),
  ],
)
def test_what_does_not_go_together_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    nn.DecoderConfig(**options)
