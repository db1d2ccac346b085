"""SIGTERM and SIGINT: save and end; the second one: end."""

import signal as signals
import time

import pytest

from tests.faults import harness

SIGNALS = [signals.SIGTERM, signals.SIGINT]


@pytest.fixture(scope='module')
def expected(tmp_path_factory, text, cache):
  place = tmp_path_factory.mktemp('alone')
  return harness.Trial(place, text, cache).complete()


@pytest.mark.long
@pytest.mark.parametrize(
  ('phase', 'number'),
  [('step', 3), ('evaluation', 2), ('compilation', 1), ('save', 2)],
)
@pytest.mark.parametrize('signal', SIGNALS)
def test_saves_and_goes_on(trial, expected, signal, phase, number):
  stopped = trial()
  with stopped.started() as program:
    assert program.reach(phase, number), program.tail()
    program.process.send_signal(signal)
    began = time.monotonic()
    program.finish()
  assert program.code == 75, program.tail()
  assert 'Traceback' not in program.said()
  saved = [at for at, *mark in program.marks if mark == ['end', 'save']]
  print(
    f'{signal.name} in {phase}: saved after {saved[-1] - began:.2f} s, '
    f'ended {time.monotonic() - saved[-1]:.2f} s later'
  )
  assert harness.lost_steps(stopped.workdir) == 0
  assert stopped.complete() == expected
  assert not harness.leftovers(stopped.workdir)


@pytest.mark.long
@pytest.mark.parametrize(
  ('signal', 'phase'),
  [
    # No SIGINT: a KeyboardInterrupt while modules are imported can be swallowed
    # by a callback of jax's, or crash what is written in C.
    (SIGNALS[0], 'start'),
    *((s, p) for s in SIGNALS for p in ('data preparation', 'restore')),
  ],
)
def test_before_there_is_anything_to_save(trial, expected, signal, phase):
  """However it ends, nothing is harmed; but it does end."""
  stopped = trial()
  if phase == 'restore':
    stopped.stop_in('save', 2)
  with stopped.started() as program:
    if phase == 'start':
      time.sleep(0.5)
    else:
      assert program.reach(phase), program.tail()
    program.process.send_signal(signal)
    program.finish()
  print(f'{signal.name} in {phase}: exit code {program.code}')
  assert program.code in (75, -signal, 128 + signal)
  assert stopped.complete() == expected


def second_signal(trial, signal) -> harness.Trial:
  """In a compilation that takes a minute, and in which no Python runs."""
  stopped = trial()
  with stopped.started('long_compilation') as program:
    assert program.reach('compilation'), program.tail()
    time.sleep(0.5)
    program.process.send_signal(signal)
    time.sleep(0.5)
    assert program.process.poll() is None, 'the first signal ended it'
    program.process.send_signal(signal)
    began = time.monotonic()
    program.finish()
  seconds = time.monotonic() - began
  print(f'second {signal.name} in compilation: ended after {seconds:.2f} s')
  assert program.code == 128 + signal, program.tail()
  assert seconds < 10  # Far less, but this machine may be busy.
  return stopped


def test_a_second_signal_ends_it_at_once(trial):
  second_signal(trial, SIGNALS[0])


@pytest.mark.long
@pytest.mark.parametrize('signal', SIGNALS)
def test_after_a_second_signal_it_goes_on(trial, expected, signal):
  assert second_signal(trial, signal).complete() == expected


@pytest.mark.long
@pytest.mark.parametrize('signal', SIGNALS)
def test_a_second_signal_in_a_save(trial, expected, signal):
  stopped = trial()
  with stopped.started() as program:
    assert program.reach('step', 4), program.tail()  # Saved: step 3.
    program.process.send_signal(signal)
    assert program.reach('save', 2), program.tail()
    program.process.send_signal(signal)
    program.finish()
  assert program.code == 128 + signal, program.tail()
  assert stopped.complete() == expected
  assert not harness.leftovers(stopped.workdir)
