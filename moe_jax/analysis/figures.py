"""Curves over the steps of runs; none of the functions touches pyplot.

A method has the same colour, line style and marker in all of them.
"""

from collections.abc import Iterable, Mapping
import datetime

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
import pandas as pd

from moe_jax.analysis import drawing
from moe_jax.analysis.columns import COMPILING_STEPS, VALIDATION
from moe_jax.analysis.results import Results

_PACE = 20  # of the last steps tell how fast a run is
_SEQUENCES = 'router/sequence_violation'
_NAMED = 3  # experts of the highest, and of the lowest prices
_FULLEST = 2.0  # load over mean load at the top of the colours


def _check_begun(runs: Iterable[Results]) -> None:
  for run in runs:
    if run.metrics.empty:
      raise ValueError(f'{run}: no step is completed yet')


def max_violation_figure(runs: Mapping[str, Results]) -> Figure:
  """Draws MaxVio against step, a line a method, the first step included.

  The line is the mean over layers, the band reaches up to the worst layer of
  the step. The axis is logarithmic; where MaxVio is 0 somewhere, it is linear
  below the smallest positive value, so that 0 is on it.

  Args:
    runs: a run of each method, by the method's name.
  """
  _check_begun(runs.values())
  figure, axes = drawing.subplots(4.5)
  for label, style in drawing.styles(runs).items():
    drawing.balance(axes, runs[label], **style)
  means = pd.concat([run.max_violation for run in runs.values()])
  drawing.log_axis(axes, means.dropna())
  label = 'MaxVio (fullest expert / mean - 1)'
  axes.set(xlabel='optimizer step', ylabel=label)
  drawing.title(axes, 'line: mean over layers; band: up to the worst layer')
  drawing.grid(axes)
  drawing.legend(figure, axes)
  return figure


def sequence_violation_figure(runs: Mapping[str, Results]) -> Figure:
  """Draws MaxVio within sequences beside that of the batch, a line a method.

  Left as in `max_violation_figure`. Right, the line is the mean over sequences
  and layers, the band reaches up to the worst sequence and layer of the step.
  Loads that are even over the batch need not be so within any sequence; a
  sequence has few tokens, so that chance alone makes its MaxVio higher.

  Args:
    runs: a run of each method, by the method's name.

  Raises:
    ValueError: a run has no step, or recorded nothing of its sequences.
  """
  _check_begun(runs.values())
  for run in runs.values():
    if _SEQUENCES not in run.metrics:
      raise ValueError(f'{run}: has no {_SEQUENCES}; older runs recorded none')
  figure, (batch, sequences) = drawing.subplots(4.0, 1, 2, sharey=True)
  drawn = []
  for label, style in drawing.styles(runs).items():
    run = runs[label]
    mean = run.metrics[_SEQUENCES]
    drawing.balance(batch, run, **style)
    worst = run.metrics['router/worst_sequence_violation']
    drawing.band(sequences, mean, worst, **style)
    drawn += [run.max_violation, mean]
  drawing.log_axis(batch, pd.concat(drawn).dropna())
  batch.set_ylabel('MaxVio (fullest expert / mean - 1)')
  drawing.title(batch, 'of the batch, up to the worst layer')
  drawing.title(sequences, 'of a sequence, up to the worst one')
  for axes in (batch, sequences):
    axes.set_xlabel('optimizer step')
    drawing.grid(axes)
  drawing.legend(figure, batch)
  return figure


def load_heatmap_figure(
  runs: Mapping[str, Results], *, layer: int | None = None
) -> Figure:
  """Draws the load of each expert over the steps, a row of panels a method.

  Perfect balance has the colour in the middle, all loads of twice the mean or
  more that of the top. Where all runs recorded them, the gates by which the
  experts were mixed are beside the loads, likewise.

  Args:
    runs: a run of each method, by the method's name.
    layer: which layer; None takes each method's layer of worst AvgMaxVio.

  Raises:
    ValueError: a run has no loads of that layer.
  """
  _check_begun(runs.values())
  gates = all('router/gates/layer_00' in run.metrics for run in runs.values())
  height = 0.6 + 1.9 * len(runs)
  shape = {'nrows': len(runs), 'ncols': 1 + gates, 'squeeze': False}
  figure, panels = drawing.subplots(height, sharex=True, **shape)
  for row, (method, run) in zip(panels, runs.items(), strict=True):
    chosen, why = layer, ''
    if chosen is None:
      chosen, why = run.least_balanced_layer, ' (its least balanced)'
    for axes, of_layer in zip(row, (run.loads, run.gates), strict=False):
      values = of_layer(chosen)
      values = values.div(values.mean(axis='columns'), axis='index')
      image = drawing.heat_map(axes, values, vmin=0.0, vmax=_FULLEST)
    size = 'medium' if gates else 'large'
    drawing.title(row[0], f'{method}, layer {chosen}{why}', size)
    for axes in row[1:]:
      drawing.title(axes, 'its gates', size)
      axes.set_ylabel('')
  for axes in panels[-1]:
    axes.set_xlabel('optimizer step')
  what = 'load, gates / their mean' if gates else 'load / mean load'
  label = f'{what} (1: balanced)'
  figure.colorbar(image, ax=panels, label=label, extend='max', aspect=30)
  return figure


