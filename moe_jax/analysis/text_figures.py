"""Which tokens go where: the experts upon the text, the tokens by expert."""

from collections.abc import Sequence

from matplotlib import colormaps, font_manager
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
import numpy as np

from moe_jax.analysis import drawing, expert_statistics
from moe_jax.analysis.routed_text import RoutedText

_MONOSPACE = 'DejaVu Sans Mono'  # comes with matplotlib
_CHARACTER = 0.602  # width of one of its characters by the size of the type
_TYPE, _SMALL = 9.0, 5.5  # points
_NUMBERS_A_LINE = 4
_EXPERTS_AT_MOST = 64
_VISIBLE = {' ': '·', '\n': '↵', '\t': '→', '\r': '←'}
_COLORS = colormaps['Set3']  # light enough for black type, also in greyscale


def text_figure(
  routed: RoutedText, *, layer: int, start: int = 0, count: int = 200
) -> Figure:
  """Draws a text with the experts that its tokens went to.

  A token stands on the colour of its best expert; beneath are the numbers of
  all that it chose, best first. There are 12 colours: the numbers decide. A
  space is shown as ·, a new line as ↵, a tab as →, what the type has no
  letter for as �; tokens of over 40 characters are cut.

  Args:
    routed: the text.
    layer: which MoE layer.
    start: the first token to draw.
    count: tokens to draw, 1 to 1000; the title says which part that is.

  Raises:
    ValueError: there is no such layer or token, or `count` is out of its range.
  """
  expert_statistics.check_layer(layer, len(routed.q))
  if not 0 <= start < len(routed.tokens):
    raise ValueError(f'start={start}: must be 0 to {len(routed.tokens) - 1}')
  if not 1 <= count <= 1000:
    raise ValueError(f'count={count}: must be from 1 to 1000')
  part = slice(start, start + count)
  tokens = [_cut(visible(token), 40) for token in routed.tokens[part]]
  experts = routed.experts[layer, part]
  numbers = [_numbers(row[row >= 0]) for row in experts]
  columns = int(drawing.WIDTH * 72 / (_CHARACTER * _TYPE)) - 2
  # Pixels make small type up to a tenth wider.
  widths = [
    max(len(token), 1.1 * (max(map(len, lines)) + 1) * _SMALL / _TYPE) + 0.5
    for token, lines in zip(tokens, numbers, strict=True)
  ]
  places = wrap(widths, [token.endswith('↵') for token in tokens], columns)
  lines = max(map(len, numbers))
  height = 1.5 * _TYPE + 1.25 * _SMALL * lines  # points, of a row
  body = height * (places[-1][1] + 1)
  figure = Figure((drawing.WIDTH, (body + 24) / 72))
  axes = figure.add_axes((0, 0, 1, body / (body + 24)))
  axes.set(xlim=(-1, columns + 1), ylim=(body, 0))
  axes.set_axis_off()
  for token, row, below, width, (column, line) in zip(
    tokens, experts, numbers, widths, places, strict=True
  ):
    y, width = line * height, width - 0.15
    color = expert_color(row[0]) if row[0] >= 0 else 'white'
    axes.add_patch(Rectangle((column, y), width, 1.4 * _TYPE, facecolor=color))
    _write(axes, column + width / 2, y + 0.7 * _TYPE, token, _TYPE)
    for i, text in enumerate(below):
      down = 1.4 * _TYPE + (0.6 + 1.2 * i) * _SMALL
      _write(axes, column + width / 2, y + down, text, _SMALL)
  end = start + len(tokens)
  drawing.heading(
    figure,
    f'layer {layer}, tokens {start} to {end - 1} of {len(routed.tokens)}; '
    'colour: best expert; numbers: all chosen, best first',
    y=1 - 8 / (body + 24),
    fontsize='small',
  )
  return figure


