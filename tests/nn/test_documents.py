"""Sequences of several documents: as each document by itself."""

import functools

from flax import nnx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import nn, routing
from moe_jax.nn import attention
from moe_jax.parallel import mesh as meshes

VOCABULARY, BATCH, SEQUENCE = 40, 8, 12


@pytest.fixture(scope='module', autouse=True)
def blocks_of_eight():
  """So that documents end within blocks of queries and between them."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(attention, '_BLOCK', 8)
    yield


def build(mesh=None, **options):
  config = nn.DecoderConfig(
    width=16,
    hidden=24,
    experts=8,
    experts_per_token=2,
    layers=2,
    heads=4,
    kv_heads=2,
    **options,
  )

  @nnx.jit
  def make():
    key = jax.random.key(0, impl='unsafe_rbg')
    model = nn.Decoder(
      config,
      routing.loss_free(),  # Its q of now does not depend on the batch.
      vocabulary=VOCABULARY,
      mesh=mesh,
      rngs=nnx.Rngs(key),
    )
    model.embedding.embedding[...] *= 4  # Such that logits differ.
    q_LxE = jax.random.uniform(jax.random.key(1), (2, 8), maxval=0.1)
    model.moe_blocks.feed_forward.state.set_value(routing.State(q_LxE))
    return model

  return make()


def positions_of(begins_BxS):
  positions_BxS = np.zeros(begins_BxS.shape, np.int32)
  for place in range(1, begins_BxS.shape[1]):
    counted = positions_BxS[:, place - 1] + 1
    positions_BxS[:, place] = np.where(begins_BxS[:, place], 0, counted)
  return positions_BxS


def alone(tokens_BxS, positions_BxS):
  """Gives each document a row of its own, padded at its end.

  Returns:
    Rows of tokens and their mask, as many as if each token were a document; and
    where each token is in them.
  """
  row = np.cumsum(positions_BxS.reshape(-1) == 0) - 1
  places = row.reshape(positions_BxS.shape), positions_BxS
  rows = np.zeros((tokens_BxS.size, tokens_BxS.shape[1]), np.int32)
  rows[places] = tokens_BxS
  mask = np.zeros(rows.shape, bool)
  mask[places] = True
  return rows, mask, places


def make_step(model):
  """Returns a compiled step's loss, logits, gradients and loads."""
  graphdef, params, routers = nnx.split(model, nnx.Param, nn.RouterState)

  @jax.jit
  def step(tokens, targets, mask, positions):
    def loss(params):
      model = nnx.merge(graphdef, params, routers, copy=True)
      logits, _ = model(tokens, mask, positions_BxS=positions, train=True)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
      load = model.moe_blocks.feed_forward.observation.get_value()
      return jnp.sum(losses * mask) / jnp.sum(mask), (logits, load)

    (value, (logits, load)), gradients = jax.value_and_grad(loss, has_aux=True)(
      params
    )
    return value, logits, nnx.to_pure_dict(gradients), load

  return step


@pytest.fixture(scope='module')
def step():
  return make_step(build())


def check(packed_step, alone_step, begins_BxS, seed):
  """Compares a batch of packed documents with each in a row of its own."""
  random = np.random.default_rng(seed)
  shape = begins_BxS.shape
  tokens, targets = random.integers(VOCABULARY, size=(2, *shape), dtype='int32')
  positions = positions_of(begins_BxS)
  found = packed_step(tokens, targets, np.ones(shape, bool), positions)
  rows, mask, places = alone(tokens, positions)
  of_rows = np.zeros_like(rows)
  of_rows[places] = targets
  loss, logits, gradients, load = alone_step(rows, of_rows, mask, None)
  expected = loss, logits[places], gradients, load
  assert np.ptp(logits) > 1
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    jax.device_get(found),
    jax.device_get(expected),
  )


# The same each time, as rounding may flip a choice that is nearly a tie.
@pytest.mark.long
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(
  begins=st.lists(st.booleans(), min_size=2 * SEQUENCE, max_size=2 * SEQUENCE),
  seed=st.integers(0, 99),
)
def test_packed_documents_are_as_each_alone(step, begins, seed):
  """Logits, loss, gradients of all parameters, and experts' loads."""
  check(step, step, np.reshape(begins, (2, SEQUENCE)), seed)


@pytest.fixture(scope='module')
def begins():
  return np.random.default_rng(0).random((BATCH, SEQUENCE)) < 0.3


@pytest.mark.long
@pytest.mark.parametrize('shape', [(8, 1), (2, 4)], ids=['8x1', '2x4'])
def test_packed_documents_on_a_mesh_are_as_each_alone(shape, begins, step):
  """With layers that are computed again."""
  model = build(meshes.make_mesh(*shape), remat=True)
  check(make_step(model), step, begins, seed=0)


@pytest.mark.long
@pytest.mark.parametrize(
  ('shape', 'options'),
  [
    pytest.param(None, {}, id='one'),
    pytest.param((2, 4), {}, id='2x4'),
    pytest.param(None, {'latent_size': 8, 'rotary_size': 2}, id='latent'),
  ],
)
def test_decoding_a_document_is_as_within_a_sequence(shape, options, begins):
  model = build(shape and meshes.make_mesh(*shape), **options)
  tokens = np.random.default_rng(1).integers(VOCABULARY, size=begins.shape)
  positions = positions_of(begins)
  packed, _ = nnx.jit(
    lambda model: model(tokens, positions_BxS=positions, train=False)
  )(model)
  rows, _, places = alone(tokens, positions)
  extend = nnx.jit(lambda model, *arguments: model.extend(*arguments))
  cache, logits = model.init_cache(len(rows), SEQUENCE), []
  for place in range(positions.max() + 1):
    new, _, cache = extend(model, rows[:, place : place + 1], cache)
    logits.append(new)
  decoded = np.concatenate(logits, axis=1)[places]
  np.testing.assert_allclose(packed, decoded, atol=1e-5)
