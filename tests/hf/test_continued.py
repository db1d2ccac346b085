"""A public model, imported and trained on, under rules that it did not have."""

import shutil

import jax
import numpy as np
import optax
import pytest

from experiments import continued
from moe_jax import config as config_lib
from moe_jax import hf
from moe_jax.analysis import Run
from moe_jax.data import prepare
from moe_jax.runs import checkpoints
from moe_jax.runs.reader import Reader
from moe_jax.train import batches
from tests import golden_data
from tests.hf.tiny import write_tokenizer
from tests.train import tiny

STEPS = 200


@pytest.fixture(scope='module')
def public(tmp_path_factory):
  """The golden model with its prices, imported, and a corpus of its tokens."""
  place = tmp_path_factory.mktemp('public')
  golden, folder = golden_data.DIRECTORY / 'hf' / 'glm4_moe', place / 'model'
  shutil.copytree(golden, folder)
  write_tokenizer(folder / 'tokenizer.json', '</s>')
  hf.import_model(str(folder), str(place / 'run'))
  (place / 'text').mkdir()
  tiny.write_text(place / 'text')
  source = str(place / 'text' / '*.txt')
  prepare.prepare(source, str(folder), str(place / 'corpus'), validation=0.1)
  return place


@pytest.fixture
def train(public, tmp_path, monkeypatch):
  """Returns a function that trains the model on."""

  def run(method, steps, average=0.0):
    monkeypatch.setenv('MODEL', str(public / 'run'))
    options = continued.get_config(method)
    options.update(
      steps=steps,
      warmup_steps=steps // 10,
      batch_size=8,
      sequence_length=32,
      learning_rate=1e-3,
    )
    options.data.update(corpus=str(public / 'corpus'), evaluation_sets='')
    options.data.cache_dir = str(tmp_path / 'cache')
    options.optimizer.average = average
    return tiny.run(config_lib.freeze(options), tmp_path / 'run')

  return run


@pytest.mark.long
def test_an_average_is_what_is_exported(train, tmp_path):
  run = train('loss_free', steps=2, average=0.5)
  hf.export_model(str(run.workdir), str(tmp_path / 'out'))
  hf.import_model(str(tmp_path / 'out'), str(tmp_path / 'again'))
  again, trained = (
    Run(workdir).restore().params
    for workdir in (tmp_path / 'again', run.workdir)
  )
  jax.tree.map(np.testing.assert_array_equal, again, trained)
  raw = checkpoints.read_item(run.workdir / 'checkpoints' / '2', 'params')
  assert np.any(
    raw['embedding']['embedding'] != trained['embedding']['embedding']
  )


@pytest.mark.long
@pytest.mark.parametrize('method', ['loss_free', 'bip', 'midpoint'])
def test_a_loss_goes_on_without_a_jump(public, train, method):
  run = train(method, STEPS)
  losses = [record['train/loss'] for record in Reader(run.workdir).records]
  assert len(losses) == STEPS
  # The first one is the loss of the model as it was imported.
  batch = next(batches.training_batches(run.config, run.mesh, run.text, 0))
  imported = Run(public / 'run').restore()
  inputs, targets = jax.device_get((batch.inputs, batch.targets))
  logits, _ = imported.model(inputs, None, train=False)
  before = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  before = float(np.mean(before))
  close = {'loss_free': 1e-5, 'bip': 1e-2, 'midpoint': 1e-2}
  assert losses[0] == pytest.approx(before, rel=close[method])
  assert max(losses) < 1.02 * before
  assert np.mean(losses[-20:]) < 0.7 * before
  # Prices began at the model's own, which loss_free moves a little each step.
  if method == 'loss_free':
    rate = run.config.balancer['rate']
    q_LxE = Run(run.workdir).prices(0).loc[1].to_numpy()
    assert np.max(np.abs(q_LxE - imported.q[0])) < 1.01 * rate
