"""Mistakes of public trainers that no other test here shows to be absent.

docs/pages/bugs.md lists them all, with their threads and the tests.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import nn, routing
from tests.train import tiny
from tests.train.test_step import assert_close, run_steps

WIDTH, EXPERTS, K = 16, 8, 2


def layer(balancer, q_E):
  """A layer with these prices."""
  config = nn.MoEConfig(
    width=WIDTH, hidden=8, experts=EXPERTS, experts_per_token=K
  )
  # In training, room for every token, by the backend that compiles fast.
  room = EXPERTS / K
  moe = nn.MoE(config, balancer, capacity_factor=room, rngs=nnx.Rngs(0))
  moe.state.set_value(moe.state.get_value()._replace(q=jnp.asarray(q_E)))
  return moe


def tokens(batch=2, sequence=12):
  return 3 * jax.random.normal(jax.random.key(1), (batch, sequence, WIDTH))


def softmax(logits):
  return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def pooled_loss(scores_TxE, experts_TxK):
  """Sum over experts of f P, of one pool of tokens."""
  (n, experts), k = scores_TxE.shape, experts_TxK.shape[-1]
  count_E = np.bincount(np.ravel(experts_TxK), minlength=experts)
  return np.sum(count_E * experts / (n * k) * np.mean(scores_TxE, axis=0))


def test_the_loss_counts_the_experts_that_prices_chose():
  """And takes one softmax of the logits, not two."""
  q_E = np.linspace(0.2, -0.2, EXPERTS, dtype=np.float32)
  moe = layer(routing.loss_controlled(1.0, over='batch'), q_E)
  x = tokens()
  _, aux = nnx.jit(lambda moe, x: moe(x, train=True))(moe, x)
  logits = np.asarray(x).reshape(-1, WIDTH) @ np.asarray(moe.router[...])
  scores = softmax(np.float64(logits))
  np.testing.assert_allclose(aux.scores, scores, rtol=1e-4)
  chosen = np.argsort(q_E - scores, axis=-1)[:, :K]
  np.testing.assert_array_equal(aux.choice.experts, chosen)
  np.testing.assert_allclose(aux.loss, pooled_loss(scores, chosen), rtol=1e-4)
  # Neither the best scores without prices nor a second softmax give that.
  best = np.argsort(-scores, axis=-1)[:, :K]
  for other in (
    pooled_loss(scores, best),
    pooled_loss(softmax(scores), chosen),
  ):
    assert abs(aux.loss - other) > 1e-3


def test_experts_of_other_groups_lose_at_any_price():
  """Where all that a token may take is worth less than 0."""
  scores = softmax(np.random.default_rng(0).normal(size=(64, EXPERTS)))
  choice = routing.choose(
    jnp.float32(scores),
    jnp.full(EXPERTS, 2.0),
    k=K,
    groups=4,
    groups_per_token=1,
  )
  best = np.argmax(scores.reshape(-1, 4, 2).sum(-1), axis=1)
  expected = best[:, None] * 2 + np.arange(2)
  np.testing.assert_array_equal(np.sort(choice.experts, axis=1), expected)


def test_the_auxiliary_loss_reaches_the_router_alone():
  graphdef, params, routers = nnx.split(
    layer(routing.loss_controlled(1.0), np.zeros(EXPERTS, np.float32)),
    nnx.Param,
    nn.RouterState,
  )

  @jax.jit
  @jax.grad
  def gradient(params):
    moe = nnx.merge(graphdef, params, routers, copy=True)
    return moe(tokens(), train=True)[1].loss

  flat = nnx.to_flat_state(gradient(params))
  moved = {path[0] for path, leaf in flat if np.any(leaf.get_value())}
  assert moved == {'router'}


def test_layers_are_not_pooled_in_the_auxiliary_loss():
  """Two layers that overload opposite halves of the experts."""
  config = nn.DecoderConfig(
    width=WIDTH,
    hidden=8,
    experts=4,
    experts_per_token=2,
    layers=2,
    dense_layers=0,
    heads=2,
    kv_heads=1,
  )
  balancer = routing.loss_controlled(1.0, over='batch')
  model = nn.Decoder(
    config, balancer, vocabulary=40, capacity_factor=2.0, rngs=nnx.Rngs(0)
  )
  q_LxE = jnp.array([[-9.0, -9.0, 0.0, 0.0], [0.0, 0.0, -9.0, -9.0]])
  model.moe_blocks.feed_forward.state.set_value(routing.State(q_LxE))
  text = jax.random.randint(jax.random.key(0), (2, 12), 0, 40)
  _, outputs = nnx.jit(lambda model, text: model(text, train=True))(model, text)
  scores, experts = map(np.asarray, (outputs.scores, outputs.choice.experts))
  of_layers = [pooled_loss(scores[i], experts[i]) for i in range(2)]
  np.testing.assert_allclose(outputs.loss, of_layers, rtol=1e-5)
  assert all(abs(loss - 1) > 1e-3 for loss in of_layers)
  # Pooled, as if an expert were the same in both layers, they look even.
  pooled = pooled_loss(scores.reshape(-1, 4), experts.reshape(-1, 2))
  assert pooled == pytest.approx(1, abs=1e-6)


def test_frozen_routes_and_outputs_do_not_depend_on_other_sequences():
  moe = layer(routing.bip(), np.linspace(0, 0.1, EXPERTS, dtype=np.float32))
  apply = nnx.jit(lambda moe, x: moe(x, train=False))
  x = tokens(batch=4)
  y, aux = apply(moe, x)
  # The others all the same token, so that two experts are far over capacity.
  others = jnp.broadcast_to(x[1:2, :1], x[1:].shape)
  y_2, aux_2 = apply(moe, jnp.concatenate([x[:1], others]))
  assert aux_2.choice.load.max() > 2.5 * aux.choice.load.mean()
  np.testing.assert_array_equal(
    aux.choice.experts[:12], aux_2.choice.experts[:12]
  )
  np.testing.assert_allclose(y[0], y_2[0], rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_the_auxiliary_loss_of_a_step_does_not_depend_on_microbatches(tmp_path):
  """Neither the metric nor the gradient."""
  config = tiny.tiny_config(tmp_path, 'loss_controlled')
  _, _, whole, (expected,) = run_steps(config, count=1)
  config = dataclasses.replace(config, accumulation=4)
  _, _, state, (actual,) = run_steps(config, count=1)
  assert expected['train/aux_loss'] > 0.1
  for name in ('train/loss', 'train/aux_loss', 'train/gradient_norm'):
    assert_close(actual[name], expected[name], rtol=1e-5)
  assert_close(state.params, whole.params)
