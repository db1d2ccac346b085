"""Figures of the study, drawn from stored runs."""

from collections.abc import Iterable, Mapping
import math
import pathlib
from typing import Any

from matplotlib.figure import Figure
import pandas as pd

from experiments.study.runs import Arm
from experiments.study.statistics import Difference
from moe_jax.analysis import drawing

VIOLATION = 'MaxVio (fullest expert / mean - 1)'


def curves(arms: Iterable[Arm], results: pathlib.Path) -> Figure:
  """Draws MaxVio by step: mean over seeds, and a band of all seeds."""
  figure, axes = drawing.subplots(4.5)
  lowest, counts = [], []
  for arm in arms:
    stored = arm.stored(results)
    if not stored:
      continue
    by_seed = pd.DataFrame(
      {s: run['curves']['router/max_violation'] for s, run in stored.items()}
    )
    by_seed.index += 1
    style = look(arm)
    drawing.line(axes, by_seed.mean(axis=1), label=arm.name, **style)
    counts.append(len(stored))
    axes.fill_between(
      by_seed.index,
      *(by_seed.min(axis=1), by_seed.max(axis=1)),
      color=style['color'],
      alpha=0.2,
      linewidth=0,
    )
    lowest += [*by_seed.min(axis=1)]
  drawing.log_axis(axes, lowest)
  axes.set(xlabel='optimizer step', ylabel=VIOLATION)
  seeds = ' to '.join(map(str, sorted({min(counts), max(counts)})))
  drawing.title(
    axes, f'line: mean over layers and seeds ({seeds}); band: all seeds'
  )
  drawing.grid(axes)
  drawing.legend(figure, axes)
  return figure


def rows(
  values: pd.DataFrame, xlabel: str, methods: Iterable[str] = ()
) -> Figure:
  """Draws a row for each row, and in it a mark for each column.

  Args:
    values: with the names that are shown.
    xlabel: what the values are.
    methods: of the columns, whose looks they have, if they are of methods.
  """
  looks = [drawing.method_style(method) for method in methods] or [
    {'color': color, 'marker': marker}
    for color, marker in zip(drawing.COLORS, drawing.MARKERS, strict=False)
  ]
  figure, axes = drawing.subplots(1.3 + 0.22 * len(values))
  places = range(len(values))
  for (name, column), look in zip(values.items(), looks, strict=False):
    look = look | {'linestyle': '', 'markevery': 1, 'fillstyle': 'none'}
    axes.plot(column, places, label=name, clip_on=False, **look)
  axes.set_yticks(places, values.index, parse_math=False)
  axes.invert_yaxis()
  axes.set_xlabel(xlabel)
  drawing.log_axis(axes, values.to_numpy().ravel().tolist(), 'x')
  drawing.grid(axes)
  drawing.legend(figure, axes)
  return figure


def by_size(
  lines: Mapping[str, tuple[dict[str, Any], Mapping[int, Difference]]],
  xlabel: str,
  ylabel: str,
  log: bool = False,
) -> Figure:
  """Draws lines over sizes, with what is known of their uncertainty.

  Args:
    lines: by label, the look and the values by size.
    xlabel: what the size is.
    ylabel: what the values are.
    log: whether their axis is logarithmic.
  """
  figure, axes = drawing.subplots(4.5)
  for label, (style, values) in lines.items():
    means, margins = zip(*values.values(), strict=True)
    if all(map(math.isnan, margins)):
      margins = None
    style = style | {'markevery': 1}
    axes.errorbar([*values], means, margins, label=label, capsize=3, **style)
  sizes = sorted({size for _, values in lines.values() for size in values})
  axes.set_xscale('log')
  axes.set_xticks(sizes, [f'{size:,}' for size in sizes])
  axes.minorticks_off()
  axes.set(xlabel=xlabel, ylabel=ylabel)
  if log:
    of_lines = [values.values() for _, values in lines.values()]
    drawing.log_axis(axes, [x.mean for each in of_lines for x in each])
  drawing.grid(axes)
  drawing.legend(figure, axes, columns=2)
  return figure


def look(arm: Arm) -> dict[str, Any]:
  """Returns the look of the arm's method, hollow where it has other values."""
  style = drawing.method_style(arm.method)
  if arm.name != arm.method:
    style |= {'fillstyle': 'none', 'linestyle': ':'}
  return style
