"""The text with its experts, and the experts with their tokens."""

import warnings

from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
import numpy as np
import pytest

from moe_jax.analysis import (
  save_figure,
  text_figure,
  typical_tokens,
  typical_tokens_figure,
)
from moe_jax.analysis.text_figures import expert_color, visible, wrap


@pytest.fixture
def routed(route):
  scores = [
    [[0.1, 0.2, 0.7], [0.5, 0.4, 0.1], [0.3, 0.6, 0.1]],
    [[0.7, 0.2, 0.1], [0.1, 0.4, 0.5], [0.3, 0.1, 0.6]],
  ]
  return route(scores, k=2, tokens=['A', ' bee', '\n'])


def cells(axes):
  return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def luminance(color):
  return np.array(to_rgb(color)) @ [0.2126, 0.7152, 0.0722]


def test_text(routed):
  figure = text_figure(routed, layer=0)
  (axes,) = figure.axes
  texts = [text.get_text() for text in axes.texts]
  assert texts == ['A', '2 1', '·bee', '0 1', '↵', '1 0']
  drawn = [cell.get_facecolor()[:3] for cell in cells(axes)]
  np.testing.assert_allclose(drawn, [expert_color(e) for e in (2, 0, 1)])
  assert 'layer 0, tokens 0 to 2 of 3' in figure.get_suptitle()
  (axes,) = text_figure(routed, layer=1).axes
  assert [text.get_text() for text in axes.texts][1::2] == ['0 1', '2 1', '2 0']


def test_a_part_of_the_text(routed):
  figure = text_figure(routed, layer=0, start=1, count=1)
  texts = [text.get_text() for text in figure.axes[0].texts]
  assert texts == ['·bee', '0 1']
  assert 'tokens 1 to 1 of 3' in figure.get_suptitle()


@pytest.mark.parametrize(
  'option',
  [{'start': 3}, {'start': -1}, {'count': 0}, {'count': 1001}, {'layer': 2}],
)
def test_what_is_not_there_is_refused(routed, option):
  (name,) = option
  with pytest.raises(ValueError, match=f'{name}='):
    text_figure(routed, **({'layer': 0} | option))


@pytest.mark.parametrize(('experts', 'k'), [(16, 2), (64, 6), (256, 8)])
def test_nothing_is_upon_something_else(route, experts, k):
  random = np.random.default_rng(0)
  tokens = ['m' * random.integers(1, 9) if i % 17 else '\n' for i in range(120)]
  text = route(random.random((1, 120, experts)), k=k, tokens=tokens)
  figure = text_figure(text, layer=0)
  figure.draw_without_rendering()
  (axes,) = figure.axes
  boxes = [(t.get_size(), t.get_window_extent()) for t in axes.texts]
  for i, (size, one) in enumerate(boxes):
    assert 0 <= one.x0 and one.x1 <= figure.bbox.x1 and one.y0 >= 0
    # Numbers of one token are a space apart, those of two tokens more.
    gap = 0.6 * size * figure.dpi / 72 if size < 6 else 0
    for _, other in boxes[i + 1 :]:
      apart_x = max(one.x0, other.x0) - min(one.x1, other.x1)
      apart_y = max(one.y0, other.y0) - min(one.y1, other.y1)
      # Boxes of glyphs of two rows may touch; they have room for accents.
      assert apart_x > gap or apart_y > -2


def test_text_of_all_kinds_is_drawn_as_it_is(route, tmp_path):
  tokens = ['$x^$', '\\alpha', '<script>', '字', '\x07', '\t', '--', 200 * '=']
  routed = route(np.eye(8)[None], k=1, tokens=tokens)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    figure = text_figure(routed, layer=0)
    save_figure(figure, tmp_path / 'text')
  texts = [text.get_text() for text in figure.axes[0].texts][::2]
  assert texts[:-1] == ['$x^$', '\\alpha', '<script>', '�', '�', '→', '--']
  assert texts[-1] == 39 * '=' + '…'
  assert b'<script>' not in (tmp_path / 'text.svg').read_bytes()


def test_visible():
  assert visible(' a\n\tb\r') == '·a↵→b←'
  assert visible('é€') == 'é€'


def test_wrap():
  widths, ends = [4, 4, 4, 12, 1, 1], [False, False, False, False, True, False]
  assert wrap(widths, ends, 10) == [
    (0, 0),
    (4, 0),
    (0, 1),
    (0, 2),
    (0, 3),
    (0, 4),
  ]


def test_colors_bear_black_type():
  colors = [expert_color(e) for e in range(12)]
  assert len(set(colors)) == 12
  assert expert_color(12) == colors[0]
  # Contrast with black by WCAG, on luminance of linear light.
  linear = [[channel**2.2 for channel in color] for color in colors]
  contrast = [(luminance(color) + 0.05) / 0.05 for color in linear]
  assert min(contrast) > 7


@pytest.fixture
def long(route):
  random = np.random.default_rng(0)
  tokens = [f'w{i}' for i in random.integers(20, size=400)]
  scores = (
    random.random((2, 400, 8))
    + 0.5 * np.eye(8)[[int(t[1:]) % 8 for t in tokens]]
  )
  return route(scores, k=2, tokens=tokens)


def test_typical_tokens(long):
  (axes,) = typical_tokens_figure(long, layer=1, count=2).axes
  table = typical_tokens(long, layer=1, count=2)
  texts = [text.get_text() for text in axes.texts]
  assert texts[::2] == table['token'].tolist()
  assert texts[1::2] == [f'{r.lift:.1f}x {r.times}' for r in table.itertuples()]
  rows = [round(text.get_position()[1] + 0.16) for text in axes.texts[::2]]
  assert rows == table['expert'].tolist()
  # Darker is more.
  grey = [luminance(cell.get_facecolor()[:3]) for cell in cells(axes)]
  by_lift = np.argsort(table['lift'], kind='stable')
  assert (np.diff(np.array(grey)[by_lift]) <= 1e-3).all()
  assert min(grey) > 0.6


def test_typical_tokens_of_some_experts(long):
  (axes,) = typical_tokens_figure(long, layer=0, experts=[5, 2]).axes
  labels = [label.get_text() for label in axes.get_yticklabels()]
  assert labels == ['5', '2']
  top = [t for t in axes.texts if t.get_position()[1] < 0][0].get_text()
  table = typical_tokens(long, layer=0)
  assert top == table[table['expert'] == 5]['token'].iloc[0]
  with pytest.raises(ValueError, match=r'experts=\[8\]'):
    typical_tokens_figure(long, layer=0, experts=[8])


def test_at_most_64_experts(route):
  scores = np.zeros((1, 500, 100))
  scores[
    0, np.arange(500), [i % 100 if i < 400 else 99 for i in range(500)]
  ] = 1
  tokens = [str(i % 100 if i < 400 else 99) for i in range(500)]
  routed = route(scores, k=1, tokens=tokens)
  panels = typical_tokens_figure(routed, layer=0).axes
  shown = [label.get_text() for a in panels for label in a.get_yticklabels()]
  assert shown == [str(e) for e in [*range(63), 99]]


def test_typical_tokens_refuses(long, routed):
  with pytest.raises(ValueError, match='take a longer text'):
    typical_tokens_figure(routed, layer=0)
  with pytest.raises(ValueError, match='count=13'):
    typical_tokens_figure(long, layer=0, count=13)
  with pytest.raises(ValueError, match='layer=2'):
    typical_tokens_figure(long, layer=2)
