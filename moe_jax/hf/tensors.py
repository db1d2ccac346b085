"""Where each tensor of a public model is in ours: one table, read both ways.

Theirs are matrices [out, in], one for each layer and expert; ours are [in, out]
and stacked along a leading axis of layers, those of experts along a second one.
Heads of most public models turn entry j with entry j + R/2, ours with its
neighbour: so rows of queries and keys are put into another order, which is
exact.

Shape letters: L layers of a stack, E experts, W head width, R entries of a head
that turn.
"""

from collections.abc import Callable, Iterator, Mapping
import itertools
from typing import Any, NamedTuple

import numpy as np

from moe_jax.hf.architectures import Architecture
from moe_jax.nn import DecoderConfig

Index = tuple[slice, ...]


class Row(NamedTuple):
  """One row of the table.

  Attributes:
    theirs: name, with {layer} and {expert} where there are several.
    ours: path of the parameter.
    layers: numbers of the layers that ours is stacked of; None if it is not.
    experts: number of experts along its second axis; 0 if there is none.
    transposed: whether theirs is [out, in].
    order: for each row of ours, before it is transposed, the row of theirs;
      None where they are the same.
  """

  theirs: str
  ours: tuple[str, ...]
  layers: range | None = None
  experts: int = 0
  transposed: bool = True
  order: np.ndarray | None = None

  def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yields the place of each of its tensors along ours' leading axes."""
    axes = []
    if self.layers is not None:
      axes.append(range(len(self.layers)))
    if self.experts:
      axes.append(range(self.experts))
    for place in itertools.product(*axes):
      yield place, self.name(place)

  def name(self, place: tuple[int, ...]) -> str:
    """Returns the name of the tensor at a place."""
    layer = self.layers[place[0]] if self.layers is not None else None
    return self.theirs.format(layer=layer, expert=place[-1] if place else None)

  def to_ours(self, values: np.ndarray) -> np.ndarray:
    """Turns a tensor of theirs into its part of ours."""
    if self.order is not None:
      values = values[self.order]
    return values.T if self.transposed else values

  def to_theirs(self, values: np.ndarray) -> np.ndarray:
    """Turns a part of ours into theirs: the inverse, exactly."""
    values = values.T if self.transposed else values
    if self.order is None:
      return values
    ordered = np.empty_like(values)
    ordered[self.order] = values
    return ordered

  def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a tensor of theirs, given that of ours."""
    leading = (self.layers is not None) + bool(self.experts)
    shape = ours[leading:]
    return shape[::-1] if self.transposed else shape

  def read(
    self,
    index: Index,
    shape: tuple[int, ...],
    read: Callable[[str], np.ndarray],
    room: Callable[[tuple[int, ...]], np.ndarray],
  ) -> np.ndarray:
    """Returns a part of ours, made of the tensors that it needs alone.

    Args:
      index: of the part.
      shape: of all of ours.
      read: returns a tensor of theirs, by its name.
      room: makes the array to fill, float32.
    """
    places = [range(*i.indices(n)) for i, n in zip(index, shape, strict=True)]
    values = room(tuple(map(len, places)))
    leading = (self.layers is not None) + bool(self.experts)
    for at in itertools.product(*map(range, values.shape[:leading])):
      place = tuple(places[axis][i] for axis, i in enumerate(at))
      values[at] = self.to_ours(read(self.name(place)))[index[leading:]]
    return values


def table(
  architecture: Architecture, config: DecoderConfig, public: Mapping[str, Any]
) -> list[Row]:
  """Returns the table of a model: all of its tensors, but the corrections.

  Args:
    architecture: its type.
    config: its options.
    public: its config.json.
  """
  rows = [
    Row(
      'model.embed_tokens.weight', ('embedding', 'embedding'), transposed=False
    ),
    Row('model.norm.weight', ('norm', 'scale'), transposed=False),
  ]
  if not config.tied_embeddings:
    rows.append(
      Row('lm_head.weight', ('output', 'embedding'), transposed=False)
    )
  dense, layers = config.dense_layers, config.layers
  stacks = [('moe_blocks', range(dense, layers), _moe(architecture, config))]
  if dense:
    stacks.append(('dense_blocks', range(dense), _swiglu('mlp', ())))
  interleaved = 'qk_rope_head_dim' in public and public.get(
    'rope_interleave', True
  )
  attention = (_latent if config.latent_size else _grouped)(config, interleaved)
  for stack, numbers, feed_forward in stacks:
    for row in [*_norms(), *attention, *feed_forward]:
      rows.append(
        row._replace(
          theirs=f'model.layers.{{layer}}.{row.theirs}',
          ours=(stack, *row.ours),
          layers=numbers,
        )
      )
  return rows


def leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple, Any]:
  """Returns the leaves of nested dicts by their paths."""
  if not isinstance(tree, Mapping):
    return {path: tree}
  found = {}
  for name, part in tree.items():
    found |= leaves(part, (*path, name))
  return found


def corrections(architecture: Architecture, config: DecoderConfig) -> list[str]:
  """Returns the names of the biases by which experts are chosen, by layer."""
  if not architecture.corrected:
    return []
  layers = range(config.dense_layers, config.layers)
  return [
    f'model.layers.{layer}.{architecture.moe}.gate.e_score_correction_bias'
    for layer in layers
  ]


def _norms() -> list[Row]:
  return [
    _vector('input_layernorm.weight', 'attention_norm', 'scale'),
    _vector('post_attention_layernorm.weight', 'feed_forward_norm', 'scale'),
  ]


def _vector(theirs: str, *ours: str, order: np.ndarray | None = None) -> Row:
  return Row(theirs, ours, transposed=False, order=order)


def _moe(architecture: Architecture, config: DecoderConfig) -> list[Row]:
  name = architecture.moe
  rows = [Row(f'{name}.gate.weight', ('feed_forward', 'router'))]
  ours = ('gate', 'up', 'down')
  for part, theirs in zip(ours, architecture.expert, strict=True):
    rows.append(
      Row(
        f'{name}.experts.{{expert}}.{theirs}.weight',
        ('feed_forward', part),
        experts=config.experts,
      )
    )
  if config.shared_experts:
    rows += _swiglu(f'{name}.shared_experts', ('shared',))
  return rows


def _swiglu(theirs: str, ours: tuple[str, ...]) -> list[Row]:
  return [
    Row(f'{theirs}.{part}_proj.weight', ('feed_forward', *ours, part, 'kernel'))
    for part in ('gate', 'up', 'down')
  ]


def _grouped(config: DecoderConfig, interleaved: bool) -> list[Row]:
  """Returns the rows of attention with heads of their own keys and values."""
  rows = []
  order = _turning_order(config, interleaved)
  heads = {'query': config.heads, 'key': config.kv_heads, 'value': 0, 'out': 0}
  for ours, theirs in zip(heads, 'qkvo', strict=True):
    rows_of = _of_heads(order, heads[ours])
    place = 'attention', ours
    rows.append(
      Row(f'self_attn.{theirs}_proj.weight', (*place, 'kernel'), order=rows_of)
    )
    biased = config.attention_bias
    if biased == 'all' or (biased == 'inputs' and ours != 'out'):
      rows.append(
        _vector(f'self_attn.{theirs}_proj.bias', *place, 'bias', order=rows_of)
      )
    if heads[ours] and config.query_key_norm != 'none':
      count = heads[ours] if config.query_key_norm == 'whole' else 1
      rows.append(
        _vector(
          f'self_attn.{theirs}_norm.weight',
          *('attention', f'{ours}_norm', 'scale'),
          order=_of_heads(order, count),
        )
      )
  return rows


def _latent(config: DecoderConfig, interleaved: bool) -> list[Row]:
  """Returns the rows of latent attention."""
  width, rotary = config.head_width, config.rotary_size
  # Theirs have the entries that turn last.
  turning = _turning_order(config, interleaved)[:rotary]
  fixed = width - rotary
  query = _of_heads(np.append(fixed + turning, np.arange(fixed)), config.heads)
  latent = config.latent_size
  key = np.append(np.arange(latent), latent + turning)
  rows = [
    ('kv_a_proj_with_mqa.weight', ('latent', 'kernel'), key),
    ('kv_b_proj.weight', ('key_value', 'kernel'), None),
    ('o_proj.weight', ('out', 'kernel'), None),
  ]
  vectors = [('kv_a_layernorm.weight', 'latent_norm')]
  if config.query_latent_size:
    rows.append(('q_a_proj.weight', ('query_latent', 'kernel'), None))
    vectors.append(('q_a_layernorm.weight', 'query_norm'))
  name = 'q_b_proj' if config.query_latent_size else 'q_proj'
  rows.append((f'{name}.weight', ('query', 'kernel'), query))
  return [
    Row(f'self_attn.{theirs}', ('attention', *ours), order=order)
    for theirs, ours, order in rows
  ] + [
    _vector(f'self_attn.{theirs}', 'attention', ours, 'scale')
    for theirs, ours in vectors
  ]


def _turning_order(config: DecoderConfig, interleaved: bool) -> np.ndarray:
  """Returns which entry of a head of theirs each one of ours is, int [W]."""
  width = config.head_width
  rotary = config.rotary_size or width
  order = np.arange(width)
  if not interleaved:
    # Ours 2j and 2j + 1 are theirs j and j + R/2.
    order[:rotary] = order[:rotary].reshape(2, -1).T.reshape(-1)
  return order


def _of_heads(order: np.ndarray, heads: int) -> np.ndarray | None:
  """Repeats the order of a head; 0 heads have none."""
  if not heads or np.array_equal(order, np.arange(len(order))):
    return None
  return (np.arange(heads)[:, None] * len(order) + order).reshape(-1)
