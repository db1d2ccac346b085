"""Two processes of four devices train as one process of eight does."""

import json
import time

import pytest

from moe_jax.runs import records
from moe_jax.runs.reader import Reader
from tests import several_processes
from tests.several_processes import ROOT
from tests.train import tiny

# Quickly compiled: without a solve, one layer, no evaluation.
QUICK = {
  'method': 'loss_free',
  'model.layers': 1,
  'data.evaluation_sets': '',
  'steps': 3,
}


def launch(text, workdir, *own, method='bip', during=None, **overrides):
  """Runs the command in one process per item of `own`, its further flags.

  Returns:
    The exit code and what it said on stderr, of each process.
  """
  options = tiny.of_text(text) | {'steps': 4, 'checkpoint_every': 2} | overrides
  flags = [f'--config.{name}={value}' for name, value in options.items()]
  command = ['-m', 'moe_jax.main', f'--workdir={workdir}']
  command += [f'--config={ROOT}/tests/train/tiny.py:{method}', *flags]
  done = several_processes.run(
    *([*command, *more] for more in own), during=during
  )
  return [(process.returncode, process.stderr) for process in done]


def train(text, workdir, count, **overrides):
  for code, output in launch(text, workdir, *[[]] * count, **overrides):
    assert code == 0, output


def run_alone(text, workdir, method='bip', **overrides):
  """Trains in this process, on its eight devices, without interruption."""
  options = {'steps': 4, 'checkpoint_every': 2} | overrides
  tiny.run(tiny.tiny_config(text, method, **options), workdir)


def assert_same_training(workdir, expected):
  """Compares records; after a step, a token at a tie may go elsewhere."""
  actual, expected = (Reader(path).records for path in (workdir, expected))
  for record, same in zip(actual, expected, strict=True):
    assert record.keys() == same.keys()
    assert record['step'] == same['step']
    first = same['step'] == 1
    for name, value in same.items():
      if name.startswith(('train/', 'eval/')):
        # Devices' sums are made in another order: not the bits.
        later = 1e-3 if name == 'train/loss' else 5e-3
        tolerance = 1e-6 if first else later
        assert record[name] == pytest.approx(value, rel=tolerance), name
      if name.startswith('router/load/'):
        assert sum(record[name]) == sum(value)
        assert not first or record[name] == value


@pytest.mark.long
def test_two_processes_train_as_one(text, tmp_path):
  train(text, tmp_path / 'two', 2, **QUICK)
  run_alone(text, tmp_path / 'one', **QUICK)
  assert_same_training(tmp_path / 'two', tmp_path / 'one')
  assert len(list((tmp_path / 'two').glob('events.out.tfevents.*'))) == 1
  facts, expected = (
    json.loads((tmp_path / name / 'run.json').read_text())
    for name in ('two', 'one')
  )
  assert (facts.pop('processes'), expected.pop('processes')) == (2, 1)
  assert facts.pop('run') != expected.pop('run')
  assert facts == expected


@pytest.fixture(scope='module')
def alone(text, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  run_alone(text, workdir)
  return workdir


@pytest.mark.long
@pytest.mark.parametrize('before', [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(
  text, tmp_path, alone, before
):
  """Stopped after step 3, so that the record of that step is made again."""
  workdir = tmp_path / 'run'
  train(text, workdir, before, **{'mesh.expert': 8})
  for path in (workdir / 'checkpoints').glob('4*'):
    path.rename(tmp_path / 'away')
  lines = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
  (workdir / 'metrics.jsonl').write_text(''.join(lines[:3]))
  train(text, workdir, 3 - before)
  assert_same_training(workdir, alone)


def test_processes_with_different_configs_stop(text, tmp_path):
  results = launch(
    text, tmp_path / 'run', [], ['--config.learning_rate=0.5'], steps=1
  )
  for code, output in results:
    assert code == 2
    assert (
      'processes disagree on config.learning_rate: 0.01 in process 0 and '
      '0.5 in process 1'
    ) in output
  assert not (tmp_path / 'run').exists()


@pytest.mark.long
def test_one_that_cannot_read_its_text_stops_all(text, tmp_path):
  (_, said), (code, own) = results = launch(
    text, tmp_path / 'run', [], ['--config.data.files=nowhere/*.txt']
  )
  assert [code for code, _ in results] == [2, 2]
  reason = own.splitlines()[-1].removeprefix('error: ')
  assert reason.startswith('data.files=nowhere/*.txt')
  assert 'process 1: ' in said and reason in said


@pytest.mark.long
def test_a_preempted_run_is_saved_by_all_and_goes_on(text, tmp_path):
  """SIGTERM to the second process: after a step, then before the next one."""
  workdir = tmp_path / 'run'

  def preempt(running):
    metrics = workdir / records.NAME
    while not (metrics.exists() and records.read(metrics)):
      assert all(process.poll() is None for process in running)
      time.sleep(0.1)
    running[1].terminate()

  options = QUICK | {'steps': 100_000, 'checkpoint_every': 100_000}
  for code, output in launch(text, workdir, [], [], during=preempt, **options):
    assert code == 75, output
  *_, saved = Reader(workdir).checkpoints
  steps = Reader(workdir).records
  assert 0 < saved == len(steps) == steps[-1]['step']

  def preempt_while_it_is_restored(running):
    before = (workdir / 'lock').stat().st_mtime_ns
    while (workdir / 'lock').stat().st_mtime_ns == before:
      assert all(process.poll() is None for process in running)
      time.sleep(0.01)
    running[1].terminate()

  for code, output in launch(
    text, workdir, [], [], during=preempt_while_it_is_restored, **options
  ):
    assert code == 75, output
  *_, again = Reader(workdir).checkpoints
  assert saved <= again <= saved + 2


@pytest.mark.long
def test_directories_of_their_own_are_refused(text, tmp_path):
  """A second --workdir stands for a disk that is not shared."""
  results = launch(text, tmp_path / 'a', [], [f'--workdir={tmp_path / "b"}'])
  for code, output in results:
    assert code == 2
    assert 'process 1 does not see the config.json' in output
