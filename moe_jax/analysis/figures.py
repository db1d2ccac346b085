"""Curves over the steps of runs; none of the functions touches pyplot.

Methods differ in colour (Okabe and Ito's, for the colour-blind), in line style
and in marker, so that they stay apart in greyscale.
"""

from collections.abc import Iterable
from collections.abc import Mapping
import datetime

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from matplotlib.ticker import MaxNLocator
import pandas as pd

from moe_jax.analysis import drawing
from moe_jax.analysis.run import Run
from moe_jax.analysis.tables import COMPILING_STEPS
from moe_jax.analysis.tables import VALIDATION

_BANDS = {(0.0, 1.0): '0.88', (0.05, 0.95): '0.78', (0.25, 0.75): '0.66'}
_LINES_AT_MOST = 32  # experts; of more, bands
_PACE_STEPS = 20  # the time left is at the median pace of so many


def _check_begun(runs: Iterable[Run]) -> None:
  for run in runs:
    if run.metrics.empty:
      raise ValueError(f'{run}: no step is completed yet')


def max_violation_figure(runs: Mapping[str, Run]) -> Figure:
  """Draws MaxVio against step, a line a method, the first step included.

  The line is the mean over layers, the band reaches up to the worst layer of
  the step. The axis is logarithmic; where MaxVio is 0 somewhere, it is linear
  below the smallest positive value, so that 0 is on it.

  Args:
    runs: a run of each method, by the method's name.
  """
  _check_begun(runs.values())
  figure = Figure((drawing.WIDTH, 4.5), layout='constrained')
  axes = figure.subplots()
  values = []
  for (method, run), style in zip(
    runs.items(), drawing.styles(runs), strict=True
  ):
    mean = run.metrics['router/max_violation']
    worst = run.layer_max_violation.max(axis='columns')
    axes.plot(mean.index, mean, label=method, **style, **drawing.marks(mean))
    axes.fill_between(
      mean.index, mean, worst, color=style['color'], alpha=0.2, linewidth=0
    )
    values += mean.dropna().tolist()
  drawing.log_axis(axes, values)
  axes.set_xlabel('optimizer step')
  axes.set_ylabel('MaxVio (fullest expert / mean - 1)')
  axes.set_title(
    'line: mean over layers; band: up to the worst layer of the step',
    loc='left',
    fontsize='medium',
  )
  drawing.grid(axes)
  drawing.legend(figure, axes)
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
  _check_begun(runs.values())
  figure = Figure((drawing.WIDTH, 0.6 + 1.9 * len(runs)), layout='constrained')
  panels = figure.subplots(len(runs), squeeze=False, sharex=True)[:, 0]
  for axes, (method, run) in zip(panels, runs.items(), strict=True):
    chosen, why = layer, ''
    if chosen is None:
      chosen, why = run.least_balanced_layer, ' (its least balanced)'
    loads = run.loads(chosen)
    loads = loads.div(loads.mean(axis='columns'), axis='index')
    image = drawing.heat_map(axes, loads, vmin=0.0, vmax=maximum)
    axes.set_title(f'{method}, layer {chosen}{why}', loc='left')
  panels[-1].set_xlabel('optimizer step')
  figure.colorbar(
    image,
    ax=panels,
    label='load / mean load (1: balanced)',
    extend='max',
    aspect=30,
  )
  return figure


def price_figure(run: Run, *, layer: int, named: int = 3) -> Figure:
  """Draws the price q of each expert over the steps, as lines and as colours.

  The experts of highest and of lowest price in the last record are named.
  Those between are thin lines; of more than 32 experts, bands between
  percentiles over the experts. Above the colours, each expert has a row.

  Args:
    run: one that recorded prices.
    layer: which MoE layer.
    named: experts that are named at each end.

  Raises:
    ValueError: the run has no prices of that layer, or `named` is below 1.
  """
  if named < 1:
    raise ValueError(f'named={named}: must be at least 1')
  prices = run.prices(layer)
  figure = Figure((drawing.WIDTH, 6.5), layout='constrained')
  lines, colours = figure.subplots(2, 1, sharex=True)
  _price_lines(lines, prices, named)
  lines.set_ylabel('price q (units of scores)')
  lines.set_title(
    f'{run.method}, layer {layer}; experts of the highest and the '
    'lowest prices, by number',
    loc='left',
    fontsize='medium',
    parse_math=False,
  )
  drawing.grid(lines)
  image = drawing.heat_map(colours, prices)
  colours.set_xlabel('optimizer step')
  figure.colorbar(image, ax=colours, label='price q', aspect=15)
  return figure


