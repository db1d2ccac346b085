"""Balance against quality: which runs no other run betters in both."""

from collections.abc import Mapping
from collections.abc import Sequence
import itertools

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
import pandas as pd

from moe_jax.analysis import drawing
from moe_jax.analysis.run import Run
from moe_jax.analysis.tables import VALIDATION
from moe_jax.analysis.tables import comparison

_AROUND = 16  # directions in which a name may stand from its point
_DISTANCES = (8, 16, 28, 44, 64, 90, 120)  # points, nearest first


def frontier_figure(runs: Mapping[str, Sequence[Run]]) -> Figure:
  """Draws imbalance against validation perplexity, a point a run.

  Left and low is better. The line joins the runs that no other run betters in
  both, whatever their seeds.

  Args:
    runs: the runs of each method, by the method's name; see `comparison`.

  Raises:
    ValueError: there are no runs, `comparison` refuses them, or one has no
      finite validation perplexity.
  """
  points = _points(runs)
  figure = Figure((drawing.WIDTH, 5.0), layout='constrained')
  axes = figure.subplots()
  front = points.loc[pareto_front(points[['violation', 'perplexity']])]
  front = front.sort_values('violation')
  axes.plot(
    front['violation'],
    front['perplexity'],
    drawstyle='steps-post',
    color='0.6',
    linewidth=4,
    alpha=0.6,
    marker='o',  # One run alone may better all others.
    markersize=13,
    markeredgewidth=0,
    label='no run is better in both',
  )
  for method, style in zip(runs, drawing.styles(runs), strict=True):
    of_method = points[points['method'] == method]
    axes.plot(
      of_method['violation'],
      of_method['perplexity'],
      **style | {'linestyle': '', 'markersize': 7},
    )
  drawing.log_axis(axes, points['violation'].tolist(), 'x')
  axes.margins(0.08)
  axes.set_xlabel('AvgMaxVio (mean over steps of fullest expert / mean - 1)')
  axes.set_ylabel('validation perplexity, q frozen')
  drawing.grid(axes)
  drawing.legend(figure, axes)
  # A method's name stands at its run of lowest perplexity.
  best = points.loc[points.groupby('method')['perplexity'].idxmin()]
  _name(axes, points, best, front)
  return figure


def pareto_front(costs: pd.DataFrame) -> pd.Series:
  """Tells which rows no other row betters; bool.

  One row betters another if it is lower in a column and higher in none.
  """
  values = costs.to_numpy()
  not_higher = (values[:, None] <= values).all(axis=-1)
  lower = (values[:, None] < values).any(axis=-1)
  return pd.Series(~(not_higher & lower).any(axis=0), index=costs.index)


def _points(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
  if not runs:
    raise ValueError('runs: there are none')
  rows = []
  for method, over_seeds in comparison(runs)['methods'].items():
    for summary, run in zip(over_seeds['runs'], runs[method], strict=True):
      perplexity = summary.get(f'eval/{VALIDATION}/perplexity')
      if perplexity is None:
        raise ValueError(f'{method}: {run} has no {VALIDATION} perplexity')
      rows.append((method, summary['average_max_violation'], perplexity))
  return pd.DataFrame(rows, columns=['method', 'violation', 'perplexity'])


def _name(
  axes: Axes, points: pd.DataFrame, named: pd.DataFrame, front: pd.DataFrame
) -> None:
  """Writes methods' names near points, upon no point, line or other name."""
  axes.figure.draw_without_rendering()  # Only then is the layout known.
  scale = axes.figure.dpi / 72
  columns = ['violation', 'perplexity']
  size = 7 * scale  # of half a marker
  places = axes.transData.transform(points[columns])
  taken = [np.concatenate([place - size, place + size]) for place in places]
  corners = axes.transData.transform(front[columns])
  for (x, y), (next_x, next_y) in itertools.pairwise(corners):
    taken += [(x, y - size, next_x, y + size)]
    taken += [(next_x - size, next_y, next_x + size, y)]
  for row in named.itertuples():
    label = axes.annotate(
      row.method,
      (row.violation, row.perplexity),
      xytext=(0, 0),
      textcoords='offset points',
      ha='center',
      va='center',
      fontsize='small',
      parse_math=False,
    )
    box = label.get_window_extent()
    half = np.array([box.width, box.height]) / 2
    place = axes.transData.transform((row.violation, row.perplexity))
    offset = _free_place(place, half, taken, axes.bbox.extents, scale)
    label.set_position(offset / scale)
    if np.abs(offset)[1] > half[1] + 2 * _DISTANCES[0] * scale:
      axes.annotate(
        '',
        (row.violation, row.perplexity),
        xytext=offset / scale,
        textcoords='offset points',
        arrowprops={'arrowstyle': '-', 'color': '0.6', 'linewidth': 0.6},
      )
    centre = place + offset
    taken.append(np.concatenate([centre - half, centre + half]))


def _free_place(place, half, taken, inside, scale) -> np.ndarray:
  """Nearest offset at which a box of that half size touches nothing."""
  for distance in _DISTANCES:
    for turn in np.arange(_AROUND) / _AROUND:
      direction = np.array([np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)])
      offset = direction * (distance * scale + half)
      low, high = place + offset - half, place + offset + half
      fits = (low >= inside[:2]).all() and (high <= inside[2:]).all()
      if fits and not any(
        (low < box[2:]).all() and (high > box[:2]).all() for box in taken
      ):
        return offset
  return np.array([0.0, half[1] + _DISTANCES[0] * scale])
