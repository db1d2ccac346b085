"""Figures carry the data they were given and say what it is."""

import matplotlib
import numpy as np
import pytest

from moe_jax.analysis import (
  Run,
  figures,
  frontier_figure,
  load_heatmap_figure,
  loss_figure,
  max_violation_figure,
  price_figure,
  progress_figure,
  save_figure,
  sequence_violation_figure,
)
from moe_jax.config import METHODS


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


def columns(mesh):
  """Borders of a heat map's columns."""
  return mesh.get_coordinates()[0, :, 0].tolist()


def priced(records, prices):
  """Records of steps 1, 2, ...; where `prices` has None, none were kept."""
  made = []
  for record, price in zip(records, prices, strict=True):
    record = dict(record)
    if price is None:
      record = {k: v for k, v in record.items() if '/load/' not in k}
    else:
      record['router/q/layer_00'] = price
    made.append(record)
  return made


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


def draw_alike(runs):
  """The lines that stand for methods, in every figure that has any."""
  return {
    'violation': max_violation_figure(runs).axes[0].get_lines(),
    'loss': loss_figure(runs).axes[0].get_lines(),
    'frontier': frontier_figure({k: [r] for k, r in runs.items()})
    .axes[0]
    .get_lines()[1:],
  }


def test_methods_stay_apart_without_color(write_run):
  runs = {method: Run(write_run(method)) for method in METHODS}
  for figure, drawn in draw_alike(runs).items():
    looks = {(line.get_linestyle(), line.get_marker()) for line in drawn}
    assert len(looks) == len(METHODS), figure
  (legend,) = max_violation_figure(runs).legends
  assert [text.get_text() for text in legend.get_texts()] == list(runs)


@pytest.mark.long
@pytest.mark.parametrize('method', [*METHODS, 'a rule of tomorrow'])
def test_a_method_looks_the_same_whoever_is_beside_it(write_run, method):
  """In all figures: color, marker and, where there are lines, their style."""
  run = Run(write_run('it', method=method))
  others = {m: Run(write_run(m)) for m in ('midpoint', 'bip', 'unbalanced')}
  looks = set()
  for runs in ({'it': run}, {**others, 'it': run}, {'it': run, **others}):
    for figure, drawn in draw_alike(runs).items():
      (line,) = (x for x in drawn if x.get_label() == 'it')
      style = '' if figure == 'frontier' else line.get_linestyle()
      looks.add((line.get_color(), line.get_marker(), style))
  assert len({look[:2] for look in looks}) == 1
  assert len(looks) == 2
  (progress,) = progress_figure(run).axes[0].get_lines()
  assert progress.get_color() == line.get_color()


def test_runs_of_one_method_have_its_color_and_stay_apart(write_run):
  """Seeds, and a variant that has no name."""
  variant = {'name': 'bip', 'iterations': 6}
  runs = {
    'a': Run(write_run('a', method='bip')),
    'b': Run(write_run('b', method='bip', seed=1)),
    'c': Run(write_run('c', balancer=variant)),
  }
  drawn = max_violation_figure(runs).axes[0].get_lines()
  assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 1
  assert len({line.get_fillstyle() for line in drawn}) == 3


def test_load_heatmap(runs):
  first, second, bar = load_heatmap_figure(runs).axes
  # AvgMaxVio is 0.5 in layer 0 and 2/3 in layer 1.
  assert first.get_title('left') == 'bip, layer 1 (its least balanced)'
  assert second.get_title('left') == 'loss_free, layer 1 (its least balanced)'
  (mesh,) = first.collections
  np.testing.assert_array_equal(
    mesh.get_array(),
    np.array([[6, 8, 6], [6, 8, 4], [2, 0, 3], [2, 0, 3]]) / 4,
  )
  assert columns(mesh) == [0.5, 1.5, 2.5, 3.5]
  assert mesh.get_coordinates()[:, 0, 1].tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5]
  assert first.yaxis.get_inverted()
  assert mesh.get_clim() == second.collections[0].get_clim() == (0.0, 2.0)
  assert first.get_ylabel() == 'expert'
  assert 'step' in second.get_xlabel()
  assert 'load / mean load' in bar.get_ylabel()


