"""Checkpoints of a real, tiny run, opened as on another machine."""

import json
import shutil
from unittest import mock

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax import nn
from moe_jax.analysis import Run, domain_figure, saturation_figure
from moe_jax.parallel import mesh as meshes
from moe_jax.runs import checkpoints
from tests.train import tiny

TEXT = 'the load of the expert of a token of the router ' * 9


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A run on eight devices."""
  text = tiny.write_text(tmp_path_factory.mktemp('text'))
  config = tiny.tiny_config(text)
  return tiny.run(config, tmp_path_factory.mktemp('trained'))


@pytest.fixture
def workdir(trained, tmp_path):
  """Its work directory, copied."""
  return shutil.copytree(trained.workdir, tmp_path / 'copied')


@pytest.fixture(scope='module')
def opened(trained):
  return Run(trained.workdir)


def test_the_state_is_the_one_that_was_saved(trained, opened):
  assert opened.checkpoints == [3, 6]
  newest, abstract = opened.restore(), trained.training.abstract
  saved = checkpoints.restore_newest(
    trained.workdir / 'checkpoints',
    opened.facts['run'],
    lambda _: {'params': abstract.params, 'router': abstract.router},
  )
  assert newest.step == 6
  assert newest.config == trained.config
  q_LxE = nn.prices(saved.items['router'])
  np.testing.assert_array_equal(newest.q, q_LxE)
  assert newest.q.any()
  jax.tree.map(
    np.testing.assert_array_equal, newest.params, saved.items['params']
  )
  assert not np.array_equal(opened.restore(3).q, newest.q)
  for layer in range(2):  # Records are of the same prices.
    for step in (3, 6):
      recorded_E = np.float32(opened.prices(layer).loc[step])
      np.testing.assert_array_equal(recorded_E, opened.restore(step).q[layer])


@pytest.mark.parametrize(
  'shape',
  [None, pytest.param((2, 4), marks=pytest.mark.long)],
  ids=['one', '2x4'],
)
def test_a_text_is_routed_as_in_training(trained, opened, shape):
  """By sequences of 16 tokens, with q as it was saved."""
  mesh = shape and meshes.make_mesh(*shape)
  routed = opened.restore(mesh=mesh).route(TEXT)
  assert ''.join(routed.tokens) == TEXT
  tokens = len(routed.ids)
  assert 16 < tokens % 128  # Not a whole batch, nor a whole sequence.
  assert tokens % 16
  ids = np.pad(routed.ids, (0, -tokens % 16)).reshape(-1, 16)
  model = opened.restore().model
  for row in (0, 1, len(ids) - 1):
    _, outputs = model(ids[[row]], train=False)
    part = slice(row * 16, min(tokens, (row + 1) * 16))
    of_row = slice(0, part.stop - part.start)
    for ours, theirs in (
      (routed.experts, outputs.choice.experts),
      (routed.gates, outputs.choice.gates),
      (routed.scores, outputs.scores),
    ):
      np.testing.assert_allclose(
        ours[:, part], np.asarray(theirs)[:, of_row], atol=1e-6
      )
  assert routed.load.sum(axis=1).tolist() == [2 * tokens] * 2


def test_routes_settle_towards_the_last_checkpoint(opened, tmp_path):
  table = opened.saturation(TEXT)
  assert table.index.tolist() == [3] and list(table) == [0, 1]
  early, late = (opened.route(TEXT, step) for step in (3, 6))
  for layer in (0, 1):
    shared = [
      len({*a} & {*b}) / 2
      for a, b in zip(early.experts[layer], late.experts[layer], strict=True)
    ]
    assert table.loc[3, layer] == pytest.approx(np.mean(shared))
  assert 0.25 < table.loc[3].mean() < 1
  (axes,) = saturation_figure(opened, TEXT).axes
  first, second, chance = axes.get_lines()
  assert first.get_ydata().tolist() == [table.loc[3, 0]]
  assert list(chance.get_ydata()) == [0.25] * 2  # 2 of 8 experts
  domains = {'one': early, 'two': late}
  axes, bar = domain_figure(domains, layer=1).axes
  assert axes.images[0].get_array().shape == (2, 8)
  assert axes.images[0].get_clim() == (0.0, 0.5)
  assert bar.get_ylabel() == 'share of tokens'


@pytest.mark.long
def test_text_goes_on_from_a_prompt(opened):
  text = opened.generate('the load of', tokens=6)
  assert len(text) > 5
  assert opened.generate('the load of', tokens=6) == text
  options = {'tokens': 6, 'temperature': 2.0}
  drawn = [opened.generate('the load of', seed=i, **options) for i in (0, 0, 1)]
  assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.long
def test_without_a_prompt_a_document_begins(opened):
  checkpoint, tokenizer = opened.restore(), opened.tokenizer
  start_BxS = np.full((1, 1), tokenizer.end_of_document, np.int32)
  new_BxN = nn.generate(checkpoint.model, start_BxS, tokens=6)
  text = tokenizer.decode(np.asarray(new_BxN)[0])
  assert checkpoint.generate('', tokens=6) == text


@pytest.mark.long
def test_text_is_the_same_on_a_mesh(opened):
  on_a_mesh = opened.restore(mesh=meshes.make_mesh(2, 4))
  text = opened.generate('the load of', tokens=6)
  assert on_a_mesh.generate('the load of', tokens=6) == text


def test_a_copy_is_enough(workdir):
  """Nothing is read from the user's cache, or from beside the text."""
  config = json.loads((workdir / 'config.json').read_text())
  config['data'] |= {'files': '/gone/*', 'cache_dir': '/gone'}
  (workdir / 'config.json').write_text(json.dumps(config))
  run = Run(workdir)
  assert run.route('a token').ids.size
  assert len(run.metrics) == 6