def price_figure(run: Results, *, layer: int) -> Figure:
  """Draws the price q of each expert over the steps, as lines and as colours.

  The three experts of highest and of lowest price in the last record stand out
  from the others' thin lines; the title names them, from the outermost inwards.
  Below, each expert has a row of colours.

  Args:
    run: one that recorded prices.
    layer: which MoE layer.

  Raises:
    ValueError: the run has no prices of that layer.
  """
  prices = run.prices(layer)
  figure, (lines, colors) = drawing.subplots(6.5, 2, 1, sharex=True)
  order = prices.iloc[-1].sort_values(kind='stable').index
  low, high = order[:_NAMED], order[_NAMED:][-_NAMED:][::-1]
  # Hundreds of lines over thousands of steps would be a huge SVG.
  others = prices.drop(columns=[*low, *high])
  lines.plot(others, color='0.7', linewidth=0.6, rasterized=True)
  for experts, color, style in (
    (high, drawing.COLORS[0], '-'),
    (low, drawing.COLORS[6], '--'),
  ):
    lines.plot(prices[experts], style, color=color, linewidth=1.2)
  lines.set_ylabel('price q (units of scores)')
  above, below = (', '.join(map(str, experts)) for experts in (high, low))
  drawing.title(
    lines,
    f'{run.method}, layer {layer}; at the end highest (solid): {above}; '
    f'lowest (dashed): {below}',
  )
  drawing.grid(lines)
  image = drawing.heat_map(colors, prices)
  colors.set_xlabel('optimizer step')
  figure.colorbar(image, ax=colors, label='price q', aspect=15)
  return figure


def loss_figure(runs: Mapping[str, Results]) -> Figure:
  """Draws training loss and validation bits per byte against tokens.

  Validation is with q frozen. Where the runs know their validation set's
  unigram entropy, a level line shows it.

  Args:
    runs: a run of each method, by the method's name.
  """
  _check_begun(runs.values())
  figure, (train, validation) = drawing.subplots(4.0, 1, 2, sharex=True)
  unigram = None
  for label, style in drawing.styles(runs).items():
    run = runs[label]
    metrics = run.metrics.set_index(run.tokens)
    drawing.line(train, metrics['train/loss'], **style)
    bits = metrics.get(f'eval/{VALIDATION}/bits_per_byte')
    if bits is not None:
      drawing.line(validation, bits.dropna(), **style)
    unigram = run.facts.get('unigram_bits_per_byte', unigram)
  if unigram is not None:
    validation.axhline(unigram, color='0.4', linewidth=1)
    place = {'transform': validation.get_yaxis_transform(), 'ha': 'right'}
    validation.text(
      0.99, unigram, 'unigram entropy', va='bottom', color='0.3', **place
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


def progress_figure(run: Results) -> Figure:
  """Draws how a run is getting on: loss, MaxVio and speed, with the time left.

  The time left is that of the remaining steps at the median pace of the last
  ones; evaluations and checkpoints come on top. Open a new `Run` to see more of
  one that is under way.

  Raises:
    ValueError: no step is completed.
  """
  _check_begun([run])
  metrics = run.metrics
  figure, (loss, violation, speed) = drawing.subplots(6.0, 3, 1, sharex=True)
  style = {'color': drawing.method_style(run.method)['color'], 'linewidth': 1.2}
  loss.plot(metrics['train/loss'], **style)
  loss.set_ylabel('training loss\n[nats/token]')
  drawing.balance(violation, run, **style)
  drawing.log_axis(violation, run.max_violation.dropna())
  violation.set_ylabel('MaxVio, mean to\nworst layer')
  speed.plot(_steady(metrics['time/tokens_per_second']), **style)
  speed.set(xlabel='optimizer step', ylabel='speed\n[tokens/s]')
  speed.set(xlim=(0, run.config['steps']), ylim=(0, None))
  speed.yaxis.set_major_formatter(EngFormatter(sep=' '))
  for axes in (loss, violation, speed):
    drawing.grid(axes)
  figure.align_ylabels()
  step, steps = metrics.index[-1], run.config['steps']
  seconds = _steady(metrics['time/step_seconds']).tail(_PACE).median()
  left = datetime.timedelta(seconds=round((steps - step) * seconds))
  drawing.heading(
    figure,
    f'{run.method}: step {step:,} of {steps:,} ({step / steps:.0%}), '
    + (f'about {left} left' if step < steps else 'done'),
    fontsize='large',
  )
  return figure


def _steady(values: pd.Series) -> pd.Series:
  """Leaves out the steps that compile, if there are others."""
  return values[COMPILING_STEPS:] if len(values) > COMPILING_STEPS else values
