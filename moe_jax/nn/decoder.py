"""A decoder-only language model: MiniMind's, unless options say otherwise.

Shape letters: B batch, S sequence, D model, V vocabulary, L layers.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax import routing
from moe_jax.nn.attention import Attention, KeyValueCache
from moe_jax.nn.config import DecoderConfig
from moe_jax.nn.feed_forward import SwiGLU, rms_norm
from moe_jax.nn.latent_attention import LatentAttention
from moe_jax.nn.layout import is_expert
from moe_jax.nn.moe import MoE, RouterState
from moe_jax.nn.router import MoEOutput
from moe_jax.parallel import mesh as meshes


class Block(nnx.Module):
  """x + attention(norm(x)), then + feed_forward(norm(x)).

  Args:
    config: sizes and options.
    feed_forward: makes an `MoE` or a dense layer, from `rngs`.
    mesh: as of `MoE`.
    rngs: for the initial weights.
  """

  def __init__(
    self,
    config: DecoderConfig,
    feed_forward: Callable[..., nnx.Module],
    *,
    mesh: Mesh | None = None,
    rngs: nnx.Rngs,
  ):
    self.attention_norm = rms_norm(config, rngs=rngs)
    kind = LatentAttention if config.latent_size else Attention
    self.attention = kind(config, mesh=mesh, rngs=rngs)
    self.feed_forward_norm = rms_norm(config, rngs=rngs)
    self.feed_forward = feed_forward(rngs=rngs)

  def __call__(
    self,
    x_BxSxD: jax.Array,
    mask_BxS: jax.Array | None,
    cache: KeyValueCache | None = None,
    experts_BxSxK: jax.Array | None = None,
    *,
    positions_BxS: jax.Array | None = None,
    train: bool,
  ) -> tuple[jax.Array, MoEOutput | None, KeyValueCache | None]:
    y_BxSxD, cache = self.attention(
      self.attention_norm(x_BxSxD), cache, positions_BxS
    )
    x_BxSxD += y_BxSxD
    y_BxSxD = self.feed_forward_norm(x_BxSxD)
    if isinstance(self.feed_forward, MoE):
      y_BxSxD, output = self.feed_forward(
        y_BxSxD, mask_BxS, experts_BxSxK, train=train
      )
    else:
      y_BxSxD, output = self.feed_forward(y_BxSxD), None
    return x_BxSxD + y_BxSxD, output, cache


class DecoderCache(NamedTuple):
  """What attention remembers of a text, stacked along a leading layer axis."""

  dense: KeyValueCache | None
  moe: KeyValueCache


def _stack(config, layers: int, feed_forward, mesh, rngs: nnx.Rngs) -> Block:
  """Builds `layers` blocks as one whose variables have a leading axis L."""

  @nnx.split_rngs(splits=layers)
  @nnx.vmap(in_axes=0, out_axes=0)
  def stack(rngs):
    return Block(config, feed_forward, mesh=mesh, rngs=rngs)

  return stack(rngs)


class Decoder(nnx.Module):
  """A causal language model: embedding, blocks, output layer.

  Args:
    config: sizes and options.
    balancer: the rule for q of every MoE layer.
    vocabulary: V, number of tokens known.
    capacity_factor: as of `MoE`.
    mesh: as of `MoE`.
    fsdp: whether parameters are split over `data` and gathered layer by layer,
      forward and again backward (ZeRO-3); needs `mesh` and `config.remat`.
    rngs: for the initial weights.

  Raises:
    ValueError: `fsdp` without `mesh` or `config.remat`.
  """

  def __init__(
    self,
    config: DecoderConfig,
    balancer: routing.Balancer,
    *,
    vocabulary: int,
    capacity_factor: float = 0.0,
    mesh: Mesh | None = None,
    fsdp: bool = False,
    rngs: nnx.Rngs,
  ):
    if fsdp and (mesh is None or not config.remat):
      raise ValueError(
        'mesh.fsdp=True: needs a mesh and model.remat=True, or the gathered '
        'weights of all layers would be kept for the backward pass'
      )
    self.config, self.mesh, self.fsdp = config, mesh, fsdp
    # Also the weight of MiniMind's output layer: U(+-1/sqrt(D)).
    embed = functools.partial(
      nnx.Embed,
      vocabulary,
      config.width,
      dtype=jnp.dtype(config.dtype),
      embedding_init=nnx.initializers.variance_scaling(
        1 / 3, 'fan_out', 'uniform'
      ),
      rngs=rngs,
    )
    self.embedding = embed()
    dense = functools.partial(
      SwiGLU, config.width, config.dense_hidden, dtype=config.dtype
    )
    moe = functools.partial(
      MoE,
      config,
      balancer,
      capacity_factor=capacity_factor,
      mesh=mesh,
      fsdp=fsdp,
    )
    dense_layers = config.dense_layers
    self.dense_blocks = (
      _stack(config, dense_layers, dense, mesh, rngs) if dense_layers else None
    )
    self.moe_blocks = _stack(
      config, config.layers - dense_layers, moe, mesh, rngs
    )
    self.norm = rms_norm(config, rngs=rngs)
    self.output = None if config.tied_embeddings else embed()

  def __call__(
    self,
    tokens_BxS: jax.Array,
    mask_BxS: jax.Array | None = None,
    experts_LxBxSxK: jax.Array | None = None,
    *,
    positions_BxS: jax.Array | None = None,
    train: bool,
  ) -> tuple[jax.Array, MoEOutput]:
    """Predicts each next token.

    Args:
      tokens_BxS: int32 [batch, sequence].
      mask_BxS: bool; False for padding, which no router sees. Padding must
        come last in its sequence: attention is causal, not masked.
      experts_LxBxSxK: int32, experts of each MoE layer to take instead of
        choosing, see `MoE`.
      positions_BxS: int32, of each token in its document, from 0; a token
        attends to its own document alone. None: a sequence is one document.
      train: whether the routers' q may move.

    Returns:
      Logits, float32 [B, S, V], and what each MoE layer did, stacked along a
      leading layer axis.
    """
    logits_BxSxV, outputs, _ = self._predict(
      tokens_BxS,
      mask_BxS,
      experts_LxBxSxK,
      positions_BxS,
      DecoderCache(None, None),
      train,
    )
    return logits_BxSxV, outputs

  def extend(
    self, tokens_BxS: jax.Array, cache: DecoderCache
  ) -> tuple[jax.Array, MoEOutput, DecoderCache]:
    """Predicts what follows each of the next tokens of a text; q is frozen.

    Args:
      tokens_BxS: int32 [batch, sequence], after those of the cache.
      cache: of `init_cache` or of the call before. There must be room: tokens
        beyond it overwrite the last ones.

    Returns:
      As `__call__`, of these tokens; and the cache with them.

    Raises:
      ValueError: experts choose tokens, which takes all of them at once.
    """
    if self.config.selection == 'choose_by_experts':
      raise ValueError(
        'model.selection=choose_by_experts: cannot decode token by token, as '
        'experts choose among all tokens of a batch'
      )
    return self._predict(tokens_BxS, None, None, None, cache, train=False)

  def init_cache(self, batch: int, room: int) -> DecoderCache:
    """Returns an empty cache for texts of up to `room` tokens."""
    config = self.config

    def empty(layers):
      key, value = (
        jnp.zeros((layers, batch, room, *shape), config.dtype)
        for shape in config.cache_shapes
      )
      return KeyValueCache(key, value, jnp.zeros(layers, jnp.int32))

    dense = config.dense_layers
    return DecoderCache(
      empty(dense) if dense else None, empty(config.layers - dense)
    )

  def _predict(
    self, tokens_BxS, mask_BxS, experts_LxBxSxK, positions_BxS, cache, train
  ):
    if not tokens_BxS.size:
      raise ValueError(
        f'tokens_BxS: shape {tokens_BxS.shape} has no tokens; B and S must be '
        '1 or more'
      )
    table_VxD = self._table(self.embedding)
    x_BxSxD = jnp.take(table_VxD, tokens_BxS, axis=0)
    if self.dense_blocks is not None:
      x_BxSxD, _, dense = self._apply(
        self.dense_blocks,
        x_BxSxD,
        mask_BxS,
        None,
        positions_BxS,
        cache.dense,
        train,
      )
      cache = cache._replace(dense=dense)
    x_BxSxD, outputs, moe = self._apply(
      self.moe_blocks,
      x_BxSxD,
      mask_BxS,
      experts_LxBxSxK,
      positions_BxS,
      cache.moe,
      train,
    )
    x_BxSxD = self.norm(x_BxSxD)
    if self.output is not None:
      table_VxD = self._table(self.output)
    logits_BxSxV = jnp.einsum(
      'bsd,vd->bsv', x_BxSxD, table_VxD, preferred_element_type=jnp.float32
    )
    return logits_BxSxV, outputs, cache._replace(moe=moe)

  def _table(self, embed: nnx.Embed) -> jax.Array:
    """Returns a vector of each token, [V, D], for use."""
    return self._gather(embed.embedding)[...].astype(self.config.dtype)

  def _gather(self, params):
    """Gathers parameters for their use, but for experts: `MoE` does those."""
    if not self.fsdp:
      return params

    def gather(path, variable):
      if is_expert(path):
        return variable
      spec = meshes.dense_spec(variable.shape, self.mesh, fsdp=True)
      value = meshes.gather_dense(variable[...], self.mesh, spec)
      return variable.replace(value)

    return jax.tree.map_with_path(
      gather, params, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )

  def _apply(
    self, blocks, x_BxSxD, mask_BxS, experts, positions_BxS, cache, train
  ):
    """Scans over stacked blocks; this is where their router state changes."""
    graphdef, params, routers = nnx.split(blocks, nnx.Param, RouterState)

    def layer(x_BxSxD, variables):
      params, routers, experts_BxSxK, cache = variables
      params = self._gather(params)
      block = nnx.merge(graphdef, params, routers, copy=True)
      x_BxSxD, output, cache = block(
        x_BxSxD,
        mask_BxS,
        cache,
        experts_BxSxK,
        positions_BxS=positions_BxS,
        train=train,
      )
      return x_BxSxD, (nnx.state(block, RouterState), output, cache)

    if self.config.remat:
      policies = jax.checkpoint_policies
      policy = policies.save_only_these_names('q', 'experts')
      if self.config.remat_policy != 'nothing_saveable':
        more = getattr(policies, self.config.remat_policy)
        policy = policies.save_from_both_policies(policy, more)
      layer = jax.checkpoint(layer, policy=policy)
    x_BxSxD, (routers, outputs, cache) = lax.scan(
      layer, x_BxSxD, (params, routers, experts, cache)
    )
    if train:
      nnx.update(blocks, routers)
    return x_BxSxD, outputs, cache
