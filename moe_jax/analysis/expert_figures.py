"""What the experts of a layer do: prices, margins, who is like whom."""

from collections.abc import Mapping

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import numpy as np

from moe_jax import nn
from moe_jax.analysis import drawing, expert_statistics
from moe_jax.analysis.checkpoint import Checkpoint
from moe_jax.analysis.routed_text import RoutedText
from moe_jax.analysis.run import Run

_RATIO = 4.0  # of observed to expected pairs, where the colours end


def cutoff_figure(routed: RoutedText, *, layer: int) -> Figure:
  """Draws the scores that were chosen and those that were not, by expert.

  Experts stand in the order of their prices. A thick bar is the middle half of
  an expert's scores, a thin one 5 to 95 % of them, white is the median. There
  is no bar where an expert has no such tokens. A token chooses by score -
  price, against other experts: the two bars may overlap.

  Raises:
    ValueError: there is no such layer.
  """
  table = expert_statistics.score_quantiles(routed, layer=layer)
  table = table.sort_values(('price', ''), kind='stable')
  figure, axes = drawing.subplots(4.5)
  place = np.arange(len(table))
  width = 0.8 * 72 * (drawing.WIDTH - 1) / len(table)  # points, of an expert
  thick = min(width * 0.4, 7.0)
  for name, label, color, shift in (
    ('others', 'scores not chosen', drawing.COLORS[1], 0.2),
    ('chosen', 'scores chosen', drawing.COLORS[0], -0.2),
  ):
    _bars(axes, place + shift, table[name].to_numpy().T, thick, color, label)
  ends = (place - 0.45, place + 0.45)
  axes.hlines(table['price'], *ends, 'black', linewidth=1.8, label='price q')
  drawing.title(axes, f'layer {layer}')
  axes.set(xlabel='expert, by price', ylabel='score, price')
  axes.set_xlim(-0.7, len(table) - 0.3)
  _name_experts(axes, table.index.to_numpy(), 'x')
  drawing.grid(axes)
  axes.grid(visible=False, axis='x')
  drawing.legend(figure, axes)
  return figure


def margin_figure(routed: RoutedText) -> Figure:
  """Draws how decided the choices are: margins over tokens, layer by layer.

  A token's margin is its k-th largest score - q minus the next. While no price
  moves by more than half of it, the token's choice stays. Left: the share of
  tokens whose margin is below a value. Right: thick the middle half of the
  margins, thin 5 to 95 % of them, white the median.

  Raises:
    ValueError: every token goes to all experts.
  """
  margins = np.sort(routed.margins, axis=1)
  layers, tokens = margins.shape
  figure, (shares, bars) = drawing.subplots(4.0, 1, 2, width_ratios=(3, 2))
  colors = drawing.CMAP(np.linspace(0, 0.9, layers))
  # More points than one can see would be a huge SVG.
  points = np.unique(np.linspace(0, tokens - 1, 1000).astype(int))
  shares.set_prop_cycle(color=colors)
  below = (points + 1) / tokens
  shares.step(margins[:, points].T, below, where='post', linewidth=1.2)
  at = np.arange(layers)
  quantiles = np.quantile(margins, expert_statistics.QUANTILES, axis=1)
  _bars(bars, at, quantiles, min(9.0, 150 / layers), colors, lying=True)
  bars.set(ylim=(layers - 0.5, -0.5), ylabel='layer')
  _name_experts(bars, at, 'y')
  drawing.title(shares, 'colours as on the right')
  shares.set(ylim=(0, 1), ylabel='tokens with a smaller margin')
  shares.yaxis.set_major_formatter('{x:.0%}')
  positive = margins[margins > 0]
  for axes in (shares, bars):
    if len(positive):  # A margin of 0, a tie, is left of the axis.
      axes.set_xscale('log')
      axes.set_xlim(np.quantile(positive, 0.002), 1.3 * positive.max())
    axes.set_xlabel('margin (units of scores)')
    drawing.grid(axes)
  return figure


