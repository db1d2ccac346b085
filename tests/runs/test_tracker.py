"""Weights & Biases gets what a run records, and cannot harm it."""

import sys
import types
from unittest import mock

import pytest

from moe_jax.runs import tracker, writer
from moe_jax.train.plan import plan
from tests.runs.test_writer import EVALUATED, FINE, metrics, open_writer, read
from tests.train import tiny

OPTIONS = {'tracker': 'wandb', 'tracker_project': 'balance'}


class Fake(types.ModuleType):
  """Stands in for wandb: writes down what it is told; fails where asked to."""

  def __init__(self):
    super().__init__('wandb')
    self.begun, self.logged, self.ended = [], [], []
    self.fails = self.mode = ''
    self.logged_in = True

  def setup(self):
    return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))

  def login(self, *, prompt, verify):
    assert not prompt and not verify
    return self.logged_in

  def init(self, **arguments):
    self._may_fail('init')
    self.begun.append(arguments)
    return self

  def define_metric(self, name, step_metric):
    assert (name, step_metric) == ('*', 'step')

  def log(self, values):
    self._may_fail('log')
    self.logged.append(values)

  def finish(self, exit_code):
    self._may_fail('finish')
    self.ended.append(exit_code)

  def Histogram(self, values):
    return values.tolist()

  def Settings(self, **settings):
    return settings

  def _may_fail(self, what):
    if what == self.fails:
      raise RuntimeError(f'{what}\nrefused')


@pytest.fixture
def wandb(monkeypatch):
  fake = Fake()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  return fake


def record_steps(workdir, numbers, **options):
  with open_writer(workdir, **OPTIONS, **options) as run:
    for step in numbers:
      run.record(step, metrics(float(step)), FINE)


def test_gets_what_is_recorded(wandb, tmp_path):
  with open_writer(tmp_path, **OPTIONS, steps=2, skipped_steps=2) as run:
    run.record(1, metrics(), FINE)
    run.record(2, metrics(float('nan')), FINE)
    run.add(dict, EVALUATED)
  first, second = wandb.logged
  assert (first['step'], first['train/loss']) == (1, 1.5)
  # Loads of 1 and 2, in units of their mean.
  assert first['router/load/layer_00'] == [1 / 1.5, 2 / 1.5]
  assert second['step'] == 2 and 'train/loss' not in second
  assert second['eval/validation/perplexity'] == 7.0
  (begun,) = wandb.begun
  assert begun['project'] == 'balance' and begun['name'] == 'test'
  assert begun['config']['steps'] == 2
  assert begun['config']['facts'] == {'run': 'name'}
  assert begun['dir'] == tmp_path
  assert wandb.ended == [0]


def test_a_run_that_resumes_goes_on_in_the_same_run(wandb, tmp_path):
  record_steps(tmp_path, [1, 2, 3])
  record_steps(tmp_path, range(4, 10), step=3)
  assert [begun['id'] for begun in wandb.begun] == ['name', 'name']
  assert {begun['resume'] for begun in wandb.begun} == {'allow'}
  assert [values['step'] for values in wandb.logged] == list(range(1, 10))
  assert wandb.ended == [1, 0]  # Only then is it finished.


@pytest.mark.parametrize('fails', ['init', 'log', 'finish'])
def test_what_fails_there_is_a_warning(wandb, tmp_path, capsys, fails):
  wandb.fails = fails
  record_steps(tmp_path, [1, 2, 3])
  assert [record['step'] for record in read(tmp_path)] == [1, 2, 3]
  err = capsys.readouterr().err
  warning = f'warning: no more for wandb: {fails}\\nrefused\n'
  assert err.count('wandb') == err.count(warning) == 1


def test_nothing_in_a_bucket_but_files(wandb, bucket):
  """Folders are not uploaded with the metrics."""
  with mock.patch.object(writer, 'Saver'):
    record_steps(bucket, [1])
  (begun,) = wandb.begun
  assert begun['dir'] is None


def test_none_is_wanted(wandb, tmp_path):
  with open_writer(tmp_path) as run:
    run.record(1, metrics(), FINE)
  assert not wandb.begun


@pytest.mark.parametrize('missing', ['package', 'folder', 'account'])
def test_a_run_that_could_not_use_it_is_refused(
  wandb, tmp_path, monkeypatch, missing
):
  """Before anything is compiled or written."""
  text = tiny.write_text(tmp_path)
  config = tiny.tiny_config(text, tracker='wandb')
  wandb.mode, wandb.logged_in = 'online', missing != 'account'
  if missing != 'account':
    # A module that is None cannot be imported.
    module = None if missing == 'package' else types.ModuleType('wandb')
    monkeypatch.setitem(sys.modules, 'wandb', module)
  with pytest.raises(ValueError, match='^tracker=wandb: ') as error:
    plan(config, tmp_path / 'run')
  expected = 'wandb login' if missing == 'account' else "'.[wandb]'"
  assert expected in str(error.value) and '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()
  wandb.mode = 'offline'
  if missing == 'account':
    tracker.check('wandb')


def test_offline(tmp_path, monkeypatch):
  """The package itself, without a network; `wandb sync` would send it."""
  pytest.importorskip('wandb', reason='pip install -r requirements-wandb.txt')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  for name in ('CONFIG_DIR', 'CACHE_DIR', 'DATA_DIR'):
    monkeypatch.setenv(f'WANDB_{name}', str(tmp_path / name))
  monkeypatch.setenv('WANDB_ERROR_REPORTING', 'false')
  tracker.check('wandb')
  record_steps(tmp_path, [1, 2, 3])
  record_steps(tmp_path, [4], step=3)
  written = sorted(tmp_path.glob('wandb/offline-run-*/run-name.wandb'))
  assert len(written) == 2
  for path in written:
    content = path.read_bytes()
    for expected in (b'train/loss', b'router/load/layer_00', b'balance'):
      assert expected in content
  assert len(read(tmp_path)) == 4
