"""The frontier of balance against perplexity."""

import numpy as np
import pandas as pd
import pytest

from moe_jax.analysis import Run, frontier_figure
from moe_jax.analysis.frontier import pareto_front


@pytest.fixture
def make(write_run, records):
  """Returns a function that makes a run with this AvgMaxVio and perplexity."""

  def run(method, violation, perplexity, seed=0):
    changed = [r | {'router/max_violation': violation} for r in records]
    changed[-1]['eval/validation/perplexity'] = perplexity
    name = f'{method}_{seed}'.replace('/', '_')
    return Run(write_run(name, records=changed, method=method, seed=seed))

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
  (legend,) = axes.figure.legends
  assert [t.get_text() for t in legend.get_texts()][1:] == ['a', 'b', 'c']
  assert axes.get_xscale() == 'log'
  assert 'AvgMaxVio' in axes.get_xlabel()
  assert 'perplexity' in axes.get_ylabel()


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
  with pytest.raises(ValueError, match='never, seed 0: no validation perplex'):
    frontier_figure({'never': [run]})
