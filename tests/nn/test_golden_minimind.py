"""Our decoder is MiniMind: values and gradients of a reference run."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import nn, routing
from tests import golden_data
from tests.nn import golden as reference


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(('sequence', 0.0, False), marks=pytest.mark.long),
    ('batch', 0.0, False),
    pytest.param(('sequence', 8.0, False), marks=pytest.mark.long),
    pytest.param(('sequence', 0.0, True), marks=pytest.mark.long),
  ],
  ids=['sequence', 'batch', 'capacity', 'remat'],
)
def case(request):
  """Values, router outputs and gradients of our model, and the reference."""
  over, capacity_factor, remat = request.param
  name = {'sequence': 'minimind_seq', 'batch': 'minimind_batch'}[over]
  golden = golden_data.load(name)
  config = reference.decoder_config(golden, remat=remat)
  balancer = routing.loss_controlled(0.1, over=over)
  model = nn.Decoder(
    config,
    balancer,
    vocabulary=reference.vocabulary(golden),
    capacity_factor=capacity_factor,
    rngs=nnx.Rngs(0),
  )
  reference.set_weights(model, golden)
  graphdef, params, routers = nnx.split(model, nnx.Param, nn.RouterState)

  def losses(params):
    model = nnx.merge(graphdef, params, routers, copy=True)
    logits, outputs = model(jnp.asarray(golden['tokens']), train=True)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.asarray(golden['targets'])
    ).mean()
    auxiliary = outputs.loss.sum()
    return cross_entropy + auxiliary, (
      logits,
      outputs,
      cross_entropy,
      auxiliary,
    )

  @jax.jit
  def run(params):
    (_, values), gradients = jax.value_and_grad(losses, has_aux=True)(params)
    auxiliary_gradients = jax.grad(lambda p: losses(p)[1][3])(params)
    return values, gradients, auxiliary_gradients

  return golden, run(params)


def _relative(actual, expected):
  return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def test_golden_logits_and_losses(case):
  golden, ((logits, outputs, cross_entropy, auxiliary), _, _) = case
  assert _relative(logits, golden['logits']) < 1e-5
  np.testing.assert_allclose(cross_entropy, golden['ce_loss_mean'], rtol=1e-6)
  np.testing.assert_allclose(auxiliary, golden['aux_loss_total'], rtol=1e-5)
  for layer, loss in enumerate(outputs.loss):
    np.testing.assert_allclose(
      loss, golden[f'layers_{layer}_aux_loss'], rtol=1e-5
    )


def test_golden_scores_choices_and_gates(case):
  golden, ((_, outputs, _, _), _, _) = case
  assert not np.any(outputs.sums['dropped'])
  for layer in range(len(outputs.loss)):
    choice = jax.tree.map(lambda x, i=layer: x[i], outputs.choice)
    np.testing.assert_allclose(
      outputs.scores[layer], golden[f'layers_{layer}_router_scores'], atol=1e-5
    )
    np.testing.assert_array_equal(
      choice.experts, golden[f'layers_{layer}_topk_index']
    )
    np.testing.assert_allclose(
      choice.gates,
      golden[f'layers_{layer}_topk_gate_weight'],
      atol=1e-5,
    )
    np.testing.assert_array_equal(
      choice.load, np.bincount(choice.experts.ravel(), minlength=8)
    )


def test_golden_gradients(case):
  golden, (_, gradients, auxiliary_gradients) = case
  moe = gradients['moe_blocks']['feed_forward']
  embedding = gradients['embedding']['embedding'][...]
  assert _relative(embedding, golden['grad_token_embedding']) < 1e-4
  only = auxiliary_gradients['moe_blocks']['feed_forward']['router'][...]
  for layer in range(len(only)):
    for actual, name in [
      (moe['router'][...][layer].T, f'grad_layers_{layer}_moe_gate'),
      (moe['gate'][...][layer, 0].T, f'grad_layers_{layer}_moe_expert_0_w1'),
      (only[layer].T, f'grad_aux_only_layers_{layer}_moe_gate'),
    ]:
      assert _relative(actual, golden[name]) < 1e-4, name


def test_golden_moe_layer_alone():
  """The layer by itself, evaluated, on the input that MiniMind's layer saw."""
  golden = golden_data.load('minimind_seq')
  config = reference.decoder_config(golden)
  model = nn.Decoder(
    config,
    routing.unbalanced(),
    vocabulary=reference.vocabulary(golden),
    rngs=nnx.Rngs(0),
  )
  reference.set_weights(model, golden)
  apply = nnx.jit(lambda moe, x: moe(x, train=False)[0])
  for layer in range(config.layers):
    moe = nn.MoE(config, routing.unbalanced(), rngs=nnx.Rngs(1))
    stacked = nnx.state(model.moe_blocks.feed_forward, nnx.Param)
    nnx.update(moe, jax.tree.map(lambda x, i=layer: x[i], stacked))
    x = jnp.asarray(golden[f'layers_{layer}_moe_input']).reshape(2, 32, -1)
    y = apply(moe, x)
    expected = golden[f'layers_{layer}_moe_output'].reshape(y.shape)
    assert _relative(y, expected) < 1e-5
