"""What sees the tokens that follow, by method; and that the audit would see it.

Models are random and small; a stored run has a checkpoint.
"""

import json
import pathlib
import shutil

from flax import nnx
import jax
import numpy as np
import pytest

from moe_jax import nn
from moe_jax.analysis import causality as program
from moe_jax.analysis import causality_audit as audit
from moe_jax.config import METHODS
from moe_jax.config.balancers import make_balancer
from tests.train import tiny

STORED = pathlib.Path(__file__).parents[1] / 'runs/stored/bip'
# Prices that are solved on the batch that they are for.
SEES_THE_BATCH = {'sinkhorn'}
SEES_THE_BATCH |= {'bip', 'bip_t2', 'bip_t8', 'bip_t14'}
SEES_THE_BATCH |= {'midpoint', 'midpoint_t1'}
VOCABULARY, BATCH, SEQUENCE = 40, 4, 16
POSITIONS = (3, 11)
ROUNDING = 1e-5  # what another order of sums may do to a logit


def build(method, capacity_factor=0.0, **options):
  config = nn.DecoderConfig(
    width=16,
    hidden=16,
    experts=8,
    experts_per_token=2,
    layers=2,
    heads=2,
    kv_heads=1,
    **options,
  )

  @nnx.jit
  def make():
    model = nn.Decoder(
      config,
      make_balancer(METHODS[method]),
      vocabulary=VOCABULARY,
      capacity_factor=capacity_factor,
      rngs=nnx.Rngs(jax.random.key(0, impl='unsafe_rbg')),
    )
    model.embedding.embedding[...] *= 4  # so that logits differ
    return model

  return make()


@pytest.fixture(scope='module')
def tokens():
  key, shape = jax.random.key(2), (BATCH, SEQUENCE)
  return np.array(jax.random.randint(key, shape, 0, VOCABULARY))


@pytest.mark.parametrize(
  'method',
  [
    pytest.param(m, marks=[] if m == 'bip' else pytest.mark.long)
    for m in METHODS
  ],
)
def test_what_sees_the_future(method, tokens):
  """Frozen, nothing does; solved, the rules that price this very batch."""
  model = build(method)
  before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
  found = audit.causality(model, tokens, POSITIONS, passes=('frozen', 'solved'))
  after = nnx.to_pure_dict(nnx.state(model))
  jax.tree.map(np.testing.assert_array_equal, before, after)
  frozen, solved = found['frozen'], found['solved']
  assert [leak.position for leak in frozen.leaks] == [*POSITIONS]
  assert frozen.flipped == 0
  assert frozen.logits < ROUNDING
  assert np.isfinite([frozen.loss, solved.loss]).all()
  if method in SEES_THE_BATCH:
    assert 0 < solved.flipped < 1
    assert solved.logits > 10 * ROUNDING
    assert solved.loss != frozen.loss
  else:
    assert solved.flipped == 0
    assert solved.logits < ROUNDING


@pytest.mark.long
def test_rounding_sees_the_future(tokens):
  model = build('unbalanced', round_to_capacity=True)
  found = audit.causality(model, tokens, POSITIONS)
  assert found['frozen'].flipped == found['solved'].flipped == 0
  assert found['training'].flipped > 0
  assert found['training'].logits > 10 * ROUNDING


def test_capacity_sees_the_future(tokens):
  """Not in a layer's own routes, but in who is dropped there."""
  model = build('unbalanced', capacity_factor=1.0)
  found = audit.causality(model, tokens, POSITIONS, passes=['training'])
  for leak in found['training'].leaks:
    assert leak.flipped_layers[0] == 0
  assert found['training'].logits > 10 * ROUNDING


@pytest.mark.long
def test_expert_choice_sees_the_future(tokens):
  """Frozen as well."""
  model = build('unbalanced', selection='choose_by_experts')
  found = audit.causality(model, tokens, POSITIONS, passes=['frozen'])
  assert found['frozen'].flipped > 0
  with pytest.raises(ValueError, match='cannot decode token by token'):
    audit.decoding(model, tokens)


@pytest.mark.long
def test_dynamic_activation_does_not_see_the_future(tokens):
  """By the threshold of the step before; here, one that some scores exceed."""
  model = build('threshold', selection='choose_above')
  state = model.moe_blocks.feed_forward.state
  q_LxE = np.full((2, 8), 0.13, np.float32)
  state.set_value(state.get_value()._replace(q=q_LxE))
  found = audit.causality(model, tokens, POSITIONS, passes=('frozen', 'solved'))
  for each in found.values():
    assert each.flipped == 0
    assert each.logits < ROUNDING


@pytest.mark.long
def test_documents_are_as_the_model_was_trained(tokens):
  """Nothing is seen of the future, and less of the past."""
  model = build('loss_free')
  positions = np.arange(SEQUENCE) % 3 + np.zeros_like(tokens)
  apart, across = (
    audit.causality(
      model,
      tokens,
      POSITIONS,
      passes=['frozen'],
      document_positions_BxS=document_positions,
    )['frozen']
    for document_positions in (positions, None)
  )
  assert apart.flipped == 0 and apart.logits < ROUNDING
  assert apart.loss != across.loss


