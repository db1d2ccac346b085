"""The figures of the report page."""

import base64
from collections.abc import Callable, Mapping
import io
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from moe_jax.analysis import figures
from moe_jax.analysis.expert_figures import (
  coactivation_figure,
  domain_figure,
  saturation_figure,
)
from moe_jax.analysis.frontier import frontier_figure
from moe_jax.analysis.run import Run
from moe_jax.analysis.table import by_method

_LONGEST_LABEL = 18  # characters: four fit side by side


class Picture(NamedTuple):
  """How a figure comes about, and what is said of it."""

  title: str
  draw: Callable[[Any], Figure]  # of runs by their names, or of a run
  caption: str
  each: bool = False  # whether there is one of every run


PICTURES = (
  Picture(
    'Balance over the steps',
    figures.max_violation_figure,
    'MaxVio: load of the fullest expert over the mean load, minus 1. The line '
    'is the mean over the layers, the band reaches up to the worst layer.',
  ),
  Picture(
    'Balance within sequences',
    figures.sequence_violation_figure,
    'MaxVio of the batch, as above, beside that of single sequences: the line '
    'is the mean over sequences and layers, the band reaches up to the worst '
    'one. A sequence has few tokens: chance alone makes its MaxVio higher.',
  ),
  Picture(
    'Load of each expert',
    figures.load_heatmap_figure,
    "Of each run's least balanced layer. Dark is idle, light is twice the mean "
    'or more. Right, where they were recorded, are the gates by which the '
    'experts are mixed.',
  ),
  Picture(
    'Loss',
    figures.loss_figure,
    'Left: cross-entropy of the training batches. Right: validation, with the '
    'q that training left.',
  ),
  Picture(
    'Balance against quality',
    lambda named: frontier_figure(by_method(named.values())),
    'A point is a run; left and low is better. AvgMaxVio is the mean of MaxVio '
    'over the steps.',
  ),
  Picture(
    'Prices',
    lambda run: figures.price_figure(run, layer=run.least_balanced_layer),
    "q of each expert after the steps that were recorded, in the run's least "
    'balanced layer.',
    each=True,
  ),
)


def _of_texts(texts: Mapping[str, str]) -> tuple[Picture, ...]:
  """Returns figures of where each run's checkpoints send texts."""
  if not texts:
    return ()
  whole = '\n'.join(texts.values())
  layer = "in the run's least balanced layer, with q frozen"

  def domains(run):
    routed = {name: run.route(text) for name, text in texts.items()}
    return domain_figure(routed, layer=run.least_balanced_layer)

  def coactivation(run):
    layer = run.least_balanced_layer
    return coactivation_figure(run.route(whole), layer=layer)

  return (
    Picture(
      'Router saturation',
      lambda run: saturation_figure(run, whole),
      'Share of the routes of earlier checkpoints that the last one has as '
      'well: 100 % once routes have settled.',
      each=True,
    ),
    Picture(
      'Domain specialization',
      domains,
      f"Share of each text's tokens that an expert gets, {layer}.",
      each=True,
    ),
    Picture(
      'Co-activation',
      coactivation,
      'How much more often than by chance, given the loads, two experts share '
      f'a token, {layer}.',
      each=True,
    ),
  )


def draw_all(
  named: Mapping[str, Run],
  texts: Mapping[str, str],
  tell: Callable[[str], None],
) -> list[dict[str, Any]]:
  """Draws all figures; returns what the page says of each.

  Args:
    named: runs by their names.
    texts: texts by their names, to be routed; there need not be any.
    tell: called with what is being done.

  Returns:
    Dicts with `title`, `caption`, and either `source`, `width` and `height` of
    an image, or the reason why it is `missing`.
  """
  drawn, together = [], _labelled(named)
  for picture in (*PICTURES, *_of_texts(texts)):
    tell(f'drawing {picture.title}')
    shown = {picture.title: together}
    if picture.each:
      shown = {f'{picture.title}: {name}': run for name, run in named.items()}
    drawn += [_draw(picture, of, title) for title, of in shown.items()]
  return drawn


def _draw(picture: Picture, of: Any, title: str) -> dict[str, Any]:
  shown = {'title': title, 'caption': picture.caption}
  try:
    figure = picture.draw(of)
  except (ValueError, FileNotFoundError) as error:  # A run lacks what it needs.
    return shown | {'missing': str(error)}
  image = io.BytesIO()
  figure.savefig(image, dpi=200)
  encoded = base64.b64encode(image.getvalue()).decode()
  width, height = figure.get_size_inches()
  return shown | {
    'source': f'data:image/png;base64,{encoded}',
    'width': round(96 * width),
    'height': round(96 * height),
  }


def _labelled(named: Mapping[str, Run]) -> dict[str, Run]:
  """Names runs as legends have room for: by their methods, if these differ."""
  names = [run.method for run in named.values()]
  if len(set(names)) < len(names):
    names = list(named)
  labels = [
    name
    if len(name) <= _LONGEST_LABEL
    else f'{i}: …{name[3 - _LONGEST_LABEL :]}'
    for i, name in enumerate(names, start=1)
  ]
  return dict(zip(labels, named.values(), strict=True))
