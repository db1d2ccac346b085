"""Figures carry the data they were given and say what it is."""

import matplotlib
import numpy as np
import pytest

from moe_jax.analysis import Run
from moe_jax.analysis import load_heatmap_figure
from moe_jax.analysis import loss_figure
from moe_jax.analysis import max_violation_figure
from moe_jax.analysis import save_figure


@pytest.fixture
def runs(write_run, records):
  doubled = [
    r | {'router/max_violation': 2 * r['router/max_violation']} for r in records
  ]
  return {
    'bip': Run(write_run('bip')),
    'loss_free': Run(write_run('loss_free', records=doubled)),
  }


def lines(axes):
  return {line.get_label(): line for line in axes.get_lines()}


def test_max_violation(runs):
  (axes,) = max_violation_figure(runs).axes
  drawn = lines(axes)
  assert drawn['bip'].get_xdata().tolist() == [1, 2, 3]
  assert drawn['bip'].get_ydata().tolist() == [1.0, 0.5, 0.25]
  assert drawn['loss_free'].get_ydata().tolist() == [2.0, 1.0, 0.5]
  assert axes.get_yscale() == 'log'
  assert 'step' in axes.get_xlabel()
  assert 'MaxVio' in axes.get_ylabel()
  band = axes.collections[0].get_paths()[0].vertices
  assert {(1.0, 1.5), (2.0, 1.0), (3.0, 0.5)} <= set(map(tuple, band))


@pytest.mark.parametrize('zero', [0.0, -6e-8, 6e-8])
def test_zero_is_on_the_axis(write_run, records, zero):
  records[1]['router/max_violation'] = zero
  run = Run(write_run(records=records))
  (axes,) = max_violation_figure({'bip': run}).axes
  assert axes.get_yscale() == 'symlog'
  assert axes.get_ylim()[0] == 0.0
  # The smallest positive value stands clear of 0.
  bottom, value, top = axes.transData.transform(
    [(1, 0.0), (1, 0.25), (1, axes.get_ylim()[1])]
  )[:, 1]
  assert value - bottom > 0.2 * (top - bottom)


def test_methods_stay_apart_without_colour(runs):
  (axes,) = max_violation_figure(runs).axes
  looks = {
    (line.get_linestyle(), line.get_marker()) for line in axes.get_lines()
  }
  assert len(looks) == 2
  (legend,) = axes.figure.legends
  assert [text.get_text() for text in legend.get_texts()] == list(runs)


def test_load_heatmap(runs):
  first, second, bar = load_heatmap_figure(runs).axes
  # AvgMaxVio is 0.5 in layer 0 and 2/3 in layer 1.
  assert first.get_title('left') == 'bip, layer 1 (its least balanced)'
  assert second.get_title('left') == 'loss_free, layer 1 (its least balanced)'
  (image,) = first.get_images()
  np.testing.assert_array_equal(
    image.get_array(),
    np.array([[6, 8, 6], [6, 8, 4], [2, 0, 3], [2, 0, 3]]) / 4,
  )
  assert image.get_extent() == [0.5, 3.5, 3.5, -0.5]
  assert image.get_clim() == second.get_images()[0].get_clim() == (0.0, 2.0)
  assert first.get_ylabel() == 'expert'
  assert 'step' in second.get_xlabel()
  assert 'load / mean load' in bar.get_ylabel()


def test_load_heatmap_of_a_chosen_layer(runs):
  axes = load_heatmap_figure(runs, layer=0, maximum=3.0).axes[0]
  assert axes.get_title('left') == 'bip, layer 0'
  (image,) = axes.get_images()
  np.testing.assert_array_equal(image.get_array()[:, 0], [2.5, 1.0, 0.5, 0.0])
  assert image.get_clim() == (0.0, 3.0)
  with pytest.raises(ValueError, match='layer 5'):
    load_heatmap_figure(runs, layer=5)


def test_greyscale_of_the_heat_map_rises_with_the_load(runs):
  (image,) = load_heatmap_figure(runs).axes[0].get_images()
  rgb = image.cmap(np.linspace(0, 1, 64))[:, :3]
  assert (np.diff(rgb @ [0.2126, 0.7152, 0.0722]) > 0).all()


def test_loss(runs):
  train, validation = loss_figure(runs).axes
  loss = lines(train)['bip']
  assert loss.get_xdata().tolist() == [8, 16, 24]
  assert loss.get_ydata().tolist() == [8.0, 7.0, 6.0]
  evaluated = validation.get_lines()[0]
  assert evaluated.get_xdata().tolist() == [16, 24]
  assert evaluated.get_ydata().tolist() == [2.5, 1.5]
  assert list(validation.get_lines()[-1].get_ydata()) == [2.0, 2.0]
  assert [text.get_text() for text in validation.texts] == ['unigram entropy']
  assert train.get_xlabel() == validation.get_xlabel() == 'training tokens'
  assert 'nats/token' in train.get_ylabel()
  assert 'bits/byte' in validation.get_ylabel()


@pytest.mark.parametrize(
  'draw', [max_violation_figure, load_heatmap_figure, loss_figure]
)
def test_saved_files_are_the_same_each_time(runs, tmp_path, draw):
  for name in ('rate_1e-3.5', 'again'):
    save_figure(draw(runs), tmp_path / name)
  assert (tmp_path / 'rate_1e-3.5.png').read_bytes().startswith(b'\x89PNG')
  svg = (tmp_path / 'rate_1e-3.5.svg').read_bytes()
  assert svg == (tmp_path / 'again.svg').read_bytes()
  assert b'</svg>' in svg and b'<dc:date>' not in svg


def test_drawing_leaves_matplotlib_as_it_was(runs, tmp_path):
  before = dict(matplotlib.rcParams)
  save_figure(loss_figure(runs), tmp_path / 'loss')
  assert dict(matplotlib.rcParams) == before