def test_gates_are_beside_the_loads(write_run, records, spread):
  today = Run(write_run(records=spread))
  loads, gates, bar = load_heatmap_figure({'bip': today}, layer=0).axes
  np.testing.assert_array_equal(
    gates.collections[0].get_array()[:, 0], [3.0, 1.0, 0.0, 0.0]
  )
  np.testing.assert_array_equal(
    loads.collections[0].get_array()[:, 0], [2.5, 1.0, 0.5, 0.0]
  )
  assert gates.yaxis.get_inverted() and loads.yaxis.get_inverted()
  assert gates.get_title('left') == 'its gates'
  assert bar.get_ylabel() == 'load, gates / their mean (1: balanced)'
  older = Run(write_run('older', records=records))
  both = load_heatmap_figure({'bip': today, 'older': older})
  assert len(both.axes) == 3  # Two of loads, and the bar.


def test_sequences_beside_the_batch(write_run, records, spread, tmp_path):
  runs = {m: Run(write_run(m, records=spread)) for m in ('bip', 'loss_free')}
  figure = sequence_violation_figure(runs)
  batch, sequences = figure.axes
  assert lines(batch)['bip'].get_ydata().tolist() == [1.0, 0.5, 0.25]
  drawn = lines(sequences)
  assert drawn['bip'].get_ydata().tolist() == [2.0, 1.0, 0.75]
  looks = {(x.get_linestyle(), x.get_marker()) for x in drawn.values()}
  assert len(looks) == 2  # Also without colour.
  band = sequences.collections[0].get_paths()[0].vertices
  assert {(1.0, 3.0), (2.0, 3.0), (3.0, 1.5)} <= set(map(tuple, band))
  assert batch.get_yscale() == sequences.get_yscale() == 'log'
  assert batch.get_ylim() == sequences.get_ylim()
  assert 'MaxVio' in batch.get_ylabel()
  save_figure(figure, tmp_path / 'sequences')
  runs['older'] = Run(write_run('older', records=records))
  with pytest.raises(ValueError, match='has no router/sequence_violation'):
    sequence_violation_figure(runs)


def test_load_heatmap_of_a_chosen_layer(runs):
  axes = load_heatmap_figure(runs, layer=0).axes[0]
  assert axes.get_title('left') == 'bip, layer 0'
  (mesh,) = axes.collections
  np.testing.assert_array_equal(mesh.get_array()[:, 0], [2.5, 1.0, 0.5, 0.0])
  assert mesh.get_clim() == (0.0, 2.0)
  with pytest.raises(ValueError, match='layer 5'):
    load_heatmap_figure(runs, layer=5)


def test_load_heatmap_of_steps_far_apart(write_run, records):
  records = priced(records, [[0.0] * 4, None, [0.0] * 4])
  run = Run(write_run(records=records))
  (mesh,) = load_heatmap_figure({'bip': run}, layer=0).axes[0].collections
  assert columns(mesh) == [0.0, 2.0, 4.0]
  assert mesh.get_array().shape == (4, 2)


def test_greyscale_of_the_heat_map_rises_with_the_load(runs):
  (mesh,) = load_heatmap_figure(runs).axes[0].collections
  rgb = mesh.cmap(np.linspace(0, 1, 64))[:, :3]
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


