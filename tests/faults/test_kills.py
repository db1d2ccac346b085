"""A run that is killed, and killed again, ends as if nothing had happened."""

from concurrent import futures
import functools

import pytest

from moe_jax import analysis
from tests.faults import harness, kills

CASES = 5


@pytest.fixture(scope='module')
def expected(tmp_path_factory, text, cache):
  """Returns the digest of an undisturbed run of a case."""

  @functools.cache
  def digest(method):
    place = tmp_path_factory.mktemp('alone')
    return kills.of_method(method, place, text, cache).complete()

  return lambda number: digest(number % len(kills.METHODS))


@pytest.mark.long
@pytest.mark.parametrize('number', range(CASES))
def test_kills(number, expected, tmp_path, text, cache):
  """40 kills in total; `python -m tests.faults.kills` makes 200."""
  report = kills.case(
    *(number, 0, kills.KILLS_OF_A_CASE, expected(number)),
    *(tmp_path, text, cache),
  )
  print(report.table())
  assert not report.wrong
  assert not report.leftovers
  # What was not saved, and no more: a kill in a save loses an interval.
  assert max(report.lost) <= harness.OPTIONS['checkpoint_every'] + 1


@pytest.mark.long
def test_three_kills(trial):
  """In a save, in an evaluation, in a restore."""
  options = {'model.layers': 1, 'eval_every': 2, 'checkpoint_every': 2}
  options |= {'steps': 6, 'model.shared_experts': 0}
  killed = trial('killed', 'loss_free', **options)
  alone = trial('alone', 'loss_free', **options)
  for phase, number in [('save', 2), ('evaluation', 1), ('restore', 1)]:
    assert killed.stop_in(phase, number).phase() == phase
    # As it lies there, it can be looked at.
    run = analysis.Run(killed.workdir)
    assert run.restore().step == max(run.checkpoints) >= 2
    assert run.restore().q.any()
    assert len(run.metrics) >= 2
  # Both find most of what was compiled.
  with futures.ThreadPoolExecutor(2) as pool:
    digests = pool.map(harness.Trial.complete, [killed, alone])
  assert len(set(digests)) == 1
  assert not harness.leftovers(killed.workdir)
