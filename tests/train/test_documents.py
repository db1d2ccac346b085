"""`data.cross_documents=False`: batches, evaluation and runs."""

import dataclasses
import itertools

from flax import nnx
import jax
import numpy as np
import pytest

from moe_jax import data
from moe_jax.parallel import mesh as meshes
from moe_jax.runs.reader import Reader
from moe_jax.train import batches as batches_lib
from moe_jax.train import evaluate as evaluation
from moe_jax.train import loop
from moe_jax.train import state as state_lib
from moe_jax.train import step as step_lib
from tests.train import tiny

S = 64  # Documents have more than twice as many tokens: some end in a batch.


@pytest.fixture(scope='module')
def config(text):
  return tiny.tiny_config(
    text, 'loss_free', sequence_length=S, **{'data.cross_documents': False}
  )


@pytest.fixture(scope='module')
def loaded(config):
  return data.load_text(config.data)


def first_batches(config, loaded, mesh):
  """Returns one for training and one of an evaluation."""
  return [
    next(batches_lib.training_batches(config, mesh, loaded, 0)),
    next(batches_lib.evaluation_batches(config, mesh, loaded, 'validation')),
  ]


def test_batches_have_positions_where_attention_keeps_to_documents(
  config, loaded
):
  mesh = meshes.make_mesh()
  end = loaded.tokenizer.end_of_document
  for batch in first_batches(config, loaded, mesh):
    inputs, positions = jax.device_get((batch.inputs, batch.positions))
    assert np.any(inputs[:, :-1] == end)
    np.testing.assert_array_equal(positions[:, 0], 0)
    np.testing.assert_array_equal(
      positions[:, 1:],
      np.where(inputs[:, :-1] == end, 0, positions[:, :-1] + 1),
    )
    assert positions.dtype == np.int32
    assert batch.positions.sharding == batch.inputs.sharding
  default = dataclasses.replace(
    config, data=dataclasses.replace(config.data, cross_documents=True)
  )
  for batch in first_batches(default, loaded, mesh):
    # No array more than before there was the option.
    assert batch.positions is None


@pytest.mark.long
def test_evaluation_is_of_each_document_alone(config, loaded):
  """The first token of a document is predicted from the one before."""
  config = dataclasses.replace(config, eval_solved=False)
  mesh = meshes.make_mesh()
  training = state_lib.make_training(config, mesh)
  state = training.init()
  found = evaluation.make_evaluation(config, training, mesh, loaded)(
    state, lambda: False
  )
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: state_lib.make_model(config)))
  params, router = jax.device_get((state.params, state.router))

  @jax.jit
  def losses(inputs, targets):
    decoder = nnx.merge(graphdef, params, router, copy=True)
    logits, _ = decoder(inputs[None], train=False)
    return -jax.nn.log_softmax(logits[0])[np.arange(S), targets]

  tokens, total = loaded.evaluation['validation'].astype(np.int32), []
  predicted = min(config.eval_sequences * S, len(tokens) - 1)
  ends = np.flatnonzero(tokens == loaded.tokenizer.end_of_document) + 1
  begins = {*range(0, predicted, S), *ends[ends < predicted]}
  assert len(begins) > predicted // S + 1
  for begin, end in itertools.pairwise([*sorted(begins), predicted]):
    # Padded, so that it is compiled once: what follows changes nothing before.
    inputs, targets = np.zeros((2, S), np.int32)
    inputs[: end - begin] = tokens[begin:end]
    targets[: end - begin] = tokens[begin + 1 : end + 1]
    total += list(losses(inputs, targets)[: end - begin])
  assert len(total) == predicted
  assert found['eval/validation/perplexity'] == pytest.approx(
    np.exp(np.mean(total)), rel=1e-4
  )


@pytest.mark.long
def test_accumulation_on_a_mesh_equals_one_device(config, loaded):
  config = dataclasses.replace(config, batch_size=16, accumulation=2)
  results = []
  for shape in ((1, 1), (2, 4)):
    devices = jax.devices()[: np.prod(shape)]
    mesh = meshes.make_mesh(*shape, devices=devices)
    training = state_lib.make_training(config, mesh)
    step = step_lib.make_train_step(config, training)
    batch, _ = first_batches(config, loaded, mesh)
    _, metrics, diagnostics = step(training.init(), batch)
    results.append((metrics, diagnostics['squares']['gradient']))
  (metrics, squares), (expected, expected_squares) = jax.device_get(results)
  assert metrics['train/loss'] == pytest.approx(
    expected['train/loss'], rel=1e-5
  )
  for name, square in squares.items():
    np.testing.assert_allclose(square, expected_squares[name], rtol=1e-3)


@pytest.mark.long
def test_a_run_is_resumed(config, tmp_path, monkeypatch):
  config = dataclasses.replace(config, steps=3, checkpoint_every=2)

  def two_batches(*args):
    yield from itertools.islice(batches_lib.training_batches(*args), 2)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(loop, 'training_batches', two_batches)
    tiny.run(config, tmp_path / 'run')
  tiny.run(config, tmp_path / 'run')
  tiny.run(config, tmp_path / 'undisturbed')
  resumed, undisturbed = (
    [
      (record['train/loss'], record.get('eval/validation/perplexity'))
      for record in Reader(tmp_path / name).records
    ]
    for name in ('run', 'undisturbed')
  )
  assert resumed == undisturbed
  assert len(resumed) == 3 and resumed[-1][1] > 1
