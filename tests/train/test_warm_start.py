"""New runs that begin with the parameters of another one."""

import json
import shutil

import jax
import numpy as np
import pytest

from moe_jax import nn
from moe_jax.options import Refused
from moe_jax.runs import checkpoints
from moe_jax.runs.reader import Reader
from moe_jax.train import loop
from moe_jax.train import plan as plan_lib
from tests.train import tiny


@pytest.fixture(scope='module')
def first(text, tmp_path_factory):
  """A run with checkpoints of steps 1 and 2."""
  workdir = tmp_path_factory.mktemp('first') / 'run'
  config = tiny.tiny_config(
    text, steps=2, checkpoint_every=1, **{'data.evaluation_sets': ''}
  )
  tiny.run(config, workdir)
  return workdir


def plan(text, workdir, start, method='bip', **options):
  config = tiny.tiny_config(text, method, init_from=str(start), **options)
  return plan_lib.plan(config, workdir)


def saved(workdir, step, item):
  return checkpoints.read_item(workdir / 'checkpoints' / str(step), item)


def by_name(tree):
  return {
    jax.tree_util.keystr(path, simple=True): jax.device_get(leaf)
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def assert_same(actual, expected):
  actual, expected = by_name(actual), by_name(expected)
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value)


@pytest.mark.long
def test_parameters_and_router_are_taken_onto_another_mesh(
  first, text, tmp_path
):
  options = {'mesh.expert': 2, 'batch_size': 16, 'sequence_length': 8}
  new = plan(text, tmp_path / 'new', first, seed=1, accumulation=2, **options)
  state = loop._first_state(new)
  assert_same(state.params, saved(first, 2, 'params'))
  assert_same(state.router, saved(first, 2, 'router'))
  assert np.any(nn.prices(state.router))
  shardings = jax.tree.map(lambda x: x.sharding, new.training.abstract)
  assert jax.tree.map(lambda x: x.sharding, state) == shardings
  assert state.step == 0
  assert not any(map(np.any, jax.tree.leaves(state.optimizer)))
  assert new.start.facts == {
    'workdir': str(first),
    'step': 2,
    'run': Reader(first).facts['run'],
  }


@pytest.mark.long
def test_prices_go_to_another_rule_or_are_left(first, text, tmp_path):
  rules = {'method': 'midpoint_lag', 'seed': 1}
  new = plan(text, tmp_path / 'new', f'{first}@1', **rules)
  state = loop._first_state(new)
  assert_same(state.params, saved(first, 1, 'params'))
  router = nn.moe_layers(state.router)['state']
  q = nn.prices(saved(first, 1, 'router'))
  np.testing.assert_array_equal(router.q, q)
  np.testing.assert_array_equal(router.pending, q)
  new = plan(text, tmp_path / 'new', first, init_router=False, **rules)
  state = loop._first_state(new)
  assert_same(state.params, saved(first, 2, 'params'))
  assert not np.any(nn.prices(state.router))


@pytest.mark.long
def test_a_run_needs_the_other_only_to_begin(first, text, tmp_path):
  start, workdir = tmp_path / 'start', tmp_path / 'run'
  shutil.copytree(first, start)
  options = {'checkpoint_every': 1, 'data.evaluation_sets': ''}
  options['init_from'] = str(start)
  tiny.run(tiny.tiny_config(text, steps=1, seed=1, **options), workdir)
  shutil.rmtree(start)
  longer = tiny.tiny_config(text, steps=2, seed=1, **options)
  tiny.run(longer, workdir, ['steps'])
  run = Reader(workdir)
  assert [record['step'] for record in run.records] == [1, 2]
  assert run.facts['init_from']['step'] == 2
  other = Reader(first).facts['initial_parameters_digest']
  assert run.facts['initial_parameters_digest'] != other
  assert run.config['init_from'] == str(start)
  with pytest.raises(ValueError, match='init_from='):
    plan_lib.plan(tiny.tiny_config(text, steps=2, seed=1), workdir)


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    (
      {'model.width': 32},
      r'its parameters are of another model, the first is .*: \[.*\] there, '
      r'\[.*\] here; different are model.width=32 \(there 16\)',
    ),
    ({'model.layers': 3}, r'model.layers=3 \(there 2\)'),
    ({'model.dense_layers': 1}, r'model.dense_layers=1 \(there 0\)'),
    ({'data.vocabulary': 310}, r'data.vocabulary=310 \(there 300\)'),
    ({'data.maximum_documents': 3}, 'its tokenizer is another one; prepare'),
  ],
  ids=str,
)
def test_another_model_is_refused(first, text, tmp_path, options, words):
  with pytest.raises(ValueError, match=f'^init_from={first}: .*{words}'):
    plan(text, tmp_path / 'new', first, **options)


def test_what_is_not_there_is_refused(first, text, tmp_path):
  new = tmp_path / 'new'
  for place, words in (
    (tmp_path / 'nowhere', 'has no checkpoint; choose'),
    (new, 'is --workdir itself'),
    (f'{first}@3', 'has no checkpoint of step 3, but of 1, 2'),
    (f'{first}@' + '9' * 5000, 'has no checkpoint of step'),
    ('s3://bucket', 'must be a local directory or gs://'),
    ('x' * 300, 'has no checkpoint'),
  ):
    with pytest.raises(ValueError, match=words) as error:
      plan(text, new, place)
    assert str(error.value).startswith(f'init_from={place}'[:60])
  assert not new.exists()


def test_damage_is_refused(first, text, tmp_path):
  start = tmp_path / 'start'
  shutil.copytree(first, start)
  new = plan(text, tmp_path / 'new', start)
  path = start / 'checkpoints/2/meta/metadata'
  meta = json.loads(path.read_text())
  path.write_text(json.dumps(meta | {'checksums': {}}))
  with pytest.raises(ValueError, match='step 2: the items meta and data are'):
    plan(text, tmp_path / 'new', start)
  wanted = {'router': new.training.abstract.router}
  with pytest.raises(Refused, match=f'init_from={start}: .*the items meta'):
    new.start.read(wanted)
  path.unlink()
  with pytest.raises(ValueError, match='step 2: .*metadata'):
    plan(text, tmp_path / 'new', start)


def test_another_function_of_the_same_parameters_is_said(
  first, text, tmp_path, capsys
):
  plan(text, tmp_path / 'new', first, **{'model.rope_theta': 1e4})
  said = 'model.rope_theta=10000.0 (there 1000000.0)'
  assert f'note: init_from={first}: {said}' in capsys.readouterr().err


@pytest.mark.long
def test_an_average_begins_at_the_parameters(first, text, tmp_path):
  new = plan(text, tmp_path / 'new', first, **{'optimizer.average': 0.9})
  state = loop._first_state(new)
  assert_same(state.params, saved(first, 2, 'params'))
  assert_same(state.average, state.params)
  for leaf in jax.tree.leaves(state.params):  # As a step does.
    leaf.delete()
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.average))
