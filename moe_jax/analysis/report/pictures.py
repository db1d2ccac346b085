"""The figures of the report page."""

import base64
from collections.abc import Callable, Mapping
import io
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from moe_jax.analysis import figures
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
    'Load of each expert',
    figures.load_heatmap_figure,
    "Of each run's least balanced layer. Dark is idle, light is twice the mean "
    'load or more.',
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


def draw_all(
  named: Mapping[str, Run], tell: Callable[[str], None]
) -> list[dict[str, Any]]:
  """Draws all figures; returns what the page says of each.

  Args:
    named: runs by their names.
    tell: called with what is being done.

  Returns:
    Dicts with `title`, `caption`, and either `source`, `width` and `height` of
    an image, or the reason why it is `missing`.
  """
  drawn, together = [], _labelled(named)
  for picture in PICTURES:
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
  except ValueError as error:  # It needs what one of the runs has not.
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
