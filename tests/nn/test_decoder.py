"""The language model: causality, stacked layers, recomputation, sizes."""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import nn, routing
from moe_jax.nn import attention

# q as `bip` has it, with the observation of `loss_free`.
COUNTING = routing.bip(2)._replace(observe=routing.loss_free().observe)
VOCABULARY, SEQUENCE = 40, 12


def _model(balancer=COUNTING, capacity_factor=3.0, **overrides):
  """Has room for every token in training, by the backend that compiles fast."""
  config = nn.DecoderConfig(
    **{
      'width': 16,
      'hidden': 24,
      'experts': 6,
      'experts_per_token': 2,
      'layers': 3,
      'dense_hidden': 20,
      'heads': 4,
      'kv_heads': 2,
      **overrides,
    }
  )

  @nnx.jit
  def build():
    # This generator compiles in a fraction of the default one's time.
    key = jax.random.key(0, impl='unsafe_rbg')
    return nn.Decoder(
      config,
      balancer,
      vocabulary=VOCABULARY,
      capacity_factor=capacity_factor,
      rngs=nnx.Rngs(key),
    )

  return build()


@pytest.fixture(scope='module')
def tokens():
  return jax.random.randint(jax.random.key(0), (2, SEQUENCE), 0, VOCABULARY)


@functools.partial(nnx.jit, static_argnames='train')
def _apply(model, tokens, mask=None, *, train=False):
  return model(tokens, mask, train=train)


def _q(model):
  return model.moe_blocks.feed_forward.state.get_value().q


@pytest.fixture(scope='module')
def frozen():
  """A model whose routers have prices, as after training."""
  model = _model()
  q = jax.random.uniform(jax.random.key(1), (3, 6), maxval=0.05)
  model.moe_blocks.feed_forward.state.set_value(routing.State(q))
  return model


@pytest.mark.long
def test_gradient_says_logits_depend_on_no_later_token(frozen):
  """Of the logit of a token that is not in the text, at each position."""
  # Each token occurs once, so its row of the embedding is its place; the row
  # of the output layer is that of the absent token.
  tokens = jax.random.permutation(jax.random.key(2), VOCABULARY)[:SEQUENCE]
  absent = jnp.setdiff1d(jnp.arange(VOCABULARY), tokens)[0]
  graphdef, params, routers = nnx.split(frozen, nnx.Param, nn.RouterState)

  @jax.jit
  @functools.partial(jax.grad, argnums=0)
  def gradient(params, position):
    model = nnx.merge(graphdef, params, routers, copy=True)
    logits, _ = model(tokens[None], train=False)
    return logits[0, position, absent]

  for position in range(SEQUENCE):
    of_row = gradient(params, position)['embedding']['embedding'][...]
    of_token = np.abs(of_row[tokens]).max(axis=1)
    assert np.all(of_token[: position + 1] > 0), position
    np.testing.assert_array_equal(of_token[position + 1 :], 0)


def test_later_tokens_and_padding_do_not_change_logits(frozen, tokens):
  """The choice of experts has no gradient; it must not look ahead either."""
  everything = jnp.ones(tokens.shape, bool)
  logits, outputs = _apply(frozen, tokens, everything)
  for place in (0, 5, SEQUENCE - 1):
    changed = tokens.at[:, place:].set((tokens[:, place:] + 7) % VOCABULARY)
    others, _ = _apply(frozen, changed, everything)
    np.testing.assert_allclose(others[:, :place], logits[:, :place], atol=1e-5)
    assert np.all(np.any(others[:, place:] != logits[:, place:], axis=-1))
    # The same places as padding: no expert sees them.
    padded, of_padded = _apply(
      frozen, changed, everything.at[:, place:].set(False)
    )
    np.testing.assert_allclose(padded[:, :place], logits[:, :place], atol=1e-5)
    np.testing.assert_array_equal(
      of_padded.choice.load.sum(axis=1), 2 * place * 2
    )
  assert logits.dtype == jnp.float32
  assert outputs.scores.shape == (3, 2 * SEQUENCE, 6)
  assert np.all(outputs.choice.load.sum(axis=1) == 2 * SEQUENCE * 2)


def _training(tokens, **overrides):
  """One training step, and the parameters to give to it."""
  graphdef, params, routers = nnx.split(
    _model(**overrides), nnx.Param, nn.RouterState
  )

  def run(params):
    def loss(params):
      model = nnx.merge(graphdef, params, routers, copy=True)
      logits, _ = model(tokens, train=True)
      cross_entropy = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]
      )
      return cross_entropy.mean(), nnx.state(model, nn.RouterState)

    return jax.value_and_grad(loss, has_aux=True)(params)

  return run, params


