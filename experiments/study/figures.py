"""Figures of the study, drawn from stored runs."""

from collections.abc import Iterable
import math
import pathlib
from typing import Any

from matplotlib.figure import Figure
import pandas as pd

from experiments.study import balance, runs, tuning
from experiments.study.runs import Arm
from experiments.study.statistics import Difference, paired
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
  """Draws imbalance against loss: methods, and baselines as tuned."""
  figure, axes = drawing.subplots(5.0)
  drawn = []
  by_rate = {
    scoring: [
      arm for (of, _), arm in tuning.BIAS_RATES.items() if of == scoring
    ]
    for scoring in ('softmax', 'sigmoid')
  }
  for label, method, line, arms in (
    ('by weight', 'loss_controlled', '-', tuning.ALPHAS.values()),
    ('by rate', 'loss_free', '-', by_rate['softmax']),
    ('by rate, sigmoid', 'loss_free', ':', by_rate['sigmoid']),
  ):
    points = _points(arms, tuning.BASELINE, results)
    drawn += [violation for violation, _ in points]
    look = {'linestyle': line, 'markevery': 1, 'fillstyle': 'none'}
    style = drawing.method_style(method) | look
    if points:
      violations, differences = zip(*points, strict=True)
      losses = [difference.mean for difference in differences]
      axes.plot(violations, losses, label=label, **style)
  for arm in balance.MAIN.values():
    for violation, loss in _points([arm], balance.MAIN['unbalanced'], results):
      style = _look(arm) | {'linestyle': '', 'markersize': 8, 'markevery': 1}
      drawn.append(violation)
      axes.errorbar(
        violation, loss.mean, loss.margin, label=arm.name, capsize=3, **style
      )
  drawing.log_axis(axes, drawn, 'x')
  axes.set(
    xlabel='AvgMaxVio (mean over steps of fullest expert / mean - 1)',
    ylabel='loss - loss of unbalanced [nats]',
  )
  drawing.title(
    axes, 'points: paired by seed, 95 % interval; lines: tuning, another seed'
  )
  drawing.grid(axes)
  drawing.legend(figure, axes)
  return figure


def _points(
  arms: Iterable[Arm], baseline: Arm, results: pathlib.Path
) -> list[tuple[float, Difference]]:
  """Returns AvgMaxVio and the loss over the baseline's, of stored arms."""
  points = []
  for arm in arms:
    if not (arm.stored(results) and baseline.stored(results)):
      continue
    found = runs.frame([arm, baseline], results)
    difference = Difference(0.0, math.nan)
    if arm != baseline:
      difference = paired(found[runs.LOSS], arm.name, baseline.name)
    violation = found['average_max_violation'][arm.name].mean()
    points.append((violation, difference))
  return points


def _look(arm: Arm) -> dict[str, Any]:
  """Returns the look of the arm's method, hollow where it has other values."""
  style = drawing.method_style(arm.method)
  if arm.name != arm.method:
    style |= {'fillstyle': 'none', 'linestyle': ':'}
  return style
