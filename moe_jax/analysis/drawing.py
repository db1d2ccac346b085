"""What figures share: colours, axes, legends, and how they are saved."""

from collections import Counter
from collections.abc import Mapping, Sequence
import os
from typing import Any
import zlib

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import (
  LogLocator,
  MaxNLocator,
  NullLocator,
  SymmetricalLogLocator,
)
import numpy as np
import pandas as pd

from moe_jax.analysis.results import Results

# Okabe and Ito's, for the colour-blind.
COLORS = '#0072B2 #E69F00 #000000 #CC79A7 #009E73 #56B4E9 #D55E00'.split()
LINES = ('-', '--', '-.', ':')
MARKERS = tuple('os^DvXP*<>phd8H')
# (colour, line, marker); a variant has the colour of what it varies.
_METHODS = {
  'loss_controlled': (0, 0, 0),
  'loss_free': (1, 1, 1),
  'bip': (2, 2, 2),
  'bip_t2': (2, 0, 8),
  'bip_t8': (2, 1, 9),
  'bip_t14': (2, 3, 10),
  'bip_lag': (2, 0, 7),
  'midpoint': (3, 3, 3),
  'midpoint_t1': (3, 1, 14),
  'midpoint_lag': (3, 0, 11),
  'quantile': (4, 0, 4),
  'quantile_histogram': (4, 1, 12),
  'unbalanced': (5, 1, 5),
  'sinkhorn': (6, 2, 6),
  'threshold': (6, 0, 13),
}
_FILLS = ('full', 'none', 'left', 'right', 'top', 'bottom')
CMAP = matplotlib.colormaps['cividis']  # light is much, also in greyscale
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


def subplots(height: float, *shape: int, **options: Any) -> tuple[Figure, Any]:
  """Makes a figure as wide as all, so many inches high, and its axes."""
  figure = Figure((WIDTH, height), layout='constrained')
  return figure, figure.subplots(*shape, **options)


def styles(runs: Mapping[str, Results]) -> dict[str, dict[str, Any]]:
  """Returns the look of each run's line, by the label of the run.

  Color, line and marker are those of the run's method, whichever runs there
  are. Several runs of a method have differently filled markers.
  """
  looks, drawn = {}, Counter()
  for label, run in runs.items():
    look = method_style(run.method)
    before = drawn[look['color'], look['marker']]
    drawn[look['color'], look['marker']] += 1
    looks[label] = look | {
      # matplotlib leaves _names out of legends.
      'label': f' {label}' if label.startswith('_') else label,
      'fillstyle': _FILLS[before % len(_FILLS)],
    }
  return looks


def method_style(method: str) -> dict[str, Any]:
  """Returns the look of a method's line: colour, line and marker."""
  number = zlib.crc32(method.encode())  # Of methods that are not in the table.
  color, line, marker = _METHODS.get(
    method.partition('(')[0], (number, number >> 8, number >> 16)
  )
  return {
    'color': COLORS[color % len(COLORS)],
    'linestyle': LINES[line % len(LINES)],
    'linewidth': 1.2,
    'marker': MARKERS[marker % len(MARKERS)],
    'markersize': 5,
    'markevery': 0.2,  # of the diagonal
  }


def log_axis(axes: Axes, values: Sequence[float], which: str = 'y') -> None:
  """Makes an axis logarithmic, with a 0 where some values are 0."""
  positive = [value for value in values if value > _ROUNDING]
  axis = getattr(axes, f'{which}axis')
  set_scale = getattr(axes, f'set_{which}scale')
  ticks = {'base': 10, 'subs': (1, 2, 5)}
  if not positive or len(positive) < len(values):
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
  steps = edges(by_step.index.to_numpy())
  experts = np.arange(by_step.shape[1] + 1) - 0.5
  # As pixels: a thousand steps of 256 experts would be a huge SVG.
  look = {'cmap': CMAP, 'rasterized': True} | limits
  mesh = axes.pcolormesh(steps, experts, by_step.to_numpy().T, **look)
  axes.invert_yaxis()
  axes.set_ylabel('expert')
  axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
  return mesh


def edges(centres: np.ndarray) -> np.ndarray:
  """Borders of cells half way between centres; a lone cell has width 1."""
  if len(centres) == 1:
    return centres[0] + np.array([-0.5, 0.5])
  around = np.pad(centres, 1, 'reflect', reflect_type='odd')
  return (around[1:] + around[:-1]) / 2


def title(axes: Axes, text: str, size: str = 'medium') -> None:
  """Writes a title at the left of the axes, as it is."""
  axes.set_title(text, loc='left', fontsize=size, parse_math=False)


def heading(figure: Figure, text: str, **look: Any) -> None:
  """Writes a heading of the whole figure, as it is."""
  look = {'x': 0.02, 'ha': 'left', 'fontsize': 'medium'} | look
  figure.suptitle(text, parse_math=False, **look)


def grid(axes: Axes) -> None:
  """Draws a light grid behind the data, without a frame."""
  axes.grid(color='0.9')
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)


def legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
  """Puts the legend of the axes above the figure."""
  handles, labels = axes.get_legend_handles_labels()
  place = {'loc': 'outside upper center', 'ncols': min(len(labels), columns)}
  drawn = figure.legend(handles, labels, frameon=False, handlelength=4, **place)
  for text in drawn.get_texts():
    text.set_parse_math(False)


def line(axes: Axes, values: pd.Series, **style: Any) -> None:
  """Draws values by their index."""
  # matplotlib cannot spread markers over a line without a point.
  style |= {} if values.notna().any() else {'markevery': None}
  axes.plot(values, **style)


def balance(axes: Axes, run: Results, **style: Any) -> None:
  """Draws MaxVio by step: a line, and a band up to the worst layer."""
  worst = run.layer_max_violation.max(axis='columns')
  band(axes, run.max_violation, worst, **style)


def band(axes: Axes, mean: pd.Series, worst: pd.Series, **style: Any) -> None:
  """Draws a line by step, and a band from it up to the worst."""
  line(axes, mean, **style)
  axes.fill_between(
    mean.index, mean, worst, color=style['color'], alpha=0.2, linewidth=0
  )
