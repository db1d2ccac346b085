"""Where a `Decoder` keeps what: the only file that knows its parts by name.

Shape letters: L MoE layers, E experts.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.nn.config import DecoderConfig
from moe_jax.parallel import mesh as meshes


def is_stacked(part: str) -> bool:
  """Tells whether arrays of a part of the model have a leading layer axis.

  Args:
    part: first name on the path of a parameter.
  """
  return part in ('dense_blocks', 'moe_blocks')


def is_expert(path: tuple) -> bool:
  """Tells whether a weight has one matrix per expert.

  Args:
    path: of the parameter, whatever part of the model it starts at.
  """
  # The dense layers' parts of these names have a kernel below them.
  return bool(path) and path[-1].key in ('gate', 'up', 'down')


def moe_layers(tree: Mapping[str, Any]) -> Any:
  """Returns what parameters or router state hold of all MoE layers, stacked.

  Args:
    tree: nested dicts of a `Decoder`, or an `nnx.State`.

  Returns:
    A mapping: of parameters, it has `router` [L, D, E], `gate`, `up` and
    `down`.
  """
  return tree['moe_blocks']['feed_forward']


def prices(router: Mapping[str, Any]) -> Any:
  """Returns the price q of every expert of every MoE layer, float32 [L, E].

  Args:
    router: router state of a `Decoder`: an `nnx.State`, or nested dicts of
      arrays of jax or NumPy, as they are trained or as a checkpoint has them.
  """
  state = moe_layers(router)['state']
  if isinstance(state, nnx.Variable):
    state = state.get_value()
  return state['q'] if isinstance(state, Mapping) else state.q


def carry_prices(q_LxE: Any, router: dict[str, Any]) -> Any:
  """Starts routers from prices that they had elsewhere.

  Args:
    q_LxE: `prices` under another rule, or of an imported model.
    router: initial state of the routers.

  Returns:
    `router` with its prices, q and any other array of the state of q's shape,
    such as the pending ones, set to these.
  """

  def carry(leaf):
    same = (q_LxE.shape, q_LxE.dtype) == (leaf.shape, leaf.dtype)
    return jnp.copy(q_LxE) if same else leaf  # No array may be donated twice.

  layers = moe_layers(router)
  layers = layers | {'state': jax.tree.map(carry, layers['state'])}
  return router | {'moe_blocks': {'feed_forward': layers}}


def parameter_counts(
  config: DecoderConfig, params: Mapping[str, Any]
) -> tuple[int, int]:
  """Counts parameters: all, and those that one token's forward pass uses.

  An embedding is counted whole, as in the names of published models.
  """
  total, layers = _count(params), moe_layers(params)
  expert = _count([layers[name] for name in ('gate', 'up', 'down')])
  idle = config.experts - config.experts_per_token
  return total, total - expert // config.experts * idle


def _count(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def useful_flops(
  config: DecoderConfig, params: Mapping[str, Any], sequence: int
) -> float:
  """Counts a token's FLOPs forward and backward, without recomputation.

  6 for each parameter that it is multiplied with; and for each layer, head and
  token of its sequence 6 for each channel of keys, in scores, and of values, of
  which causal attention needs half.

  Args:
    config: of the decoder.
    params: the parameters, or what describes them.
    sequence: tokens of a sequence.

  References:
    Chowdhery et al., arXiv 2204.02311, appendix B, which counts all of 12.
  """
  _, active = parameter_counts(config, params)
  if not config.tied_embeddings:  # Of the embedding a token takes a row.
    active -= _count(params['embedding'])
  channels = config.heads * (config.head_width + config.value_width) / 2
  return 6.0 * (active + config.layers * sequence * channels)


def parameter_specs(params: nnx.State, mesh: Mesh, *, fsdp: bool) -> nnx.State:
  """Returns where each parameter of a `Decoder` is, in place of its value."""

  def specs(path, variable):
    stacked = is_stacked(path[0].key)
    rule = meshes.expert_spec if is_expert(path) else meshes.dense_spec
    spec = rule(variable.shape[stacked:], mesh, fsdp=fsdp)
    return variable.replace(P(*(None,) * stacked, *spec))

  return jax.tree.map_with_path(
    specs, params, is_leaf=lambda node: isinstance(node, nnx.Variable)
  )