def test_prices_are_read_without_parameters(workdir):
  shutil.rmtree(workdir / 'checkpoints/6/params')
  checkpoint = Run(workdir).restore()
  assert checkpoint.q.shape == (2, 8)
  with pytest.raises(FileNotFoundError, match=r'checkpoints/6: .*params'):
    checkpoint.route('a token')


def test_which_checkpoint_is_missing(opened):
  with pytest.raises(FileNotFoundError, match=r'of step 5; there are \[3, 6\]'):
    opened.restore(5)


@pytest.mark.parametrize(
  ('name', 'why'),
  [
    ('tokenizer.json', 'not a run, or not yet begun'),
    ('run.json', 'not a run, or not yet begun'),
    ('config.json', 'not a run, or not yet begun'),
  ],
)
def test_which_file_is_missing(workdir, name, why):
  (workdir / name).unlink()
  with pytest.raises(FileNotFoundError, match=f'{name} is missing: {why}'):
    Run(workdir).route('a token')


@pytest.mark.parametrize('error', [PermissionError('denied'), MemoryError()])
def test_what_may_pass_is_not_taken_for_damage(workdir, error):
  with mock.patch.object(checkpoints, 'read_item', side_effect=error):
    with pytest.raises(OSError, match='checkpoints/6: cannot be read now'):
      _ = Run(workdir).restore().q


@pytest.mark.parametrize('name', ['params', 'router'])
def test_damage_is_told(workdir, name):
  files = (workdir / 'checkpoints/6' / name).rglob('d/*')
  # Of small items there is a file of each process, of the same size and no
  # longer read, deeper down.
  largest = max(files, key=lambda x: (x.stat().st_size, -len(x.parts)))
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  with pytest.raises(ValueError, match='checkpoints/6: cannot be read'):
    Run(workdir).route('a token')


def test_another_version_is_told(workdir):
  """One that had an option which is gone."""
  items = workdir / 'checkpoints/6'
  meta, data = (
    json.loads((items / item / 'metadata').read_text())
    for item in ('meta', 'data')
  )
  del meta['sha256']
  meta['config']['gone'] = 1
  sealed = meta | {'sha256': checkpoints.sha256_of(meta, data)}
  (items / 'meta' / 'metadata').write_text(json.dumps(sealed))
  facts = json.loads((workdir / 'run.json').read_text())
  facts['versions']['moe_jax'] = '0.0.7'
  (workdir / 'run.json').write_text(json.dumps(facts))
  now = moe_jax.__version__
  with pytest.raises(
    ValueError, match=f'gone: unknown.*began with moe_jax 0.0.7, this is {now}'
  ):
    Run(workdir).restore()
  assert Run(workdir).restore(3).q.shape == (2, 8)


def test_an_empty_text_is_refused(opened):
  with pytest.raises(ValueError, match="text='': must have"):
    opened.route('')


@pytest.mark.long
@pytest.mark.parametrize(
  ('method', 'options'),
  [
    ('bip', {'model.round_to_capacity': True}),
    ('bip', {'balancer.scope': 'shard'}),
    ('midpoint_lag', {'capacity_factor': 1.0, 'mesh.expert': 4}),
    ('quantile_histogram', {'accumulation': 2, 'batch_size': 16}),
  ],
  ids=['rounded', 'by shard', 'lag', 'histogram'],
)
def test_runs_of_other_kinds_open_on_one_device(method, options, tmp_path):
  text = tiny.write_text(tmp_path)
  config = tiny.tiny_config(text, method, **options, steps=3)
  tiny.run(config, tmp_path / 'run')
  run = Run(tmp_path / 'run')
  routed = run.route(TEXT)
  assert routed.load.sum() == 2 * 2 * len(routed.ids)
  assert run.generate('the load', tokens=3)
