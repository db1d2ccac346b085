"""What is drawn of experts is what was computed."""

import types

import numpy as np
import pytest

from moe_jax.analysis import (
  coactivation_figure,
  cutoff_figure,
  margin_figure,
  save_figure,
  similarity_figure,
)
from moe_jax.analysis.expert_statistics import score_quantiles


def ends(lines):
  """[bars, 2 ends, (x, y)]"""
  return np.array(lines.get_segments())


def numbers(axis):
  return [int(label.get_text()) for label in axis.get_ticklabels()]


@pytest.fixture
def random_text(route):
  random = np.random.default_rng(0)
  scores = random.random((3, 200, 16))
  return route(scores, k=4, q=random.random((3, 16)) / 9)


def test_cutoffs(random_text):
  (axes,) = cutoff_figure(random_text, layer=1).axes
  table = score_quantiles(random_text, layer=1)
  order = np.argsort(random_text.q[1])
  assert numbers(axes.xaxis) == order.tolist()
  others, others_half, chosen, chosen_half, prices = axes.collections
  for bars, name, low, high in (
    (others, 'others', 0.05, 0.95),
    (others_half, 'others', 0.25, 0.75),
    (chosen, 'chosen', 0.05, 0.95),
    (chosen_half, 'chosen', 0.25, 0.75),
  ):
    np.testing.assert_allclose(
      ends(bars)[:, :, 1], table[name][[low, high]].to_numpy()[order]
    )
  np.testing.assert_allclose(ends(prices)[:, 0, 1], random_text.q[1][order])
  medians = axes.get_lines()[1].get_ydata()
  np.testing.assert_allclose(medians, table['chosen', 0.5][order])
  # Bars of one expert stand beside each other, its price reaches over both.
  assert (ends(chosen)[:, 0, 0] < ends(others)[:, 0, 0]).all()
  assert (ends(prices)[:, 0, 0] < ends(chosen)[:, 0, 0]).all()
  assert 'score' in axes.get_ylabel() and 'expert' in axes.get_xlabel()
  with pytest.raises(ValueError, match='layer=3'):
    cutoff_figure(random_text, layer=3)


def test_cutoffs_with_an_expert_that_nobody_chose(route, tmp_path):
  figure = cutoff_figure(route([[[0.9, 0.5, 0.1]] * 3], k=1), layer=0)
  save_figure(figure, tmp_path / 'cutoffs')
  others, _, chosen, _, prices = figure.axes[0].collections
  drawn = [len(bars.get_segments()[0]) for bars in (others, chosen, prices)]
  assert drawn == [0, 2, 2]
  assert not any(map(len, chosen.get_segments()[1:]))


def test_margins(route):
  scores = [
    [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]],
    [[0.4, 0.35, 0.25], [0.2, 0.0, 0.8]],
  ]
  shares, bars = margin_figure(route(scores, k=1)).axes
  first, second = shares.get_lines()
  np.testing.assert_allclose(first.get_xdata(), [0.2, 0.3], rtol=1e-5)
  np.testing.assert_allclose(second.get_xdata(), [0.05, 0.6], rtol=1e-5)
  assert first.get_ydata().tolist() == [0.5, 1.0]
  (medians,) = bars.get_lines()
  np.testing.assert_allclose(medians.get_xdata(), [0.25, 0.325], rtol=1e-5)
  middle = ends(bars.collections[1])
  np.testing.assert_allclose(middle[0, :, 0], [0.225, 0.275], rtol=1e-5)
  assert middle[:, 0, 1].tolist() == [0, 1]
  assert shares.get_xscale() == bars.get_xscale() == 'log'
  for axes in (shares, bars):
    assert 'units of scores' in axes.get_xlabel()


def test_margins_that_are_all_ties_are_drawn(route, tmp_path):
  figure = margin_figure(route(np.ones((1, 3, 2)), k=1))
  save_figure(figure, tmp_path / 'ties')
  assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [0, 0, 0]


def test_margins_of_long_texts_are_thinned(route):
  scores = np.random.default_rng(0).random((1, 5000, 3))
  routed = route(scores, k=1)
  (line,) = margin_figure(routed).axes[0].get_lines()
  margins, shares = line.get_data()
  assert len(margins) == 1000 and shares[-1] == 1.0
  for margin, share in zip(margins[::99], shares[::99], strict=True):
    assert (routed.margins[0] <= margin).mean() == pytest.approx(share)