def _train(tokens, **overrides):
  """Loss, gradients and router state of one training step."""
  run, params = _training(tokens, **overrides)
  (loss, routers), gradients = jax.jit(run)(params)
  return loss, gradients, routers


@pytest.fixture(scope='module')
def plain(tokens):
  return _train(tokens)


@pytest.mark.parametrize(
  'policy',
  ['nothing_saveable', pytest.param('dots_saveable', marks=pytest.mark.long)],
)
def test_remat_changes_nothing(plain, tokens, policy):
  """Not the loss, the gradients or q; the observation counts once."""
  loss, gradients, routers = _train(tokens, remat=True, remat_policy=policy)
  np.testing.assert_allclose(loss, plain[0], rtol=1e-6)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6),
    gradients,
    plain[1],
  )
  moe, plain_moe = (
    state['moe_blocks']['feed_forward'] for state in (routers, plain[2])
  )
  q = moe['state'].get_value().q
  assert np.all(np.any(q != 0, axis=1))
  np.testing.assert_allclose(q, plain_moe['state'].get_value().q, atol=1e-7)
  load = moe['observation'].get_value()
  np.testing.assert_array_equal(load, plain_moe['observation'].get_value())
  np.testing.assert_array_equal(load.sum(axis=1), 2 * SEQUENCE * 2)


@pytest.mark.long
def test_what_is_kept_is_not_computed_twice(tokens):
  def products(**overrides):
    run, params = _training(tokens, **overrides)
    return str(jax.make_jaxpr(run)(params)).count('dot_general')

  policies = (
    'nothing_saveable',
    'dots_with_no_batch_dims_saveable',
    'dots_saveable',
  )
  all_again, attention_again, none_again = (
    products(remat=True, remat_policy=policy) for policy in policies
  )
  assert all_again > attention_again >= none_again


def test_gradients_reach_every_parameter(plain):
  for path, gradient in nnx.to_flat_state(plain[1]):
    per_layer = np.asarray(gradient[...])
    if path[0] == 'moe_blocks':
      per_layer = np.abs(per_layer).reshape(3, -1).max(axis=1)
    assert np.all(np.isfinite(per_layer)), path
    assert np.all(np.any(per_layer != 0, axis=-1)), path


@pytest.mark.long
def test_bfloat16_is_finite_and_near_float32(plain, tokens):
  loss, gradients, routers = _train(tokens, dtype='bfloat16')
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, plain[0], rtol=0.01)
  for gradient in jax.tree.leaves(gradients):
    assert gradient.dtype == jnp.float32
    assert np.all(np.isfinite(gradient))
  q = routers['moe_blocks']['feed_forward']['state'].get_value().q
  assert q.dtype == jnp.float32 and np.all(np.isfinite(q))


@pytest.mark.long
def test_layers_are_those_of_a_loop(tokens):
  """A scan over stacked blocks, the first of them dense."""
  model = _model(dense_layers=1)
  logits, outputs = _apply(model, tokens, train=True)
  assert outputs.choice.load.shape == (2, 6)

  @nnx.jit
  def loop(model):
    def block(stacked, layer):
      graphdef, state = nnx.split(stacked)
      return nnx.merge(graphdef, jax.tree.map(lambda x: x[layer], state))

    x = model.embedding(tokens)
    dense = block(model.dense_blocks, 0)
    y, _ = dense.attention(dense.attention_norm(x))
    x += y
    y = dense.feed_forward_norm(x)
    y = jax.nn.silu(y @ dense.feed_forward.gate.kernel) * (
      y @ dense.feed_forward.up.kernel
    )
    x += y @ dense.feed_forward.down.kernel
    qs = []
    for layer in range(2):
      moe = block(model.moe_blocks, layer)
      x, _, _ = moe(x, None, train=True)
      qs.append(moe.feed_forward.state.get_value().q)
    x = model.norm(x)
    return x @ model.embedding.embedding.T, jnp.stack(qs)

  expected, qs = loop(_model(dense_layers=1))
  np.testing.assert_allclose(logits, expected, atol=1e-5)
  np.testing.assert_allclose(_q(model), qs, atol=1e-6)
  assert np.any(qs[0] != qs[1])


def test_update_router_moves_each_layer_by_its_own_loads(tokens):
  model = _model(routing.loss_free(0.5))
  loads = [
    _apply(model, batch, train=True)[1].choice.load
    for batch in (tokens, tokens[::-1, ::-1])
  ]
  np.testing.assert_array_equal(_q(model), 0)
  nn.update_routers(model)
  total = np.asarray(loads[0] + loads[1])
  even = 2 * 2 * SEQUENCE * 2 / 6
  np.testing.assert_array_equal(_q(model), 0.5 * np.sign(total - even))
  assert len(np.unique(_q(model), axis=0)) > 1
  np.testing.assert_array_equal(
    model.moe_blocks.feed_forward.observation.get_value(), 0
  )


