"""Prices found for a public model on a text, and what they make of it."""

import dataclasses
from unittest import mock

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import hf, nn, routing
from moe_jax.analysis import Run, repricing
from tests import golden_data

TOKENS = np.random.default_rng(0).integers(97, size=(3, 2, 33)).astype(np.int32)
DOCUMENTS = np.broadcast_to(np.arange(33, dtype=np.int32) % 11, TOKENS.shape)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('imported') / 'run'
  hf.import_model(str(golden_data.DIRECTORY / 'hf' / 'olmoe'), str(workdir))
  return Run(workdir).restore()


def q_of(model):
  return np.asarray(nn.prices(nnx.state(model, nn.RouterState)))


def predict(model, tokens_BxS, positions_NxBxS):
  """Predicts by the model alone; documents lie alike in all batches."""
  positions = None if positions_NxBxS is None else positions_NxBxS[0, :, :-1]
  return model(tokens_BxS[:, :-1], positions_BxS=positions, train=False)


def worst(load_LxE):
  return float(np.max(routing.max_violation(jnp.asarray(load_LxE))))


def test_prices_are_those_of_the_rule_and_stay(checkpoint):
  model, first = checkpoint.with_balancer(name='bip', iterations=20), TOKENS[:1]
  _, outputs = model(TOKENS[0, :, :-1], None, train=False)
  rule = routing.bip(20)
  q_E, _ = rule.solve(rule.init(8), outputs.scores[0], k=2)
  repricing.find_prices(model, first)
  q_LxE = q_of(model)
  np.testing.assert_allclose(q_LxE[0], q_E, atol=1e-6)
  priced = repricing.routed(model, first)
  np.testing.assert_array_equal(q_of(model), q_LxE)
  plain = repricing.routed(checkpoint.model, first)
  assert priced.load.sum() == plain.load.sum() == 2 * 2 * 32 * 2
  assert worst(priced.load) < 0.3 < worst(plain.load) / 2
  params = (nnx.state(m, nnx.Param) for m in (model, checkpoint.model))
  jax.tree.map(np.testing.assert_array_equal, *params)


def test_prices_are_of_documents_by_themselves(checkpoint):
  model = checkpoint.with_balancer(name='bip', iterations=20)
  _, outputs = predict(model, TOKENS[0], DOCUMENTS)
  rule = routing.bip(20)
  q_E, _ = rule.solve(rule.init(8), outputs.scores[0], k=2)
  repricing.find_prices(model, TOKENS[:1], DOCUMENTS[:1])
  np.testing.assert_allclose(q_of(model)[0], q_E, atol=1e-6)


@pytest.mark.parametrize('positions', [None, DOCUMENTS])
def test_loss_and_loads_are_those_of_the_model(checkpoint, positions):
  found = repricing.routed(checkpoint.model, TOKENS, positions)
  losses, loads = [], 0
  for tokens_BxS in TOKENS:
    logits, outputs = predict(checkpoint.model, tokens_BxS, positions)
    logs = np.asarray(jax.nn.log_softmax(logits))
    losses.append(-np.take_along_axis(logs, tokens_BxS[:, 1:, None], -1).mean())
    loads = loads + np.asarray(outputs.choice.load)
  np.testing.assert_array_equal(found.load, loads)
  np.testing.assert_allclose(found.loss, np.mean(losses), rtol=1e-6)


def test_rules_that_move_after_a_step_move_with_each_batch(checkpoint):
  model = checkpoint.with_balancer(name='loss_free', rate=0.01)
  seen = []
  for tokens_BxS in TOKENS:
    repricing.find_prices(model, tokens_BxS[None])
    seen.append(q_of(model))
  assert np.all(np.abs(seen[0]) <= 0.0101) and seen[0].any()
  assert np.abs(seen[2]).max() == pytest.approx(0.03, abs=1e-6)


def test_a_rule_that_solves_on_one_batch_alone(checkpoint):
  """Whatever the run accumulates."""
  config = dataclasses.replace(
    checkpoint.config, accumulation=2, batch_size=2 * checkpoint.mesh.size
  )
  with mock.patch.object(checkpoint, 'config', config):
    assert checkpoint.with_balancer(name='quantile')


def test_an_unknown_rule_is_refused(checkpoint):
  with pytest.raises(ValueError, match="balancer.name='even': unknown"):
    checkpoint.with_balancer(name='even')
