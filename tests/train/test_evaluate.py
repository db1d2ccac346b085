"""Evaluation: sums over held-out text, which a signal may end."""

import dataclasses
import pathlib
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np
import pytest

from moe_jax import data
from moe_jax.config import Config
from moe_jax.parallel import mesh as meshes
from moe_jax.train import batches as batches_lib
from moe_jax.train import evaluate as evaluation
from moe_jax.train import state as state_lib
from moe_jax.train import step as step_lib
from tests.train import tiny


class Model(NamedTuple):
  config: Config
  training: state_lib.Training
  mesh: Mesh
  text: data.TextData
  state: state_lib.TrainState


@pytest.fixture(scope='module')
def model(text):
  config = tiny.tiny_config(text, eval_sequences=20)
  mesh = meshes.make_mesh()
  training = state_lib.make_training(config, mesh)
  text = data.load_text(config.data)
  return Model(config, training, mesh, text, training.init())


@pytest.fixture(scope='module')
def evaluate(model):
  return evaluation.make_evaluation(*model[:4])


@pytest.fixture(scope='module')
def result(model, evaluate):
  return evaluate(model.state, lambda: False)


def test_evaluation_against_a_loop_over_sequences(model, result):
  """Sums of the batches equal a plain mean over all targets."""
  # Without the mesh, a batch may be a single sequence.
  graphdef = nnx.graphdef(
    nnx.eval_shape(lambda: state_lib.make_model(model.config))
  )
  params, router = jax.device_get((model.state.params, model.state.router))
  tokenizer = model.text.tokenizer

  @jax.jit
  def losses(inputs, targets, mask):
    decoder = nnx.merge(graphdef, params, router, copy=True)
    logits, _ = decoder(inputs[None], mask[None], train=False)
    return -jax.nn.log_softmax(logits[0])[np.arange(16), targets]

  total, targets_seen = [], []
  tokens_N = model.text.evaluation['validation']
  for batch in batches_lib.evaluation_batches(
    model.config, model.mesh, model.text, 'validation'
  ):
    for inputs, targets, mask in zip(*jax.device_get(batch[:3]), strict=True):
      total += list(np.float64(losses(inputs, targets, mask)[mask]))
      targets_seen += list(targets[mask])
  assert len(total) == min(20 * 16, len(tokens_N) - 1)
  size = sum(
    len(tokenizer.decode([token]).encode())
    for token in targets_seen
    if token != tokenizer.end_of_document
  )
  assert result['eval/validation/perplexity'] == pytest.approx(
    np.exp(np.mean(total)), rel=1e-4
  )
  assert result['eval/validation/bits_per_byte'] == pytest.approx(
    np.sum(total) / np.log(2) / size, rel=1e-4
  )


@pytest.mark.long
@pytest.mark.parametrize(
  'options',
  [
    {'model.round_to_capacity': True},
    pytest.param({'capacity_factor': 1.25}, marks=pytest.mark.long),
  ],
)
def test_evaluation_needs_no_more_memory_than_training(options):
  """However the loads are: here, for eight times a device's even share."""
  config = tiny.tiny_config(
    pathlib.Path('no_text'),
    'loss_free',  # The quickest to compile.
    **{
      'mesh.data': 1,
      'mesh.expert': 8,
      'sequence_length': 512,
      'model.layers': 1,
      **options,
    },
  )
  mesh = meshes.make_mesh(1, 8)
  training = state_lib.make_training(config, mesh)
  tokens = jax.ShapeDtypeStruct(
    (8, 512), jnp.int32, sharding=NamedSharding(mesh, meshes.BATCH)
  )
  batch = batches_lib.Batch(tokens, tokens, tokens.update(dtype=bool))
  step = step_lib.make_train_step(config, training)
  evaluate = evaluation.make_evaluation_step(
    training, np.ones(300, np.int32), solved=True
  )
  state = training.abstract
  trained, evaluated = (
    lowered.compile().memory_analysis().temp_size_in_bytes
    for lowered in (
      step.lower(state, batch),
      evaluate.lower(state.params, state.router, batch),
    )
  )
  assert evaluated <= trained


def test_the_solved_pass_can_be_left_out(model, result):
  config = dataclasses.replace(model.config, eval_solved=False)
  frozen = evaluation.make_evaluation(
    config, model.training, model.mesh, model.text
  )(model.state, lambda: False)
  assert frozen == {
    name: value
    for name, value in result.items()
    if not name.endswith('_solved')
  }
  assert len(result) == 2 * len(frozen) == 4


@pytest.mark.parametrize('batches', [1, 2])
def test_an_evaluation_ends_once_it_is_stopped(model, evaluate, batches):
  """It asks before each batch, so that it waits for one at most."""
  asked = []

  def stop():
    asked.append(True)
    return len(asked) == batches

  assert evaluate(model.state, stop) is None
  assert len(asked) == batches


def test_unigram_loss_by_hand():
  train, tokens = np.array([0, 0, 1, 2]), np.array([2, 0, 1])
  # Counts with one added: 3, 2, 2, 1 of 8; the first token is given.
  expected = -np.log(3 / 8) - np.log(2 / 8)
  assert evaluation.unigram_loss(train, tokens, 4) == pytest.approx(expected)


def test_perplexity_overflows_to_infinity():
  assert evaluation.perplexity(1e6, 1) == float('inf')


def test_cross_entropy_masks_padding():
  logits = jax.random.normal(jax.random.key(0), (1, 3, 5))
  batch = batches_lib.Batch(
    np.zeros((1, 3), int), np.array([[1, 2, 3]]), np.array([[1, 0, 1]], bool)
  )
  loss = step_lib.cross_entropy(logits, batch)
  assert loss[0, 1] == 0
  assert loss[0, 0] == pytest.approx(-jax.nn.log_softmax(logits)[0, 0, 1])
