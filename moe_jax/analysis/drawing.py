"""What figures share: colours, axes, legends, and how they are saved."""

from collections.abc import Iterable
from collections.abc import Sequence
from collections.abc import Sized
import os
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from matplotlib.ticker import MaxNLocator
from matplotlib.ticker import NullLocator
from matplotlib.ticker import SymmetricalLogLocator
import numpy as np
import pandas as pd
from scipy import optimize

# Neighbours in this order also differ in lightness.
COLORS = (
  '#0072B2',
  '#E69F00',
  '#000000',
  '#CC79A7',
  '#009E73',
  '#56B4E9',
  '#D55E00',
)
CMAP = matplotlib.colormaps['cividis']  # light is much, in greyscale, too
LINES = ('-', '--', '-.', ':')
MARKERS = ('o', 's', '^', 'D', 'v', 'X', 'P', '*')
_ROUNDING = 1e-6  # a smaller MaxVio is float32's way to say 0
WIDTH = 8.0  # inches: type stays readable when a README shows it 800 px wide


def save_figure(
  figure: Figure, path_without_suffix: str | os.PathLike[str]
) -> None:
  """Writes a figure as .png (150 dpi) and .svg; the same figure, same bytes."""
  path = os.fspath(path_without_suffix)
  figure.savefig(f'{path}.png', dpi=150)
  with matplotlib.rc_context({'svg.hashsalt': 'moe_jax'}):
    figure.savefig(f'{path}.svg', metadata={'Date': None})


def styles(methods: Iterable[str]) -> list[dict[str, Any]]:
  """Line properties of each method."""
  return [
    {
      'color': COLORS[i % len(COLORS)],
      'linestyle': LINES[i % len(LINES)],
      'marker': MARKERS[i % len(MARKERS)],
      'markersize': 5,
      'linewidth': 1.2,
    }
    for i, _ in enumerate(methods)
  ]


def marks(values: Sized) -> dict[str, int]:
  """Some ten markers along a line, the first of them on its first value."""
  return {'markevery': max(1, len(values) // 10)}


def log_axis(axes: Axes, values: Sequence[float], which: str = 'y') -> None:
  """Makes an axis logarithmic, with a 0 where some values are 0."""
  positive = [value for value in values if value > _ROUNDING]
  ticks = {'base': 10, 'subs': (1, 2, 5)}
  axis = {'x': axes.xaxis, 'y': axes.yaxis}[which]
  set_scale = {'x': axes.set_xscale, 'y': axes.set_yscale}[which]
  if len(positive) < len(values):
    threshold = min(positive, default=1.0)
    set_scale('symlog', linthresh=threshold)
    axes.set(**{f'{which}lim': (0.0, None)})
    locator = SymmetricalLogLocator(linthresh=threshold, **ticks)
  else:
    set_scale('log')
    locator = LogLocator(**ticks)
  axis.set_major_locator(locator)
  axis.set_minor_locator(NullLocator())
  axis.set_major_formatter('{x:g}')


def heat_map(axes: Axes, by_step: pd.DataFrame, **limits: float) -> QuadMesh:
  """Draws [steps, experts] as colours, a row an expert, that of 0 on top.

  A record reaches half way to its neighbours, however far apart they are.
  """
  mesh = axes.pcolormesh(
    edges(by_step.index.to_numpy()),
    np.arange(by_step.shape[1] + 1) - 0.5,
    by_step.to_numpy().T,
    cmap=CMAP,
    rasterized=True,  # A thousand steps of 256 experts would be a huge SVG.
    **limits,
  )
  axes.invert_yaxis()
  axes.set_ylabel('expert')
  axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
  return mesh


def edges(centres: np.ndarray) -> np.ndarray:
  """Borders of cells half way between centres; a lone cell has width 1."""
  if len(centres) == 1:
    return centres[0] + np.array([-0.5, 0.5])
  inner = (centres[1:] + centres[:-1]) / 2
  first, last = 2 * centres[0] - inner[0], 2 * centres[-1] - inner[-1]
  return np.concatenate([[first], inner, [last]])


def name_line_ends(axes: Axes) -> None:
  """Writes the labels of lines at their right ends, none upon another."""
  lines = [x for x in axes.get_lines() if not x.get_label().startswith('_')]
  lines.sort(key=lambda line: line.get_ydata()[-1])
  axes.figure.draw_without_rendering()  # Only then is the layout known.
  points = 72 / axes.figure.dpi
  ends = [axes.transData.transform((0, x.get_ydata()[-1]))[1] for x in lines]
  for line, end, place in zip(
    lines, ends, spread(np.array(ends), 8 / points), strict=True
  ):
    axes.annotate(
      line.get_label(),
      (1, line.get_ydata()[-1]),
      xycoords=('axes fraction', 'data'),
      xytext=(4, (place - end) * points),
      textcoords='offset points',
      va='center',
      fontsize='x-small',
      color=line.get_color(),
      annotation_clip=False,
    )


def spread(ascending: np.ndarray, gap: float) -> np.ndarray:
  """Moves numbers as little as makes them at least `gap` apart, in squares."""
  if not len(ascending):
    return ascending
  room = gap * np.arange(len(ascending))
  return optimize.isotonic_regression(ascending - room).x + room


def grid(axes: Axes) -> None:
  axes.grid(color='0.9')
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)


def legend(figure: Figure, axes: Axes) -> None:
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(
    handles,
    labels,
    loc='outside upper center',
    ncols=min(len(labels), 4),
    frameon=False,
    handlelength=4,
  )
