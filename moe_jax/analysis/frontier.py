"""Balance against quality: which runs no other run betters in both."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
import pandas as pd

from moe_jax.analysis import drawing
from moe_jax.analysis.columns import VALIDATION
from moe_jax.analysis.results import Results
from moe_jax.analysis.table import comparison

_PERPLEXITY = f'eval/{VALIDATION}/perplexity'


def frontier_figure(runs: Mapping[str, Sequence[Results]]) -> Figure:
  """Draws imbalance against validation perplexity, a point a run.

  Left and low is better. The line joins the runs that no other run betters in
  both, whatever their seeds.

  Args:
    runs: the runs of each method, by the method's name; see `comparison`.

  Raises:
    ValueError: there are no runs, `comparison` refuses them, or one has no
      finite validation perplexity.
  """
  if not runs:
    raise ValueError('runs: there are none')
  points = comparison(runs).reindex(
    columns=['average_max_violation', _PERPLEXITY]
  )
  for method, seed in points.index[points[_PERPLEXITY].isna()]:
    raise ValueError(f'{method}, seed {seed}: no {VALIDATION} perplexity')
  figure, axes = drawing.subplots(5.0)
  front = points.loc[pareto_front(points)].sort_values('average_max_violation')
  style = {'color': '0.8', 'linewidth': 4, 'drawstyle': 'steps-post'}
  label = 'no run is better in both'
  # With large dots: one run alone may better all others.
  axes.plot(*front.to_numpy().T, 'o-', markersize=13, label=label, **style)
  firsts = {method: of_method[0] for method, of_method in runs.items()}
  for method, style in drawing.styles(firsts).items():
    style |= {'linestyle': '', 'markersize': 7, 'markevery': 1}
    axes.plot(*points.loc[method].to_numpy().T, **style)
  drawing.log_axis(axes, points['average_max_violation'].tolist(), 'x')
  axes.margins(0.08)
  axes.set_xlabel('AvgMaxVio (mean over steps of fullest expert / mean - 1)')
  axes.set_ylabel('validation perplexity, q frozen')
  drawing.grid(axes)
  drawing.legend(figure, axes)
  return figure


def pareto_front(costs: pd.DataFrame) -> pd.Series:
  """Tells which rows no other row betters; bool.

  One row betters another if it is lower in a column and higher in none.
  """
  values = costs.to_numpy()
  not_higher = (values[:, None] <= values).all(axis=-1)
  lower = (values[:, None] < values).any(axis=-1)
  return pd.Series(~(not_higher & lower).any(axis=0), index=costs.index)
