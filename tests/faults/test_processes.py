"""Two processes, one is killed: the other ends, and both resume."""

import signal
import time

import pytest

from tests.faults import harness
from tests.train import test_processes

OPTIONS = {
  'method': 'loss_free',
  'model.layers': 1,
  'steps': 60,
  'checkpoint_every': 10,
  'eval_every': 0,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch, cache):
  monkeypatch.setenv('XDG_CACHE_HOME', str(cache))
  for name, value in harness.ENVIRONMENT.items():
    monkeypatch.setenv(name, value)


def train(text, workdir, during=None):
  return test_processes.launch(text, workdir, [], [], during=during, **OPTIONS)


@pytest.fixture(scope='module')
def expected(tmp_path_factory, text, cache):
  workdir = tmp_path_factory.mktemp('two') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(cache))
    for code, output in train(text, workdir):
      assert code == 0, output
  return harness.digest(workdir, OPTIONS['steps'])


def lines(workdir):
  metrics = workdir / 'metrics.jsonl'
  return metrics.read_bytes().count(b'\n') if metrics.exists() else 0


@pytest.mark.long
@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.parametrize('phase', ['step', 'save'])
def test_the_other_ends_and_both_go_on(text, tmp_path, expected, victim, phase):
  workdir = tmp_path / 'run'
  random = harness.generator('processes', victim, phase)
  first, saves = random.randint(11, 40), random.randint(2, 4)
  ended = []

  def kill(running):
    def ready():
      if phase == 'step':
        return lines(workdir) >= first
      being_saved = (workdir / 'checkpoints').glob(f'{saves}0.orbax*')
      return lines(workdir) >= 10 * saves or any(being_saved)

    while not ready():
      assert all(process.poll() is None for process in running)
      time.sleep(0.0005)
    if phase == 'save':
      time.sleep(random.uniform(0, 0.2))
    running[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    while running[1 - victim].poll() is None:
      assert time.monotonic() - began < 200, 'the other one still runs'
      time.sleep(0.05)
    ended.append(time.monotonic() - began)

  results = train(text, workdir, kill)
  print(
    f'process {victim} killed in a {phase}: the other ended after '
    f'{ended[0]:.1f} s with {results[1 - victim][0]}; recorded '
    f'{lines(workdir)}, saved {harness.saved_steps(workdir)}, '
    f'left {harness.leftovers(workdir)}'
  )
  assert results[victim][0] == -signal.SIGKILL
  assert results[1 - victim][0] not in (0, 2, 75), results[1 - victim][1]
  for code, output in train(text, workdir):
    assert code == 0, output
  assert harness.digest(workdir, OPTIONS['steps']) == expected
  assert not harness.leftovers(workdir)
