"""One run at a time: on a disk, and in a bucket kept in memory."""

import json
import threading
import time

import pytest

from moe_jax.options import Refused
from moe_jax.runs import files, lock


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  monkeypatch.setattr(lock, '_SECONDS_BETWEEN_BEATS', 0.2)
  monkeypatch.setattr(lock, '_SECONDS_UNTIL_DEAD', 1.0)


@pytest.fixture(params=['disk', 'bucket'])
def workdir(request, tmp_path):
  if request.param == 'disk':
    return files.open_workdir(tmp_path)
  return request.getfixturevalue('bucket')


def test_a_second_run_is_refused_and_told_of_the_first(workdir):
  with lock.hold(workdir) as check:
    with pytest.raises(Refused, match='in use by another run .*host'):
      with lock.hold(workdir):
        pass
    check()
  with lock.hold(workdir) as check:  # It is free again.
    check()


def test_a_lock_that_nobody_writes_to_is_taken_over(bucket, capsys):
  """As it is after a SIGKILL."""
  (bucket / 'lock').write_text(json.dumps({'token': 'gone', 'beat': 7}))
  with lock.hold(bucket) as check:
    check()
    assert 'gone' not in (bucket / 'lock').read_text()
  assert 'waits' in capsys.readouterr().err
  assert not (bucket / 'lock').exists()


def test_who_was_taken_for_dead_stops(bucket):
  with lock.hold(bucket) as check:
    with pytest.raises(RuntimeError, match='another run took'):
      for _ in range(100):  # Between a beat's reading and writing it is lost.
        (bucket / 'lock').write_text(json.dumps({'token': 'another'}))
        time.sleep(0.1)
        check()
  assert 'another' in (bucket / 'lock').read_text()  # Not ours to remove.


def test_one_of_two_newcomers_has_it(bucket):
  (bucket / 'lock').write_text(json.dumps({'token': 'gone', 'beat': 7}))
  holding, refused, done = [], [], threading.Event()

  def come():
    try:
      with lock.hold(bucket):
        holding.append(1)
        done.wait()
    except Refused:
      refused.append(1)

  newcomers = [threading.Thread(target=come) for _ in range(2)]
  for newcomer in newcomers:
    newcomer.start()
  for _ in range(200):
    if len(holding) + len(refused) < 2:
      time.sleep(0.1)
  done.set()
  for newcomer in newcomers:
    newcomer.join()
  assert (len(holding), len(refused)) == (1, 1)
