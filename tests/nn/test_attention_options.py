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
from moe_jax.nn import rotary
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


def frequency(config, pair, size):
  """YaRN's frequency of a pair: kept, divided, or between the two."""
  kept = config.rope_theta ** (-2 * pair / size)
  if config.rope_factor == 1:
    return kept

  def last_that_turns(times):
    # theta^(-2j / size) * length = 2 pi * times, solved for j.
    radians = 2 * np.pi * times / config.rope_length
    return -size / 2 * np.log(radians) / np.log(config.rope_theta)

  first = max(np.floor(last_that_turns(config.rope_fast)), 0)
  end = min(np.ceil(last_that_turns(config.rope_slow)), size - 1)
  share = np.interp(pair, [first, max(end, first + 1e-3)], [0, 1])
  return kept * (1 - share) + kept / config.rope_factor * share


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
        turn = np.exp(1j * s * frequency(config, j // 2, size))
        turn *= config.rope_magnitude
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
      logits *= (1 + config.rope_mscale * np.log(config.rope_factor) / 10) ** 2
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
    {
      'head_size': 16,
      'rotary_size': 12,
      'rope_factor': 4.0,
      'rope_length': 64,
      'rope_fast': 6.0,
      'rope_magnitude': 1.2,
      'rope_mscale': 0.7,
    },
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


def test_deepseek_keeps_eleven_frequencies_and_divides_those_from_23_on():
  """Its table: 64 entries, base 1e4, 4,096 tokens stretched 40 times."""
  plain = nn.DecoderConfig(rope_theta=1e4)
  stretched = dataclasses.replace(plain, rope_factor=40.0)
  of_plain, found = (rotary.frequencies(c, 64) for c in (plain, stretched))
  np.testing.assert_array_equal(found[:11], of_plain[:11])
  np.testing.assert_allclose(found[23:], of_plain[23:] / 40, rtol=1e-6)
  ratio = np.asarray(of_plain / found)[10:24]
  assert np.all(np.diff(ratio) > 0)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rope_slow': 32.0}, 'rope_slow=32.0: must be less than model.rope_fast'),
    ({'rope_factor': 2.0, 'rope_theta': 1.0}, 'rope_theta=1.0: must be above'),
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
