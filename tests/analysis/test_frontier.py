"""The frontier of balance against perplexity."""

import itertools

import numpy as np
import pandas as pd
import pytest

from moe_jax.analysis import Run
from moe_jax.analysis import frontier_figure
from moe_jax.analysis.frontier import pareto_front


@pytest.fixture
def make(write_run, records):
  """Returns a function that makes a run with this AvgMaxVio and perplexity."""

  def run(method, violation, perplexity, seed=0):
    changed = [r | {'router/max_violation': violation} for r in records]
    changed[-1]['eval/validation/perplexity'] = perplexity
    name = f'{method}_{seed}'.replace('/', '_')
    config = {'method': method, 'seed': seed}
    return Run(write_run(name, records=changed, **config))

  return run


def test_frontier(make):
  runs = {
    'a': [make('a', 0.1, 30.0), make('a', 0.2, 32.0, seed=1)],
    'b': [make('b', 0.4, 20.0)],
    'c': [make('c', 0.5, 25.0)],
  }
  (axes,) = frontier_figure(runs).axes
  front, a, b, c = axes.get_lines()
  np.testing.assert_allclose(front.get_xdata(), [0.1, 0.4])
  assert front.get_ydata().tolist() == [30.0, 20.0]
  # What a point of the line says is reached: lower only further right.
  assert front.get_drawstyle() == 'steps-post'
  np.testing.assert_allclose(a.get_xdata(), [0.1, 0.2])
  assert a.get_ydata().tolist() == [30.0, 32.0]
  assert len({line.get_marker() for line in (a, b, c)}) == 3
  assert [t.get_text() for t in axes.texts if t.get_text()] == ['a', 'b', 'c']
  assert axes.get_xscale() == 'log'
  assert 'AvgMaxVio' in axes.get_xlabel()
  assert 'perplexity' in axes.get_ylabel()


def test_no_name_is_upon_a_point_or_another_name(make):
  random = np.random.default_rng(0)
  runs = {
    f'method_{i}': [make(f'method_{i}', *(0.3 + 0.003 * random.random(2)))]
    for i in range(14)
  }
  runs['far'] = [make('far', 0.9, 0.9)]
  figure = frontier_figure(runs)
  figure.draw_without_rendering()
  (axes,) = figure.axes
  names = [text for text in axes.texts if text.get_text()]
  assert {text.get_text() for text in names} == set(runs)
  boxes = [text.get_window_extent() for text in names]
  for one, other in itertools.combinations(boxes, 2):
    assert not one.overlaps(other)
  for line in axes.get_lines()[1:]:
    for point in axes.transData.transform(line.get_xydata()):
      assert not any(box.contains(*point) for box in boxes)
  front = axes.get_lines()[0]
  steps = front.get_transform().transform_path(front.get_path())
  for x, y in steps.interpolated(50).vertices:
    assert not any(box.contains(x, y) for box in boxes)
  for box in boxes:
    assert axes.bbox.contains(box.x0, box.y0)
    assert axes.bbox.contains(box.x1, box.y1)


def test_a_name_keeps_off_the_line(make):
  """To the right of its point, where a name is best, is the line."""
  runs = {'a': [make('a', 0.1, 30.0)], 'b': [make('b', 0.4, 20.0)]}
  (axes,) = frontier_figure(runs).axes
  box = axes.texts[0].get_window_extent()
  assert not box.y0 < axes.transData.transform((0.1, 30.0))[1] < box.y1


@pytest.mark.parametrize('seed', range(5))
def test_front_is_what_no_row_betters(seed):
  costs = np.random.default_rng(seed).integers(5, size=(20, 2))
  expected = [
    not any((o <= row).all() and (o < row).any() for o in costs)
    for row in costs
  ]
  assert pareto_front(pd.DataFrame(costs)).tolist() == expected


def test_balanced_runs_are_on_the_axis(make):
  runs = {'a': [make('a', 0.0, 30.0)], 'b': [make('b', 0.4, 20.0)]}
  (axes,) = frontier_figure(runs).axes
  assert axes.get_xscale() == 'symlog'
  assert axes.get_xlim()[0] <= 0.0


def test_what_cannot_be_compared_is_refused(make, write_run, records):
  with pytest.raises(ValueError, match='there are none'):
    frontier_figure({})
  with pytest.raises(ValueError, match='a: no runs'):
    frontier_figure({'a': []})
  with pytest.raises(ValueError, match='share a seed'):
    frontier_figure({'a': [make('a', 0.1, 9.0)] * 2})
  never = [
    {key: x for key, x in record.items() if not key.startswith('eval/')}
    for record in records
  ]
  run = Run(write_run('never', records=never))
  with pytest.raises(ValueError, match='never: .* has no validation perplex'):
    frontier_figure({'never': [run]})