def similarity_figure(checkpoint: Checkpoint, *, layer: int) -> Figure:
  """Draws how alike experts are: cosines of router columns and of weights.

  The router's columns say which tokens an expert is for; the weights, gate, up
  and down in one vector, what it does with them. Weights of another order of
  the hidden units would be the same function: a small cosine of weights does
  not say that experts differ. Both panels have the experts in one order, by
  clustering of the router's columns. All parameters are read.

  Raises:
    ValueError: there is no such layer.
  """
  weights = nn.moe_layers(checkpoint.params)
  router_LxDxE = weights['router']
  expert_statistics.check_layer(layer, len(router_LxDxE))
  router_DxE = np.asarray(router_LxDxE[layer])
  parts = [np.asarray(weights[name][layer]) for name in ('gate', 'up', 'down')]
  by_router = expert_statistics.cosine_similarity(router_DxE.T)
  by_weights = expert_statistics.cosine_similarity(
    np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
  )
  order = expert_statistics.cluster_order(by_router)
  figure, panels = drawing.subplots(4.6, 1, 2)
  for axes, similarity, title in (
    (panels[0], by_router, "columns of the router's matrix"),
    (panels[1], by_weights, 'weights of the experts'),
  ):
    similarity = np.where(np.eye(len(order)), np.nan, similarity)
    image = _matrix(axes, similarity, order, names=32)
    drawing.title(axes, title)
    label = 'cosine similarity'
    figure.colorbar(image, ax=axes, location='bottom', label=label, aspect=30)
  drawing.heading(figure, f'step {checkpoint.step}, layer {layer}')
  return figure


def coactivation_figure(
  routed: RoutedText, *, layer: int, minimum: float = 5.0
) -> Figure:
  """Draws how much more often than by chance two experts share a token.

  By chance is the null model of `expert_statistics.coactivation`: the loads as
  they are, else nothing. Experts are ordered by clustering.

  Args:
    routed: the text.
    layer: which MoE layer.
    minimum: pairs of experts that are expected to share fewer tokens are left
      blank: their ratio would be noise.

  Raises:
    ValueError: there is no such layer, a token goes to one expert only, or the
      text is too short for any pair.
  """
  observed, expected = expert_statistics.coactivation(routed, layer=layer)
  shown = (expected >= minimum) & ~np.eye(len(observed), dtype=bool)
  if not shown.any():
    most = np.where(np.eye(len(expected)), 0.0, expected).max()
    raise ValueError(
      f'minimum={minimum}: no two experts are expected to share so many of the '
      f'{len(routed.ids)} tokens, at most {most:.2g}; take a longer text'
    )
  ratio = np.full(observed.shape, np.nan)
  ratio[shown] = observed[shown] / expected[shown]
  # A logarithm has no colour for pairs that are never seen together.
  clipped = np.clip(ratio, 1 / _RATIO, _RATIO)
  order = expert_statistics.cluster_order(np.log(clipped))
  figure = Figure((6.0, 5.6), layout='constrained')
  axes = figure.subplots()
  image = _matrix(axes, clipped, order, norm=LogNorm(1 / _RATIO, _RATIO))
  hatched = f'hatched: fewer than {minimum:g} tokens expected'
  drawing.title(axes, f'layer {layer} ({hatched})')
  label = 'tokens shared / expected by chance'
  bar = figure.colorbar(image, ax=axes, label=label, extend='both', aspect=30)
  bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=['1/4', '1/2', '1', '2', '4'])
  bar.ax.minorticks_off()
  return figure


