"""Cached decoding: what the whole text would have given, token by token."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import nn, routing
from moe_jax.parallel import mesh as meshes

VOCABULARY, BATCH, SEQUENCE = 40, 4, 12


def build(mesh=None):
  config = nn.DecoderConfig(
    width=16,
    hidden=24,
    experts=8,
    experts_per_token=2,
    layers=3,
    dense_layers=1,
    dense_hidden=20,
    heads=4,
    kv_heads=2,
    head_size=6,  # 24 in all, more than the model is wide.
  )

  @nnx.jit
  def make():
    key = jax.random.key(0, impl='unsafe_rbg')
    model = nn.Decoder(
      config,
      routing.bip(2),
      vocabulary=VOCABULARY,
      mesh=mesh,
      rngs=nnx.Rngs(key),
    )
    # Prices that matter, and weights that make logits differ.
    state = model.moe_blocks.feed_forward.state
    q_LxE = jax.random.uniform(jax.random.key(1), (2, 8), maxval=0.1)
    state.set_value(state.get_value()._replace(q=q_LxE))
    model.embedding.embedding[...] *= 4
    return model

  return make()


@pytest.fixture(scope='module')
def model():
  return build()


@pytest.fixture(scope='module')
def tokens():
  shape = BATCH, SEQUENCE
  return jax.random.randint(jax.random.key(2), shape, 0, VOCABULARY)


@pytest.fixture(scope='module')
def whole(model, tokens):
  logits, outputs = nnx.jit(lambda model: model(tokens, train=False))(model)
  return np.array(logits), np.array(outputs.choice.experts)


@pytest.mark.parametrize(
  'shape',
  [
    pytest.param(None, id='one'),
    pytest.param((1, 4), marks=pytest.mark.long, id='1x4'),
    pytest.param((2, 2), marks=pytest.mark.long, id='2x2'),
  ],
)
def test_cached_logits_are_those_of_the_whole_text(shape, tokens, whole):
  mesh = shape and meshes.make_mesh(*shape, devices=jax.devices()[:4])
  model = build(mesh)
  cache = model.init_cache(BATCH, SEQUENCE + 3)  # More room than is needed.
  extend = nnx.jit(lambda model, *arguments: model.extend(*arguments))
  logits, experts, start = [], [], 0
  for count in (4, 4, 1, 1, 1, 1):
    new, outputs, cache = extend(model, tokens[:, start : start + count], cache)
    logits.append(new)
    experts.append(outputs.choice.experts.reshape(2, BATCH, count, 2))
    start += count
  assert cache.moe.length.tolist() == [SEQUENCE, SEQUENCE]
  assert np.ptp(whole[0]) > 1
  np.testing.assert_allclose(np.concatenate(logits, 1), whole[0], atol=1e-5)
  np.testing.assert_array_equal(
    np.concatenate(experts, 2), whole[1].reshape(2, BATCH, SEQUENCE, 2)
  )


@pytest.mark.long
def test_greedy_text_is_that_of_whole_forward_passes(model, tokens):
  forward = nnx.jit(lambda model, text: model(text, train=False)[0])
  prompt = text = tokens[:, :4]
  new = nn.generate(model, prompt, tokens=5)
  for _ in range(5):
    # Padded, so that it is compiled once: what follows changes nothing before.
    padded = jnp.pad(text, ((0, 0), (0, 9 - text.shape[1])))
    last = forward(model, padded)[:, text.shape[1] - 1]
    text = jnp.concatenate([text, last.argmax(-1)[:, None]], axis=1)
  np.testing.assert_array_equal(new, text[:, 4:])
  assert len(np.unique(new)) > 1


@pytest.mark.long
def test_draws_are_of_the_models_distribution(model, tokens):
  count = 4000
  prompt = jnp.tile(tokens[:1, :6], (count, 1))
  logits, _ = nnx.jit(lambda model: model(prompt[:1], train=False))(model)
  logits_V = np.array(logits)[0, -1] / 0.7

  def share(**options):
    drawn = nn.generate(model, prompt, tokens=1, temperature=0.7, **options)
    return np.bincount(drawn[:, 0], minlength=VOCABULARY) / count

  def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

  # Five standard deviations of a share are 0.04 at most.
  np.testing.assert_allclose(share(), softmax(logits_V), atol=0.04)
  top = np.where(logits_V >= np.sort(logits_V)[-3], logits_V, -np.inf)
  np.testing.assert_allclose(share(top_k=3), softmax(top), atol=0.04)
  assert (share(top_k=3, seed=1) != share(top_k=3)).any()


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'tokens': 0}, 'tokens=0: must be 1 or more'),
    ({'temperature': -1.0}, r'temperature=-1\.0: must be 0 or more'),
    ({'temperature': float('nan')}, 'temperature=nan'),
    ({'top_k': 41}, 'top_k=41: must be 40 or less'),
    ({'prompt': 0}, 'prompt: has no token'),
  ],
)
def test_refuses(model, tokens, options, words):
  options = {'tokens': 1, 'prompt': 4} | options
  prompt = tokens[:, : options.pop('prompt')]
  with pytest.raises(ValueError, match=words):
    nn.generate(model, prompt, **options)
