"""Routes that a run records, and other runs take instead of choosing."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.parallel import mesh as meshes
from moe_jax.runs import checkpoints, routes
from moe_jax.runs.reader import Reader
from moe_jax.train import plan as plan_lib
from moe_jax.train import step as step_lib
from moe_jax.train.batches import Batch
from tests.train import test_processes, tiny

STEPS = 2
BASE = {
  'steps': STEPS,
  'checkpoint_every': STEPS,
  'data.evaluation_sets': '',
  'record_routes': True,
}


def run(text, workdir, method='bip', mesh=(1, 1), allowed=(), **overrides):
  """Trains on so many of this process's devices; returns `workdir`."""
  devices = jax.devices()[: mesh[0] * mesh[1]]
  made = meshes.make_mesh(*mesh, devices=devices)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan_lib.state, 'make_mesh', lambda config: made)
    config = tiny.tiny_config(text, method, **BASE | overrides)
    tiny.run(config, workdir, allowed=list(allowed))
  return workdir


def replay(text, tmp_path, source, method='bip', **options):
  """Trains on the routes of another run; returns the records of both."""
  options = {'replay_routes': str(source)} | options
  workdir = run(text, tmp_path / 'replay', method, **options)
  assert_same_routes(workdir, source)
  return records(workdir), records(source)


def assert_same_routes(workdir, source):
  for step in range(1, STEPS + 1):
    actual, expected = (
      routes.Reader(path).read(step) for path in (workdir, source)
    )
    np.testing.assert_array_equal(actual, expected)


def records(workdir):
  return [
    {name: x for name, x in record.items() if not name.startswith('time/')}
    for record in Reader(workdir).records
  ]


def assert_same_loads_and_losses(actual, expected):
  for record, same in zip(actual, expected, strict=True):
    for name, value in same.items():
      if name.startswith('router/load/'):
        assert record[name] == value
    assert record['train/loss'] == pytest.approx(same['train/loss'], rel=1e-4)


@pytest.fixture(scope='module')
def recorded(text, tmp_path_factory):
  """A run of `bip` with two microbatches a step, on one device."""
  return run(text, tmp_path_factory.mktemp('recorded') / 'run', accumulation=2)


def test_what_is_recorded(recorded):
  names = sorted(path.name for path in (recorded / 'routes').iterdir())
  assert names == [
    'step_00000001_rows_0_8.npy',
    'step_00000002_rows_0_8.npy',
  ]
  for step, record in enumerate(records(recorded), start=1):
    experts_BxLxSxK = routes.Reader(recorded).read(step)
    assert experts_BxLxSxK.dtype == np.int16
    assert experts_BxLxSxK.shape == (8, 2, 16, 2)
    for layer in range(2):
      load_E = np.bincount(experts_BxLxSxK[:, layer].ravel(), minlength=8)
      assert load_E.tolist() == record[f'router/load/layer_{layer:02d}']


def test_rows_of_microbatches_come_back_in_the_order_of_the_batch():
  tokens = jnp.arange(24).reshape(12, 2)

  def function(carry, batch):
    return jnp.sum(batch.inputs), carry, {'rows': batch.inputs + 1}

  for count in (1, 3):
    total, _, rows = step_lib.add_up(function, 0, Batch(tokens, tokens), count)
    assert total == jnp.sum(tokens)
    np.testing.assert_array_equal(rows['rows'], tokens + 1)


@pytest.mark.long
def test_another_rule_takes_the_recorded_routes(text, tmp_path, recorded):
  """Its loads are those of the run that recorded, its prices its own."""
  actual, expected = replay(
    text, tmp_path, recorded, 'loss_free', accumulation=2
  )
  assert_same_loads_and_losses(actual, expected)
  for record, other in zip(actual, expected, strict=True):
    q, other_q = record['router/q/layer_00'], other['router/q/layer_00']
    assert 0 < np.abs(q).max() <= 1e-3 * STEPS * (1 + 1e-6)
    assert not np.allclose(q, other_q)