@pytest.mark.long
def test_decoding_routes_as_the_whole_text(tokens):
  decoded = audit.decoding(build('bip'), tokens)
  assert decoded.position == SEQUENCE - 1
  assert decoded.flipped == 0
  assert decoded.logits < ROUNDING


def test_shares_by_hand():
  """One sequence of three tokens, two of them kept; one layer of two flips."""
  experts = np.array([[[[0, 1], [2, 3], [4, 5]]], [[[0, 1], [2, 3], [4, 5]]]])
  other = np.array([[[[1, 0], [2, 3], [0, 1]]], [[[0, 7], [6, 7], [0, 1]]]])
  logits = np.zeros((1, 3, 5), np.float32)
  moved = logits.copy()
  moved[0, 1, 4], moved[0, 2, 0] = -0.5, 9.0
  kept = np.array([True, True, False])
  flipped_L, largest = audit.difference((logits, experts), (moved, other), kept)
  np.testing.assert_allclose(flipped_L, [0, 0.75])
  assert largest == 0.5
  # A slot that is not used is no route: 2 and 3 are lost, of 3 + 2 in the end.
  fewer = np.array([[[[0, -1], [2, 3], [4, 5]]], [[[0, 1], [2, 3], [4, 5]]]])
  other = np.array([[[[0, -1], [9, -1], [4, 5]]], [[[0, 1], [2, 3], [4, 5]]]])
  flipped_L, _ = audit.difference((logits, fewer), (logits, other), kept)
  np.testing.assert_allclose(flipped_L, [3 / 5, 0])


@pytest.fixture(scope='module')
def abstract():
  """A model without values: what is refused is not run."""
  return nnx.eval_shape(lambda: build('unbalanced'))


@pytest.mark.parametrize(
  ('positions', 'passes', 'words'),
  [
    ([], ['frozen'], 'positions: none is given'),
    ([15], ['frozen'], 'positions=15: must be 14 or less'),
    ([-1], ['frozen'], 'positions=-1: must be 0 or more'),
    ([3], ['thawed'], "passes='thawed': must be one of"),
  ],
)
def test_refuses(positions, passes, words, abstract, tokens):
  with pytest.raises(ValueError, match=words):
    audit.causality(abstract, tokens, positions, passes=passes)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
  """A run of before; its config names the text as *.txt."""
  tiny.write_text(tmp_path)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return shutil.copytree(STORED, tmp_path / 'bip')


@pytest.mark.long
def test_a_run_is_audited(workdir, tmp_path, capsys):
  out = tmp_path / 'out.json'
  command = [f'--run={workdir}', '--positions=3,7', f'--out={out}']
  assert program.main(command) == 0
  page = capsys.readouterr().out
  found = json.loads(out.read_text())
  assert found['method'] == 'bip'
  assert found['sequences'] == 8
  passes = found['passes']
  assert [leak['position'] for leak in passes['solved']['leaks']] == [3, 7]
  assert [leak['flipped'] for leak in passes['frozen']['leaks']] == [0, 0]
  assert sum(leak['flipped'] for leak in passes['solved']['leaks']) > 0
  assert found['decoding']['flipped'] == 0
  assert '| frozen | 0.000% |' in page
  assert 'Fed token by token, 0.000% of the routes differ' in page


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    (['--step=7'], 'no checkpoint of step 7; there are [3]'),
    (['--step=-1'], '--step=-1: must be 0 or more'),
    (['--positions=3,15'], '--positions=3,15: must be like 15,31, each from 0'),
    (['--text=missing.txt'], 'missing.txt'),
    (['--text=00.txt', '--sequences=999'], '--sequences=999: the text has'),
    (['--seed=x'], 'argument --seed: invalid int value'),
    (['--out=/nowhere/a.json'], 'must be a file in an existing directory'),
    (['--run=/nowhere'], '/nowhere'),
  ],
)
def test_refuses_in_one_line(options, words, workdir, capsys):
  assert program.main([f'--run={workdir}', *options]) == 2
  captured = capsys.readouterr()
  assert captured.out == ''
  assert words in captured.err
  assert captured.err.count('\n') == 1


def test_a_text_that_has_changed_is_refused(workdir, capsys):
  for path in workdir.parent.glob('*.txt'):
    path.write_text(f'{path.name}: another text of the expert ' * 99)
  assert program.main([f'--run={workdir}']) == 2
  assert 'has changed since; give a file' in capsys.readouterr().err


def test_an_imported_model_has_no_text(workdir, capsys):
  facts = json.loads((workdir / 'run.json').read_text())
  del facts['text_fingerprint']
  (workdir / 'run.json').write_text(json.dumps(facts))
  assert program.main([f'--run={workdir}']) == 2
  assert '--text: this model has no text of its own' in capsys.readouterr().err
