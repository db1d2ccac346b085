"""The auxiliary loss against values worked by hand."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.parallel import mesh as meshes
from moe_jax.routing.order_statistic import total

# Two sequences of three tokens, three experts, k = 1.
BATCH = jnp.array(
  [
    [[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.25, 0.75, 0.0]],
    [[0.0, 0.25, 0.75], [0.25, 0.0, 0.75], [0.25, 0.25, 0.5]],
  ]
)
EXPERTS = jnp.array([[[0], [0], [1]], [[2], [2], [2]]])


def _inputs(
  scores_BxSxE, experts_BxSxK, mask_BxS=None, step_load_E=0, axis_name=None
):
  """What a loss sees of a layer, but for the logits and the router."""
  experts_TxK = experts_BxSxK.reshape(-1, experts_BxSxK.shape[-1])
  scores_TxE = scores_BxSxE.reshape(-1, scores_BxSxE.shape[-1])
  mask_T = None if mask_BxS is None else mask_BxS.reshape(-1)
  choice = routing.replay(scores_TxE, experts_TxK, mask_T=mask_T)
  return routing.LossInputs(
    logits_BxSxE=jnp.log(scores_BxSxE),
    scores_BxSxE=scores_BxSxE,
    choice=choice,
    mask_BxS=mask_BxS,
    router_DxE=jnp.eye(scores_BxSxE.shape[-1]),
    step_load_E=step_load_E + total(choice.load, axis_name),
    k=experts_BxSxK.shape[-1],
    axis_name=axis_name,
  )


def auxiliary_loss(scores, experts, *, over, **more):
  return routing.auxiliary_loss(1.0, over=over)(
    _inputs(scores, experts, **more)
  )


def test_auxiliary_loss_by_hand():
  # Sequence 0: f = (2, 1, 0), P = (1.25, 1.5, 0.25) / 3; sum f P = 4 / 3.
  # Sequence 1: f = (0, 0, 3), P = (.5, .5, 2) / 3; sum f P = 2.
  loss = auxiliary_loss(BATCH, EXPERTS, over='sequence')
  assert loss == pytest.approx((4 / 3 + 2) / 2)
  # Together: f = (1, 0.5, 1.5), P = (1.75, 2, 2.25) / 6; sum f P = 6.125 / 6.
  loss = auxiliary_loss(BATCH, EXPERTS, over='batch')
  assert loss == pytest.approx(6.125 / 6)
  balancer = routing.loss_controlled(0.5, over='batch')
  loss = balancer.loss(_inputs(BATCH, EXPERTS))
  assert loss == pytest.approx(6.125 / 12)


@pytest.mark.parametrize('over', ['sequence', 'batch'])
def test_auxiliary_loss_with_a_mask_is_that_of_the_tokens_left(over):
  generator = np.random.default_rng(2)
  scores = jax.nn.softmax(jnp.asarray(generator.normal(size=(3, 5, 4))))
  _, experts = jax.lax.top_k(scores, 2)
  keep = [0, 3, 4]
  # The same places in the first two sequences; nothing of the third.
  mask = jnp.zeros((3, 5), bool).at[:2, jnp.array(keep)].set(True)
  masked = auxiliary_loss(
    jnp.where(mask[..., None], scores, jnp.nan),
    experts,
    over=over,
    mask_BxS=mask,
  )
  left = auxiliary_loss(scores[:2, keep], experts[:2, keep], over=over)
  np.testing.assert_allclose(masked, left, rtol=1e-6)
  assert abs(left - 1) > 1e-3
  nothing = auxiliary_loss(scores, experts, over=over, mask_BxS=mask & False)
  assert nothing == 0


@pytest.mark.parametrize('scoring', routing.SCORINGS)
@pytest.mark.parametrize('over', ['sequence', 'batch', 'step'])
def test_auxiliary_loss_is_one_at_balance(over, scoring):
  """Every expert is chosen equally often, whatever the scores are."""
  logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 8, 4)))
  scores = routing.SCORINGS[scoring](logits)
  experts = jnp.stack([jnp.arange(8) % 4, (jnp.arange(8) + 1) % 4], axis=-1)
  experts = jnp.broadcast_to(experts, (2, 8, 2))
  loss = auxiliary_loss(scores, experts, over=over)
  np.testing.assert_allclose(loss, 1, rtol=1e-6)


def test_auxiliary_loss_has_a_gradient_through_scores_only():
  """Counts being constants, d/ds_j of it is (f_j - sum_i f_i s_i) / n."""
  balancer = routing.loss_controlled(1.0, over='batch')

  def loss(scores):
    return balancer.loss(_inputs(scores, EXPERTS))

  f = np.array([1, 0.5, 1.5])
  np.testing.assert_allclose(
    jax.grad(loss)(BATCH), (f - (BATCH @ f)[..., None]) / 6, atol=1e-7
  )


def test_auxiliary_loss_over_shards_is_that_of_the_batch():
  mesh = meshes.make_mesh(devices=jax.devices()[:2])
  mask = jnp.array([[True, True, False], [True, True, True]])
  for over in ('sequence', 'batch', 'step'):
    loss = functools.partial(auxiliary_loss, over=over)
    sharded = jax.shard_map(
      lambda s, e, m, loss=loss: loss(s, e, mask_BxS=m, axis_name=meshes.AXES),
      mesh=mesh,
      in_specs=P(meshes.AXES),
      out_specs=P(),
    )
    np.testing.assert_allclose(
      jax.jit(sharded)(BATCH, EXPERTS, mask),
      loss(BATCH, EXPERTS, mask_BxS=mask),
      rtol=1e-6,
    )


def test_scaling_all_scores_down_does_not_lower_the_loss():
  """As sigmoid scores could, if a row were not divided by its sum."""
  for over in ('sequence', 'batch', 'step'):
    full, half = (
      auxiliary_loss(factor * BATCH, EXPERTS, over=over) for factor in (1, 0.5)
    )
    np.testing.assert_allclose(half, full, rtol=1e-6)


def test_a_loss_over_the_step_by_hand():
  """Loads (2, 1, 3) of this microbatch and (4, 0, 2) of those before it."""
  before = jnp.array([4, 0, 2])
  loss = auxiliary_loss(BATCH, EXPERTS, over='step', step_load_E=before)
  # f = 3 (6, 1, 5) / 12, P = (1.75, 2, 2.25) / 6.
  assert loss == pytest.approx((6 * 1.75 + 1 * 2 + 5 * 2.25) / 4 / 6)


def test_similarity_loss_by_hand():
  router = jnp.array([[1.0, 0.5], [0.0, 1.0], [0.0, 2.0]])
  # R^T R = ((1, 0.5), (0.5, 5.25)): off by 0, 0.5, 0.5 and 4.25.
  inputs = _inputs(BATCH, EXPERTS)._replace(router_DxE=router)
  loss = routing.similarity_loss(2.0)
  assert loss(inputs) == pytest.approx(2 * 5.25 / 4)
  assert loss(inputs._replace(router_DxE=jnp.eye(3)[:, :2])) == 0


def test_losses_add_up_and_leave_the_rule_as_it_is():
  rule = routing.loss_controlled(0.5, over='batch')
  similarity = routing.similarity_loss(1.0)
  both = routing.with_losses(rule, similarity, routing.z_loss(0.25))
  inputs = _inputs(BATCH + 0.1, EXPERTS)
  expected = (
    rule.loss(inputs) + similarity(inputs) + routing.z_loss(0.25)(inputs)
  )
  np.testing.assert_allclose(both.loss(inputs), expected, rtol=1e-6)
  assert both._replace(loss=rule.loss) == rule


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (lambda: routing.auxiliary_loss(-1.0), 'alpha=-1.0: must be 0 or more'),
    (lambda: routing.similarity_loss(-2.0), 'weight=-2.0: must be 0 or more'),
    (lambda: routing.z_loss(-0.5), 'weight=-0.5: must be 0 or more'),
  ],
)
def test_negative_weights_are_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make()