@pytest.mark.long
def test_the_same_run_replayed_has_the_same_bits(text, tmp_path):
  """Parameters, prices, metrics; evaluation, which never replays, as well."""
  options = {'accumulation': 2, 'data.evaluation_sets': 'validation'}
  source = run(text, tmp_path / 'source', **options)
  actual, expected = replay(text, tmp_path, source, **options)
  assert actual == expected
  assert 'eval/validation/perplexity_solved' in actual[-1]
  metas = (
    checkpoints.read_meta(path / f'checkpoints/{STEPS}')['checksums']
    for path in (source, tmp_path / 'replay')
  )
  assert next(metas) == next(metas)


@pytest.mark.long
@pytest.mark.parametrize(
  'options',
  [
    {'accumulation': 1, 'model.remat': True},
    {'accumulation': 4},
    {'accumulation': 1, 'mesh': (2, 4)},
    {'accumulation': 1, 'mesh': (2, 4), 'model.remat': True},
    {'accumulation': 1, 'mesh': (8, 1)},
    {'accumulation': 2, 'mesh': (2, 2)},  # By `_summed_once`.
  ],
  ids=str,
)
def test_routes_hold_wherever_they_are_replayed(
  text, tmp_path, recorded, options
):
  assert_same_loads_and_losses(*replay(text, tmp_path, recorded, **options))


@pytest.mark.long
def test_each_row_gets_its_own_routes(text, tmp_path):
  """Without prices, the first step's routes follow from the tokens alone."""
  first = run(text, tmp_path / '1', 'unbalanced')
  for i, options in enumerate(
    [{'accumulation': 2}, {'mesh': (2, 4)}, {'accumulation': 2, 'mesh': (4, 1)}]
  ):
    other = run(text, tmp_path / f'other_{i}', 'unbalanced', **options)
    actual, expected = (
      np.sort(routes.Reader(path).read(1)) for path in (other, first)
    )
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.long
@pytest.mark.parametrize('mesh', [(1, 1), (2, 4)])
def test_slots_that_are_not_used_stay_so(text, tmp_path, mesh):
  above = {'model.selection': 'choose_above'}
  source = run(text, tmp_path / 'source', 'threshold', **above)
  experts = routes.Reader(source).read(STEPS)
  assert experts.shape[-1] == 4
  assert 0 < np.mean(experts < 0) < 1
  # Under a selection that takes two experts of each token.
  assert_same_loads_and_losses(*replay(text, tmp_path, source, mesh=mesh))


@pytest.mark.long
def test_rounded_routes_are_replayed_without_a_drop(text, tmp_path):
  rounding = {'model.round_to_capacity': True}
  source = run(text, tmp_path / 'source', **rounding)
  for options in (rounding, {}):
    actual, expected = replay(text, tmp_path, source, **options)
    assert_same_loads_and_losses(actual, expected)
    assert actual[-1]['router/dropped'] == 0
    shutil.rmtree(tmp_path / 'replay')


@pytest.mark.long
def test_a_run_that_resumes_records_later_steps_again(text, tmp_path, recorded):
  workdir = tmp_path / 'run'
  shutil.copytree(recorded, workdir)
  last = workdir / 'routes/step_00000002_rows_0_8.npy'
  longer = {'accumulation': 2, 'steps': STEPS + 2}
  later = workdir / 'routes/step_00000009_rows_0_4.npy'
  shutil.copy(last, later)
  before = last.stat().st_mtime_ns
  run(text, workdir, allowed=['steps'], **longer)
  assert routes.Reader(workdir).steps == [1, 2, 3, 4]
  assert not later.exists()
  assert last.stat().st_mtime_ns == before


@pytest.mark.long
@pytest.mark.parametrize('processes', [(2, 1), (1, 2)])
def test_any_number_of_processes_replays(text, tmp_path, processes):
  for count, name, more in zip(
    processes, 'ab', ({}, {'replay_routes': tmp_path / 'a'}), strict=True
  ):
    test_processes.train(text, tmp_path / name, count, **BASE | more)
    names = [path.name for path in (tmp_path / name / 'routes').iterdir()]
    assert len(names) == STEPS * count
  assert_same_routes(tmp_path / 'b', tmp_path / 'a')
  assert_same_loads_and_losses(records(tmp_path / 'b'), records(tmp_path / 'a'))