def typical_tokens_figure(
  routed: RoutedText,
  *,
  layer: int,
  count: int = 6,
  experts: Sequence[int] | None = None,
) -> Figure:
  """Draws the most typical tokens of each expert, by lift, as a table.

  Beneath a token: how many times it is likelier at the expert than in the text,
  and how often it went there. See `expert_statistics.typical_tokens`.

  Args:
    routed: the text.
    layer: which MoE layer.
    count: tokens of an expert, 1 to 12.
    experts: which; None takes all, of more than 64 the 64 of highest load.

  Raises:
    ValueError: there is no such layer or expert, no expert has a typical token,
      or `count` is out of its range.
  """
  if not 1 <= count <= 12:
    raise ValueError(f'count={count}: must be from 1 to 12')
  table = expert_statistics.typical_tokens(routed, layer=layer, count=count)
  load_E = routed.load[layer]
  if experts is None:
    fullest = np.argsort(-load_E, kind='stable')[:_EXPERTS_AT_MOST]
    experts = sorted(fullest.tolist())
  unknown = [e for e in experts if not 0 <= e < len(load_E)]
  if unknown:
    raise ValueError(f'experts={unknown}: must be from 0 to {len(load_E) - 1}')
  table = table[table['expert'].isin(experts)]
  if table.empty:
    raise ValueError(
      f'no token of the {len(routed.tokens)} is typical of an expert; take a '
      'longer text'
    )
  figure, axes = drawing.subplots(0.32 * len(experts) + 0.7)
  axes.set(xlim=(-0.5, count - 0.5), ylim=(len(experts) - 0.5, -0.5))
  axes.set(xticks=[], ylabel='expert')
  axes.set_yticks(range(len(experts)), labels=map(str, experts))
  axes.tick_params(left=False)
  axes.spines[:].set_visible(False)
  norm = LogNorm(1.0, max(2.0, table['lift'].max()))
  for y, expert in enumerate(experts):
    of_expert = table[table['expert'] == expert]
    for x, row in enumerate(of_expert.itertuples()):
      grey = f'{0.97 - 0.3 * float(norm(row.lift)):.3f}'  # Bears black type.
      corner = (x - 0.48, y - 0.46)
      axes.add_patch(Rectangle(corner, 0.96, 0.92, facecolor=grey))
      _write(axes, x, y - 0.16, _cut(visible(row.token), 12), _TYPE)
      lift = f'{row.lift:.1f}x {row.times}'
      _write(axes, x, y + 0.27, lift, 0.78 * _TYPE)
  said = f'layer {layer}; beneath each token: lift, times it went to the expert'
  drawing.heading(figure, said)
  return figure


def visible(token: str) -> str:
  """Shows spaces and new lines, and � for what the type has no letter for."""
  font = font_manager.get_font(font_manager.findfont(_MONOSPACE))
  shown = (_VISIBLE.get(character, character) for character in token)
  return ''.join(c if font.get_char_index(ord(c)) else '\ufffd' for c in shown)


def wrap(
  widths: Sequence[float], ends_line: Sequence[bool], columns: float
) -> list[tuple[float, int]]:
  """Places cells one after another; returns each one's column and row.

  A new row begins behind a cell that ends its line and where one would not fit;
  a cell wider than a row has a row of its own.
  """
  places, column, row, ended = [], 0.0, 0, False
  for width, ends in zip(widths, ends_line, strict=True):
    if column and (ended or column + width > columns):
      column, row = 0.0, row + 1
    places.append((column, row))
    column, ended = column + width, ends
  return places


def expert_color(expert: int) -> tuple[float, float, float]:
  """A light colour; 12 experts in a row have different ones."""
  return _COLORS.colors[expert % _COLORS.N]


def _cut(text: str, length: int) -> str:
  return text if len(text) <= length else text[: length - 1] + '…'


def _numbers(experts_K: np.ndarray) -> list[str]:
  texts = [str(expert) for expert in experts_K]
  starts = range(0, len(texts), _NUMBERS_A_LINE)
  return [' '.join(texts[i : i + _NUMBERS_A_LINE]) for i in starts] or ['']


def _write(axes, x, y, text, size):
  centred = {'ha': 'center', 'va': 'center', 'parse_math': False}
  axes.text(x, y, text, size=size, family=_MONOSPACE, **centred)