def test_no_margin_without_a_choice(route):
  with pytest.raises(ValueError, match='all 2 experts'):
    margin_figure(route(np.ones((1, 3, 2)), k=2))


def checkpoint_of(router, gate, up, down):
  layer = {'router': router, 'gate': gate, 'up': up, 'down': down}
  return types.SimpleNamespace(
    step=5, params={'moe_blocks': {'feed_forward': layer}}
  )


def test_similarity():
  random = np.random.default_rng(0)
  kind = np.array([0, 1, 0, 1, 0, 1])
  router = random.normal(size=(2, 7, 6))
  router[1] = np.eye(7)[:, kind] + 0.01 * random.normal(size=(7, 6))
  weights = [random.normal(size=(2, 6, *s)) for s in ((7, 3), (7, 3), (3, 7))]
  left, right, *bars = similarity_figure(
    checkpoint_of(router, *weights), layer=1
  ).axes
  order = numbers(left.xaxis)
  assert numbers(left.yaxis) == numbers(right.xaxis) == order
  assert (np.diff(kind[order]) != 0).sum() == 1
  flat = np.concatenate([w[1].reshape(6, -1) for w in weights], axis=1)
  for axes, vectors in ((left, router[1].T), (right, flat)):
    drawn = axes.get_images()[0].get_array().filled(np.nan)
    units = [vectors[e] / np.linalg.norm(vectors[e]) for e in order]
    for i, j in np.ndindex(6, 6):
      cosine = np.nan if i == j else units[i] @ units[j]
      assert drawn[i, j] == pytest.approx(cosine, nan_ok=True)
  assert [bar.get_xlabel() for bar in bars] == ['cosine similarity'] * 2
  with pytest.raises(ValueError, match='layer=2'):
    similarity_figure(checkpoint_of(router, *weights), layer=2)


def test_coactivation(route):
  scores = np.zeros((1, 60, 4))
  for token, pair in enumerate([(0, 1), (2, 3), (0, 2)] * 20):
    scores[0, token, pair] = 1.0
  axes, bar = coactivation_figure(route(scores, k=2), layer=0).axes
  order = numbers(axes.xaxis)
  (image,) = axes.get_images()
  drawn = image.get_array().filled(np.nan)
  place = [order.index(e) for e in range(4)]
  # Loads are 40, 20, 40, 20 of 60: weights w, 1, w, 1, all pairs together
  # w^2 + 4w + 1, with w (w + 2) / (w^2 + 4w + 1) = 2/3, so w = 1 + sqrt(3).
  w = 1 + np.sqrt(3)
  sets = w * w + 4 * w + 1
  ratio = 20 / (60 * w / sets)
  assert drawn[place[0], place[1]] == pytest.approx(ratio, rel=1e-5)
  assert drawn[place[0], place[2]] == pytest.approx(
    20 / (60 * w * w / sets), rel=1e-5
  )
  # Never together has the lowest colour; too few to tell is blank.
  assert drawn[place[0], place[3]] == 0.25
  assert np.isnan(drawn[place[1], place[3]])
  assert np.isnan(np.diag(drawn)).all()
  assert image.get_clim() == (0.25, 4.0)
  assert 'by chance' in bar.get_ylabel()


def test_coactivation_of_too_short_a_text(route, random_text):
  with pytest.raises(ValueError, match='2 tokens, at most'):
    coactivation_figure(route(np.eye(4)[None, :2], k=2), layer=0)
  with pytest.raises(ValueError, match='layer=9'):
    coactivation_figure(random_text, layer=9)


def test_hundreds_of_experts_have_some_of_their_numbers(route):
  random = np.random.default_rng(0)
  text = route(random.random((1, 900, 256)), k=8)
  axes, _ = coactivation_figure(text, layer=0, minimum=0.1).axes
  assert len(numbers(axes.xaxis)) == 64
  assert axes.get_images()[0].get_array().shape == (256, 256)


@pytest.mark.parametrize('draw', [cutoff_figure, coactivation_figure])
def test_saved_figures_are_the_same_each_time(random_text, tmp_path, draw):
  for name in ('one', 'two'):
    save_figure(draw(random_text, layer=0), tmp_path / name)
  one, two = (tmp_path / f'{name}.svg' for name in ('one', 'two'))
  assert one.read_bytes() == two.read_bytes()
