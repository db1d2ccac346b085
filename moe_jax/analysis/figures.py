"""Figures of runs, one function each; none touches pyplot or its state.

Methods differ in colour (Okabe and Ito's, for the colour-blind), in line style
and in marker, so that they stay apart in greyscale.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from collections.abc import Sized
import os
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from matplotlib.ticker import LogLocator
from matplotlib.ticker import MaxNLocator
from matplotlib.ticker import NullLocator
from matplotlib.ticker import SymmetricalLogLocator

from moe_jax.analysis.run import Run
from moe_jax.analysis.tables import VALIDATION

# Neighbours in this order also differ in lightness.
_COLORS = (
  '#0072B2',
  '#E69F00',
  '#000000',
  '#CC79A7',
  '#009E73',
  '#56B4E9',
  '#D55E00',
)
_LINES = ('-', '--', '-.', ':')
_MARKERS = ('o', 's', '^', 'D', 'v', 'X', 'P', '*')
_ROUNDING = 1e-6  # a smaller MaxVio is float32's way to say 0
_WIDTH = 8.0  # inches: type stays readable when a README shows it 800 px wide


def max_violation_figure(runs: Mapping[str, Run]) -> Figure:
  """Draws MaxVio against step, a line a method, the first step included.

  The line is the mean over layers, the band reaches up to the worst layer of
  the step. The axis is logarithmic; where MaxVio is 0 somewhere, it is linear
  below the smallest positive value, so that 0 is on it.

  Args:
    runs: a run of each method, by the method's name.
  """
  figure = Figure((_WIDTH, 4.5), layout='constrained')
  axes = figure.subplots()
  values = []
  for (method, run), style in zip(runs.items(), _styles(runs), strict=True):
    mean = run.metrics['router/max_violation']
    worst = run.layer_max_violation.max(axis='columns')
    axes.plot(mean.index, mean, label=method, **style, **_marks(mean))
    axes.fill_between(
      mean.index, mean, worst, color=style['color'], alpha=0.2, linewidth=0
    )
    values += mean.dropna().tolist()
  _log_axis(axes, values)
  axes.set_xlabel('optimizer step')
  axes.set_ylabel('MaxVio (fullest expert / mean - 1)')
  axes.set_title(
    'line: mean over layers; band: up to the worst layer of the step',
    loc='left',
    fontsize='medium',
  )
  _grid(axes)
  _legend(figure, axes)
  return figure


def load_heatmap_figure(
  runs: Mapping[str, Run], *, layer: int | None = None, maximum: float = 2.0
) -> Figure:
  """Draws the load of each expert over the steps, a panel a method.

  Args:
    runs: a run of each method, by the method's name.
    layer: which layer; None takes each method's layer of worst AvgMaxVio.
    maximum: load over mean load at the top of the colour scale; 2 puts perfect
      balance in its middle. Larger loads have the colour of the top.

  Raises:
    ValueError: a run has no loads of that layer.
  """
  figure = Figure((_WIDTH, 0.6 + 1.9 * len(runs)), layout='constrained')
  panels = figure.subplots(len(runs), squeeze=False, sharex=True)[:, 0]
  for axes, (method, run) in zip(panels, runs.items(), strict=True):
    chosen, why = layer, ''
    if chosen is None:
      worst = run.layer_max_violation.mean().idxmax()
      chosen, why = int(worst.removeprefix('layer_')), ' (its least balanced)'
    loads = run.loads(chosen)
    steps, experts = loads.index, loads.shape[1]
    image = axes.imshow(
      loads.div(loads.mean(axis='columns'), axis='index').T,
      aspect='auto',
      cmap='cividis',
      vmin=0.0,
      vmax=maximum,
      extent=(steps[0] - 0.5, steps[-1] + 0.5, experts - 0.5, -0.5),
    )
    axes.set_title(f'{method}, layer {chosen}{why}', loc='left')
    axes.set_ylabel('expert')
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
  panels[-1].set_xlabel('optimizer step')
  figure.colorbar(
    image,
    ax=panels,
    label='load / mean load (1: balanced)',
    extend='max',
    aspect=30,
  )
  return figure


def loss_figure(runs: Mapping[str, Run]) -> Figure:
  """Draws training loss and validation bits per byte against tokens.

  Validation is with q frozen. Where the runs know their validation set's
  unigram entropy, a level line shows it.

  Args:
    runs: a run of each method, by the method's name.
  """
  figure = Figure((_WIDTH, 4.0), layout='constrained')
  train, validation = figure.subplots(1, 2, sharex=True)
  unigram = None
  for (method, run), style in zip(runs.items(), _styles(runs), strict=True):
    metrics = run.metrics.set_index(run.metrics.index * run.tokens_per_step)
    loss = metrics['train/loss']
    train.plot(loss.index, loss, label=method, **style, **_marks(loss))
    key = f'eval/{VALIDATION}/bits_per_byte'
    if key in metrics:
      bits = metrics[key].dropna()
      validation.plot(bits.index, bits, **style)
    unigram = run.facts.get('unigram_bits_per_byte', unigram)
  if unigram is not None:
    validation.axhline(unigram, color='0.4', linewidth=1)
    validation.annotate(
      'unigram entropy',
      (1, unigram),
      xycoords=('axes fraction', 'data'),
      xytext=(-4, 4),
      textcoords='offset points',
      ha='right',
      color='0.3',
    )
  train.set_ylabel('training loss [nats/token]')
  validation.set_ylabel('validation, q frozen [bits/byte]')
  for axes in (train, validation):
    axes.set_xlabel('training tokens')
    axes.xaxis.set_major_formatter(EngFormatter(sep=' '))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _grid(axes)
  _legend(figure, train)
  return figure


def save_figure(
  figure: Figure, path_without_suffix: str | os.PathLike[str]
) -> None:
  """Writes a figure as .png (150 dpi) and .svg; the same figure, same bytes."""
  path = os.fspath(path_without_suffix)
  figure.savefig(f'{path}.png', dpi=150)
  with matplotlib.rc_context({'svg.hashsalt': 'moe_jax'}):
    figure.savefig(f'{path}.svg', metadata={'Date': None})


def _styles(methods: Iterable[str]) -> list[dict[str, Any]]:
  """Line properties of each method."""
  return [
    {
      'color': _COLORS[i % len(_COLORS)],
      'linestyle': _LINES[i % len(_LINES)],
      'marker': _MARKERS[i % len(_MARKERS)],
      'markersize': 5,
      'linewidth': 1.2,
    }
    for i, _ in enumerate(methods)
  ]


def _marks(values: Sized) -> dict[str, int]:
  """Some ten markers along a line, the first of them on its first value."""
  return {'markevery': max(1, len(values) // 10)}


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
  """Makes the y axis logarithmic, with a 0 where some values are 0."""
  positive = [value for value in values if value > _ROUNDING]
  ticks = {'base': 10, 'subs': (1, 2, 5)}
  if len(positive) < len(values):
    threshold = min(positive, default=1.0)
    axes.set_yscale('symlog', linthresh=threshold)
    axes.set_ylim(bottom=0.0)
    locator = SymmetricalLogLocator(linthresh=threshold, **ticks)
  else:
    axes.set_yscale('log')
    locator = LogLocator(**ticks)
  axes.yaxis.set_major_locator(locator)
  axes.yaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_major_formatter('{x:g}')


def _grid(axes: Axes) -> None:
  axes.grid(color='0.9')
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)


def _legend(figure: Figure, axes: Axes) -> None:
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(
    handles,
    labels,
    loc='outside upper center',
    ncols=min(len(labels), 4),
    frameon=False,
    handlelength=4,
  )