# What is refused, before anything is compiled.


def refused(text, workdir, **overrides):
  """Returns what a run says that is refused; it must be one line."""
  with pytest.raises(ValueError) as refusal:
    plan_lib.plan(tiny.tiny_config(text, **BASE | overrides), workdir)
  assert len(str(refusal.value).splitlines()) == 1
  assert not workdir.exists()
  return str(refusal.value)


@pytest.mark.parametrize(
  ('options', 'reason'),
  [
    (
      {'batch_size': 16},
      'its routes are of batch_size=8, but here it is 16; set '
      '--config.batch_size=8',
    ),
    ({'sequence_length': 32}, 'sequence_length=16, but here it is 32'),
    ({'seed': 1}, 'seed=0, but here it is 1'),
    ({'model.layers': 3}, 'model.layers=2, but here it is 3'),
    ({'model.dense_layers': 1}, 'model.dense_layers=0, but here it is 1'),
    ({'model.experts': 16}, 'model.experts=8, but here it is 16'),
    (
      {'steps': 4},
      'has no routes of step 3, one of 2 that are missing of steps 1 to 4; '
      '--config.steps=2 would do',
    ),
    ({'data.maximum_documents': 20}, 'other training text'),
  ],
  ids=str,
)
def test_routes_of_another_run_are_refused(
  text, tmp_path, recorded, options, reason
):
  options = {'replay_routes': str(recorded)} | options
  said = refused(text, tmp_path / 'run', **options)
  assert said.startswith(f'replay_routes={recorded}: ')
  assert reason in said


def test_routes_that_are_not_there_are_refused(text, tmp_path, recorded):
  new = tmp_path / 'run'
  for place, reason in (
    (tmp_path, 'has no routes; a run records them with --config.record_routes'),
    (tmp_path / 'nowhere', 'has no routes'),
    ('s3://bucket', 'must be a local directory or gs://'),
    ('x' * 300, 'has no routes'),
  ):
    said = refused(text, new, replay_routes=str(place))
    assert said.startswith(f'replay_routes={place}: ') and reason in said
  own = tiny.tiny_config(text, **BASE, replay_routes=str(recorded))
  with pytest.raises(ValueError, match='is --workdir itself'):
    plan_lib.plan(own, recorded, ['replay_routes', 'accumulation'])


def test_routes_of_changed_batches_are_refused(text, tmp_path, recorded):
  source = tmp_path / 'source'
  shutil.copytree(recorded, source, ignore=shutil.ignore_patterns('check*'))
  facts = Reader(source).facts
  facts['config_changes'] = {'1': {'batch_size': {'from': 4, 'to': 8}}}
  (source / 'run.json').write_text(json.dumps(facts))
  said = refused(text, tmp_path / 'run', replay_routes=str(source))
  assert 'its steps have other rows, as batch_size or' in said


@pytest.mark.parametrize(
  ('damage', 'reason'),
  [
    (lambda path: path.unlink(), 'no routes of step 1.*choose a run'),
    (lambda path: path.write_bytes(b''), 'damaged'),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), 'damaged'),
    (
      lambda path: np.save(path, np.full((8, 2, 16, 2), 8, np.int16)),
      r"must be int16\[8, 2, 16, 'K'\] of -1 to 7",
    ),
    (lambda path: np.save(path, np.zeros((8, 2, 16, 2))), 'float64'),
    (
      lambda path: np.save(path, np.array([{}]), allow_pickle=True),
      'Object arrays cannot be loaded',
    ),
    (
      lambda path: path.rename(path.with_name('step_00000001_rows_0_7.npy')),
      'no routes of step 1',
    ),
  ],
)
def test_damaged_routes_are_refused(text, tmp_path, recorded, damage, reason):
  source = tmp_path / 'source'
  shutil.copytree(recorded, source, ignore=shutil.ignore_patterns('check*'))
  damage(source / 'routes/step_00000001_rows_0_8.npy')
  said = refused(text, tmp_path / 'run', replay_routes=str(source))
  assert re.search(reason, said), said
