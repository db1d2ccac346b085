"""A run resumes from text that was moved, and from no other text."""

import json
import shutil

import pytest

from moe_jax import config as config_lib
from moe_jax.data import prepare
from moe_jax.train import plan as plan_lib
from tests.train import tiny


def plan(run, name, value, allowed=()):
  """Plans a run on the text that an option names."""
  options = tiny.get_config('bip')
  text = {name: value, 'data.cache_dir': str(run.parent / 'cache')}
  if name == 'data.corpus':
    text |= {'data.dataset': 'sotu', 'data.vocabulary': 6400}
  options.update_from_flattened_dict(text)
  return plan_lib.plan(config_lib.freeze(options), run, allowed)


def begin(run, name, value):
  """Leaves what a run on a text says of itself."""
  planned = plan(run, name, value)
  run.mkdir()
  facts = {'text_fingerprint': planned.text.fingerprint}
  (run / 'run.json').write_text(json.dumps(facts))
  (run / 'config.json').write_text(json.dumps(planned.options))


@pytest.fixture(scope='module')
def corpora(tmp_path_factory):
  """A folder of the corpora a and b, which share a tokenizer."""
  folder = tmp_path_factory.mktemp('corpora')
  source = f'{tiny.write_text(tmp_path_factory.mktemp("texts"))}/*.txt'
  a, b = str(folder / 'a'), str(folder / 'b')
  prepare.prepare(source, 'bpe:290', a, validation=0.2)
  prepare.prepare(source, f'{a}/tokenizer.json', b, validation=0.3)
  return folder


def test_a_run_resumes_from_moved_files(tmp_path):
  before, now, run = (tmp_path / name for name in ('before', 'now', 'run'))
  before.mkdir()
  tiny.write_text(before)
  begin(run, 'data.files', f'{before}/*.txt')
  before.rename(now)
  plan(run, 'data.files', f'{now}/*.txt', ['data.files'])
  with pytest.raises(ValueError, match='continue .*_change=data.files$'):
    plan(run, 'data.files', f'{now}/*.txt')
  with pytest.raises(ValueError, match='other training text'):
    plan(run, 'data.files', f'{now}/0*.txt', ['data.files'])


def test_a_run_resumes_from_a_moved_corpus(corpora, tmp_path):
  run, moved = tmp_path / 'run', tmp_path / 'moved'
  begin(run, 'data.corpus', f'{corpora}/a')
  shutil.copytree(corpora / 'a', moved)
  plan(run, 'data.corpus', str(moved), ['data.corpus'])
  with pytest.raises(ValueError, match='continue .*_change=data.corpus$'):
    plan(run, 'data.corpus', str(moved))
  with pytest.raises(ValueError, match='other training text'):
    plan(run, 'data.corpus', f'{corpora}/b', ['data.corpus'])


def test_a_mixture_that_moves_keeps_weights_and_names(corpora, tmp_path):
  run, moved = tmp_path / 'run', tmp_path / 'moved'
  begin(run, 'data.corpus', f'{corpora}/a:3,{corpora}/b:1')
  shutil.copytree(corpora, moved)
  plan(run, 'data.corpus', f'{moved}/a:3,{moved}/b:1', ['data.corpus'])
  for other in ('b:2', 'c:1'):
    with pytest.raises(ValueError, match=f'another mixture: .*{other}'):
      plan(run, 'data.corpus', f'{moved}/a:3,{moved}/{other}', ['data.corpus'])
  shutil.copytree(corpora / 'a', tmp_path / 'b')
  with pytest.raises(ValueError, match='other training text'):
    plan(run, 'data.corpus', f'{moved}/a:3,{tmp_path}/b:1', ['data.corpus'])