def test_prices(write_run, records, monkeypatch):
  monkeypatch.setattr(figures, '_NAMED', 1)
  prices = [[0.0, 0.4, 0.1, 0.2], None, [0.1, 0.0, 0.3, 0.2]]
  run = Run(write_run(records=priced(records, prices)))
  upper, lower, bar = price_figure(run, layer=0).axes
  *_, highest, lowest = upper.get_lines()
  assert highest.get_xdata().tolist() == [1, 3]
  assert highest.get_ydata().tolist() == [0.1, 0.3]
  assert lowest.get_ydata().tolist() == [0.4, 0.0]
  assert len(upper.get_lines()) == 4
  named = 'at the end highest (solid): 2; lowest (dashed): 1'
  assert upper.get_title('left').endswith(named)
  (mesh,) = lower.collections
  np.testing.assert_array_equal(mesh.get_array(), np.array(prices[::2]).T)
  assert 'layer 0' in upper.get_title('left')
  assert 'price q' in upper.get_ylabel() and 'price q' in bar.get_ylabel()
  assert 'step' in lower.get_xlabel()
  with pytest.raises(ValueError, match='layer 1'):
    price_figure(run, layer=1)


@pytest.mark.parametrize('experts', [2, 5])
def test_few_experts_are_drawn_once_each(write_run, records, experts):
  prices = [list(range(experts))] * 3
  run = Run(write_run(records=priced(records, prices)))
  upper = price_figure(run, layer=0).axes[0]
  last = sorted(line.get_ydata()[-1] for line in upper.get_lines())
  assert last == list(range(experts))


@pytest.mark.parametrize('draw', [progress_figure, price_figure])
def test_a_method_may_have_any_name(write_run, records, tmp_path, draw):
  records = priced(records, [[0.0, 1.0]] * 3)
  run = Run(write_run(records=records, method=r'$\oops$'))
  save_figure(
    draw(run, **({'layer': 0} if draw is price_figure else {})),
    tmp_path / 'figure',
  )


def test_progress(write_run, records):
  run = Run(write_run(steps=1003))
  loss, violation, speed = progress_figure(run).axes
  assert loss.get_lines()[0].get_ydata().tolist() == [8.0, 7.0, 6.0]
  assert violation.get_lines()[0].get_ydata().tolist() == [1.0, 0.5, 0.25]
  # Without the two steps that compile: 1000 steps are left at 0.75 s.
  assert speed.get_lines()[0].get_xdata().tolist() == [3]
  assert speed.get_lines()[0].get_ydata().tolist() == [24.0]
  title = loss.figure.get_suptitle()
  assert title == 'bip: step 3 of 1,003 (0%), about 0:12:30 left'
  assert speed.get_xlim() == (0, 1003)
  assert 'nats/token' in loss.get_ylabel()
  assert 'tokens/s' in speed.get_ylabel()


def test_progress_of_runs_that_just_began_or_are_done(write_run, records):
  done = progress_figure(Run(write_run()))
  assert done.get_suptitle() == 'bip: step 3 of 3 (100%), done'
  first = progress_figure(Run(write_run('first', records=records[:1])))
  assert first.get_suptitle().endswith('(33%), about 0:02:00 left')
  with pytest.raises(ValueError, match='no step is completed'):
    progress_figure(Run(write_run('none', records=[])))


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


@pytest.mark.parametrize('draw', [max_violation_figure, loss_figure])
def test_a_run_may_have_nothing_finite(write_run, records, tmp_path, draw):
  names = 'router/max_violation', 'train/loss', 'eval/validation/bits_per_byte'
  records = [record | dict.fromkeys(names) for record in records]
  runs = {'bip': Run(write_run(records=records)), 'other': Run(write_run('x'))}
  save_figure(draw({'bip': runs['bip']}), tmp_path / 'alone')
  save_figure(draw(runs), tmp_path / 'together')


def test_drawing_leaves_matplotlib_as_it_was(runs, tmp_path):
  before = dict(matplotlib.rcParams)
  save_figure(loss_figure(runs), tmp_path / 'loss')
  assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
  'draw',
  [
    max_violation_figure,
    load_heatmap_figure,
    loss_figure,
  ],
)
def test_a_run_without_a_step_is_named(write_run, draw):
  with pytest.raises(ValueError, match="begun'.: no step is completed yet"):
    draw({'bip': Run(write_run('begun', records=[]))})