def _count(**overrides):
  def build():
    config = nn.DecoderConfig(**overrides)
    return nn.Decoder(
      config, routing.unbalanced(), vocabulary=6400, rngs=nnx.Rngs(0)
    )

  params = nnx.state(nnx.eval_shape(build), nnx.Param)
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def test_parameters_of_the_paper():
  """MiniMind by the names and sizes that its paper gives."""
  d, f, layers, experts = 512, 1408, 8, 16
  projections = d * d * 2 + d * (2 * 64) * 2
  layer = projections + (experts + 1) * 3 * d * f + d * experts + 2 * d
  assert _count() == layers * layer + 6400 * d + d
  assert round(_count() / 1e6, 1) == 302.7
  assert round(_count(experts=64, experts_per_token=8) / 1e9, 1) == 1.1
  # Heads four times as wide: all four matrices of attention are.
  assert _count(head_size=256) - _count() == layers * 3 * projections


@pytest.mark.parametrize(
  ('overrides', 'words'),
  [
    ({'layers': 0}, ['model.layers=0', '1 or more']),
    ({'dense_layers': 3}, ['model.dense_layers=3', 'model.layers=3']),
    ({'dense_layers': -1}, ['model.dense_layers=-1', '0 or more']),
    ({'heads': 3}, ['model.heads=3', 'model.width=16']),
    ({'heads': 16}, ['model.heads=16', 'even width', 'model.head_size']),
    ({'heads': 16, 'head_size': 3}, ['model.head_size=3', 'even']),
    ({'kv_heads': 3}, ['model.kv_heads=3', 'model.heads=4']),
    ({'rope_theta': 0.0}, ['model.rope_theta=0.0', 'greater than 0']),
    ({'norm_epsilon': -1.0}, ['model.norm_epsilon=-1.0', 'greater than 0']),
    ({'experts_per_token': 7}, ['model.experts_per_token=7']),
  ],
)
def test_config_errors_name_option_value_and_what_would_work(overrides, words):
  with pytest.raises(ValueError) as error:
    _model(**overrides)
  assert all(word in str(error.value) for word in words), error.value


def test_a_call_without_tokens_is_refused():
  with pytest.raises(ValueError, match=r'shape \(2, 0\) has no tokens'):
    _model()(jnp.zeros((2, 0), jnp.int32), train=False)


@pytest.mark.long
@pytest.mark.parametrize('sequence', [16, 17, 40, 48])
def test_attention_in_blocks_equals_attention_to_all(sequence, monkeypatch):
  """Also its gradients, where the last block is shorter, and blocks in turn."""
  monkeypatch.setattr(attention, '_BLOCK', 8)
  monkeypatch.setattr(attention, '_PARTS', 2)
  random = np.random.default_rng(0)
  query, weight = random.normal(size=(2, 2, sequence, 4, 6)).astype('float32')
  key, value = random.normal(size=(2, 2, sequence, 2, 6)).astype('float32')

  def loss(attend, *arguments):
    return jnp.sum(weight * attend(*arguments))

  def gradients(attend):
    of_all = jax.value_and_grad(functools.partial(loss, attend), (0, 1, 2))
    return jax.device_get(of_all(query, key, value))

  expected = gradients(
    functools.partial(jax.nn.dot_product_attention, is_causal=True)
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    gradients(attention.attend),
    expected,
  )


@pytest.mark.parametrize('sequence', [17, 48])
def test_documents_are_kept_apart_in_blocks(sequence, monkeypatch):
  monkeypatch.setattr(attention, '_BLOCK', 8)
  monkeypatch.setattr(attention, '_PARTS', 2)
  random = np.random.default_rng(0)
  query = random.normal(size=(1, sequence, 4, 6)).astype('float32')
  key, value = random.normal(size=(2, 1, sequence, 2, 6)).astype('float32')
  positions = jnp.arange(sequence)[None] % 13
  np.testing.assert_allclose(
    attention.attend(query, key, value, positions),
    attention.attend_last(query, key, value, sequence, positions),
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ('options', 'channels'),
  [
    ({}, 4 * 4),
    ({'tied_embeddings': False}, 4 * 4),
    # Scores of 4 channels, of which half are turned, and values of 2.
    ({'latent_size': 8, 'rotary_size': 2, 'value_size': 2}, 4 * 3),
  ],
  ids=str,
)
def test_useful_flops_are_those_of_products(options, channels):
  """An embedding that only looks up a row has none."""
  model = _model(**options)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  _, active = nn.parameter_counts(model.config, params)
  if 'tied_embeddings' in options:
    active -= VOCABULARY * 16
  flops = nn.useful_flops(model.config, params, SEQUENCE)
  assert flops == 6 * (active + 3 * SEQUENCE * channels)