def _price_lines(axes: Axes, prices: pd.DataFrame, named: int) -> None:
  order = prices.iloc[-1].sort_values(kind='stable').index
  low, high = order[:named], order[named:][-named:]
  if len(order) > _LINES_AT_MOST:
    for (low_q, high_q), grey in _BANDS.items():
      axes.fill_between(
        prices.index,
        prices.quantile(low_q, axis='columns'),
        prices.quantile(high_q, axis='columns'),
        color=grey,
        linewidth=0,
        label=f'{low_q:.0%} to {high_q:.0%} of the experts',
      )
    axes.legend(loc='best', frameon=False, fontsize='small')
  else:
    axes.plot(prices[order[named:-named]], color='0.7', linewidth=0.8)
  for experts, color, style in (
    (high, drawing.COLORS[0], '-'),
    (low, drawing.COLORS[6], '--'),
  ):
    for expert in experts:
      axes.plot(
        prices[expert], style, color=color, linewidth=1.2, label=f'{expert}'
      )
  drawing.name_line_ends(axes)


def loss_figure(runs: Mapping[str, Run]) -> Figure:
  """Draws training loss and validation bits per byte against tokens.

  Validation is with q frozen. Where the runs know their validation set's
  unigram entropy, a level line shows it.

  Args:
    runs: a run of each method, by the method's name.
  """
  _check_begun(runs.values())
  figure = Figure((drawing.WIDTH, 4.0), layout='constrained')
  train, validation = figure.subplots(1, 2, sharex=True)
  unigram = None
  for (method, run), style in zip(
    runs.items(), drawing.styles(runs), strict=True
  ):
    metrics = run.metrics.set_index(run.metrics.index * run.tokens_per_step)
    loss = metrics['train/loss']
    train.plot(loss.index, loss, label=method, **style, **drawing.marks(loss))
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
    drawing.grid(axes)
  drawing.legend(figure, train)
  return figure


def progress_figure(run: Run) -> Figure:
  """Draws how a run is getting on: loss, MaxVio and speed, with the time left.

  The time left is that of the remaining steps at the median pace of the last
  ones; evaluations and checkpoints come on top. Open a new `Run` to see more of
  one that is going on.

  Raises:
    ValueError: no step is completed.
  """
  metrics = run.metrics
  if metrics.empty:
    raise ValueError(f'{run}: no step is completed yet')
  figure = Figure((drawing.WIDTH, 6.0), layout='constrained')
  loss, violation, speed = figure.subplots(3, 1, sharex=True)
  loss.plot(metrics['train/loss'], color=drawing.COLORS[0], linewidth=1.2)
  loss.set_ylabel('training loss\n[nats/token]')
  mean = metrics['router/max_violation']
  violation.plot(mean, color=drawing.COLORS[0], linewidth=1.2)
  violation.fill_between(
    mean.index,
    mean,
    run.layer_max_violation.max(axis='columns'),
    color=drawing.COLORS[0],
    alpha=0.2,
    linewidth=0,
  )
  drawing.log_axis(violation, mean.dropna())
  violation.set_ylabel('MaxVio, mean to\nworst layer')
  pace = metrics['time/tokens_per_second']
  if len(pace) > COMPILING_STEPS:
    pace = pace.iloc[COMPILING_STEPS:]
  speed.plot(pace, color=drawing.COLORS[0], linewidth=1.2)
  speed.set_ylim(bottom=0.0)
  speed.yaxis.set_major_formatter(EngFormatter(sep=' '))
  speed.set_ylabel('speed\n[tokens/s]')
  speed.set_xlabel('optimizer step')
  speed.set_xlim(0, run.config['steps'])
  for axes in (loss, violation, speed):
    drawing.grid(axes)
  figure.align_ylabels()
  figure.suptitle(
    _how_far(run), ha='left', x=0.02, fontsize='large', parse_math=False
  )
  return figure


def _how_far(run: Run) -> str:
  step, steps = int(run.metrics.index[-1]), run.config['steps']
  done = f'step {step:,} of {steps:,} ({step / steps:.0%})'
  title = f'{run.method}: {done}'
  if step >= steps:
    return f'{title}, done'
  seconds = run.metrics['time/step_seconds']
  if len(seconds) > COMPILING_STEPS:
    seconds = seconds.iloc[COMPILING_STEPS:]
  left = (steps - step) * seconds.tail(_PACE_STEPS).median()
  return f'{title}, about {datetime.timedelta(seconds=round(left))} left'