def saturation_figure(run: Run, text: str) -> Figure:
  """Draws when routes settle, a line a layer; see `Run.saturation`.

  Raises:
    ValueError: there are no two checkpoints, or the text is empty.
  """
  table = run.saturation(text)
  model = run.restore().config.model
  figure, axes = drawing.subplots(4.0)
  layers = table.shape[1]
  for layer in table:
    color = drawing.CMAP(0.9 * layer / max(1, layers - 1))
    look = {'marker': drawing.MARKERS[layer % len(drawing.MARKERS)]}
    look |= {'color': color, 'markersize': 4, 'linewidth': 1.2}
    named = layer % max(1, layers // 8) == 0  # 61 would not fit.
    label = f'layer {layer}' if named else None
    axes.plot(table[layer], label=label, **look)
  chance = model.experts_per_token / model.experts
  axes.axhline(chance, color='0.4', linewidth=1, linestyle=':', label='chance')
  share = f'routes shared with step {run.checkpoints[-1]}'
  axes.set(xlabel='optimizer step', ylabel=share, ylim=(0, 1))
  axes.yaxis.set_major_formatter('{x:.0%}')
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  drawing.grid(axes)
  drawing.legend(figure, axes)
  return figure


def domain_figure(domains: Mapping[str, RoutedText], *, layer: int) -> Figure:
  """Draws the share of each domain's tokens that an expert gets.

  A row a domain, a column an expert; see `expert_statistics.domain_shares`. The
  colour in the middle is the even share, the top is twice that or more.

  Args:
    domains: a text of each, routed by one checkpoint.
    layer: which MoE layer.

  Raises:
    ValueError: there is no domain, or no such layer.
  """
  table = expert_statistics.domain_shares(domains, layer=layer).T
  experts = table.shape[1]
  even = table.sum(axis='columns').mean() / experts
  figure, axes = drawing.subplots(1.2 + 0.35 * len(table))
  look = {'cmap': drawing.CMAP, 'vmin': 0.0, 'vmax': 2 * even}
  image = axes.imshow(table, aspect='auto', interpolation='nearest', **look)
  axes.set_yticks(range(len(table)), labels=table.index, parse_math=False)
  _name_experts(axes, np.arange(experts), 'x')
  axes.set_xlabel('expert')
  drawing.title(axes, f'layer {layer} (the middle colour: {even:.0%}, even)')
  label = 'share of tokens'
  bar = figure.colorbar(image, ax=axes, label=label, extend='max')
  bar.ax.yaxis.set_major_formatter('{x:.0%}')
  return figure


def _matrix(axes, values, order, names=64, **colors):
  """Draws [E, E] in an order of the experts; NaN is left blank."""
  colors |= {'cmap': drawing.CMAP, 'interpolation': 'nearest'}
  image = axes.imshow(values[np.ix_(order, order)], **colors)
  # White alone would look like the lightest colour, in greyscale.
  axes.patch.set(hatch='xxxx', edgecolor='0.8')
  for which in 'xy':
    _name_experts(axes, order, which, names)
  axes.set(xlabel='expert', ylabel='expert')
  return image


def _name_experts(axes, experts, which, names=64):
  """Puts the numbers of experts at 0, 1, ...; of some, if they are too many."""
  places = range(0, len(experts), -(-len(experts) // names))
  crowded = len(places) > 20
  getattr(axes, f'{which}axis').set_ticks(
    places,
    labels=[str(experts[place]) for place in places],
    fontsize=5 if len(places) > 40 else 6 if crowded else 8,
    rotation=90 if crowded and which == 'x' else 0,
  )


def _bars(axes, at, quantiles, thick, color, label='', lying=False):
  """Draws thin 5 to 95 %, thick the middle half, white the median."""
  low, first, median, third, high = quantiles
  lines = axes.hlines if lying else axes.vlines
  lines(at, low, high, color=color, linewidth=thick / 4)
  lines(at, first, third, color=color, linewidth=thick, label=label)
  dot = {'color': 'white', 'mew': 0, 'ms': thick * (0.5 if thick > 4 else 0.8)}
  axes.plot(*((median, at) if lying else (at, median)), 'o', **dot)
