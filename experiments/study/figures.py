"""Figures of the study, drawn from stored runs."""

from collections.abc import Iterable
import pathlib
from typing import Any

from matplotlib.figure import Figure
import pandas as pd

from experiments.study import balance, runs, tuning
from experiments.study.question import PERPLEXITY
from experiments.study.runs import Arm
from moe_jax.analysis import drawing, save_figure


def write(results: pathlib.Path) -> None:
  """Writes every figure whose runs are stored."""
  main = balance.MAIN.values()
  if any(arm.stored(results) for arm in main):
    save_figure(balance_figure(main, results), results / 'max_violation')
    save_figure(frontier_figure(results), results / 'frontier')


def balance_figure(arms: Iterable[Arm], results: pathlib.Path) -> Figure:
  """Draws MaxVio by step: mean over seeds, and a band of all seeds."""
  figure, axes = drawing.subplots(4.5)
  lowest, counts = [], []
  for arm in arms:
    stored = arm.stored(results)
    if not stored:
      continue
    curves = pd.DataFrame(
      {s: run['curves']['router/max_violation'] for s, run in stored.items()}
    )
    curves.index += 1
    style = _look(arm)
    drawing.line(axes, curves.mean(axis=1), label=arm.name, **style)
    counts.append(len(stored))
    axes.fill_between(
      curves.index,
      *(curves.min(axis=1), curves.max(axis=1)),
      color=style['color'],
      alpha=0.2,
      linewidth=0,
    )
    lowest += [*curves.min(axis=1)]
  drawing.log_axis(axes, lowest)
  axes.set(xlabel='optimizer step', ylabel='MaxVio (fullest expert / mean - 1)')
  seeds = ' to '.join(map(str, sorted({min(counts), max(counts)})))
  drawing.title(
    axes, f'line: mean over layers and seeds ({seeds}); band: all seeds'
  )
  drawing.grid(axes)
  drawing.legend(figure, axes)
  return figure


def frontier_figure(results: pathlib.Path) -> Figure:
  """Draws imbalance against perplexity: methods, and baselines as tuned."""
  figure, axes = drawing.subplots(5.0)
  drawn = []
  by_rate = {
    scoring: [
      arm for (of, _), arm in tuning.BIAS_RATES.items() if of == scoring
    ]
    for scoring in ('softmax', 'sigmoid')
  }
  for label, method, line, arms in (
    (
      'by weight',
      'loss_controlled',
      '-',
      tuning.ALPHAS.values(),
    ),
    ('by rate', 'loss_free', '-', by_rate['softmax']),
    ('by rate, sigmoid', 'loss_free', ':', by_rate['sigmoid']),
  ):
    found = runs.frame(list(arms), results)
    if not len(found):
      continue
    points = found[['average_max_violation', PERPLEXITY]].to_numpy()
    drawn += [*points[:, 0]]
    look = {'linestyle': line, 'markevery': 1, 'fillstyle': 'none'}
    style = drawing.method_style(method) | look
    axes.plot(*points.T, label=label, **style)
  for arm in balance.MAIN.values():
    found = runs.frame([arm], results)
    if len(found):
      style = _look(arm)
      style |= {'linestyle': '', 'markersize': 8, 'markevery': 1}
      points = found[['average_max_violation', PERPLEXITY]].mean()
      drawn.append(points.iloc[0])
      axes.plot(*points, label=arm.name, **style)
  drawing.log_axis(axes, drawn, 'x')
  axes.set(
    xlabel='AvgMaxVio (mean over steps of fullest expert / mean - 1)',
    ylabel='validation perplexity, q frozen',
  )
  drawing.title(axes, 'points: means over seeds; lines: tuning, one other seed')
  drawing.grid(axes)
  drawing.legend(figure, axes)
  return figure


def _look(arm: Arm) -> dict[str, Any]:
  """Returns the look of the arm's method, hollow where it has other values."""
  style = drawing.method_style(arm.method)
  if arm.name != arm.method:
    style |= {'fillstyle': 'none', 'linestyle': ':'}
  return style
