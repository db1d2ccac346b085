"""Sizes and options of the model."""

import dataclasses
import math

from moe_jax import routing
from moe_jax.nn.selections import SELECTIONS
from moe_jax.options import check_options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
  """Sizes and options of an MoE layer."""

  width: int = option(512, least=1, most=2**17)
  """D, size of a token's vector."""
  hidden: int = option(1408, least=1, most=2**20)
  """F, width of each expert."""
  experts: int = option(16, least=1, most=2**14)
  """E, number of routed experts."""
  experts_per_token: int = option(4, least=1, most=2**14)
  """K, number of them that each token takes."""
  shared_experts: int = option(1, least=0, most=2**10)
  """Number of experts of width F that every token takes."""
  scoring: str = option('softmax', among=tuple(routing.SCORINGS))
  """Function from the router's logits to scores."""
  priced: str = option('scores', among=('scores', 'logits'))
  """What the prices of experts are subtracted from. Gates are always scores."""
  selection: str = option('choose', among=tuple(SELECTIONS), change='named')
  """How a token's experts follow from scores and prices: the best K, every
  expert above its price, each expert's best tokens of a shard (sees all of
  them; a reference), or even loads of each shard at random (the ceiling of
  benchmarks)."""
  most_experts_per_token: int = option(0, least=0, most=2**14, change='named')
  """Most experts of a token where tokens take different numbers, as with the
  selections 'choose_above' and 'choose_by_experts'; 0 is twice
  `experts_per_token`, or all experts if they are fewer."""
  expert_groups: int = option(1, least=1, most=2**14, change='named')
  """Equal, consecutive groups of experts, of which a token takes the best."""
  groups_per_token: int = option(1, least=1, most=2**14, change='named')
  """Number of groups whose experts compete for a token."""
  renormalize_gates: bool = option(True)
  """Whether a token's gates are divided by their sum."""
  gate_scale: float = option(1.0, above=0, most=1e6)
  """Factor of the gates, after any division by their sum."""
  round_to_capacity: bool = option(False, change='named')
  """Whether training routes are rounded so that no expert of a shard of n
  tokens, padding included, gets more than ceil(n K / E), and no token is
  dropped."""
  shards: int = option(0, least=0, most=2**20, change='named')
  """Equal parts of a batch that fill buffers of their own, round by themselves
  and, where each shard has prices of its own, solve by themselves; 0 is one for
  each device of the mesh. Must be a multiple of the devices, and their very
  number if several shards of a device would have to solve by themselves."""
  dtype: str = option('float32', among=('float32', 'bfloat16'), change='named')
  """Compute dtype of all but the router, which is float32, as parameters
  are."""

  def __post_init__(self):
    check_options(self, 'model.')
    if self.experts_per_token > self.experts:
      raise ValueError(
        f'model.experts_per_token={self.experts_per_token}: must be at most '
        f'model.experts={self.experts}'
      )
    if self.most_experts_per_token and not (
      self.experts_per_token <= self.most_experts_per_token <= self.experts
    ):
      raise ValueError(
        f'model.most_experts_per_token={self.most_experts_per_token}: must be '
        f'0, or lie between model.experts_per_token={self.experts_per_token} '
        f'and model.experts={self.experts}'
      )
    try:
      routing.check_groups(
        self.experts_per_token,
        self.experts,
        self.expert_groups,
        self.groups_per_token,
      )
    except ValueError as error:
      name = f'{error}'.partition('=')[0]
      prefix = 'model.expert_' if name == 'groups' else 'model.'
      raise ValueError(f'{prefix}{error}') from error
    for option_name, holds in (
      ('round_to_capacity=True', self.round_to_capacity),
      (f'expert_groups={self.expert_groups}', self.expert_groups > 1),
    ):
      if holds and self.selection != 'choose':
        raise ValueError(
          f'model.{option_name}: goes with model.selection=choose only, not '
          f'{self.selection}'
        )

  @property
  def slots_per_token(self) -> int:
    """Experts for which a token has slots: K, or the most where K varies."""
    if self.selection not in ('choose_above', 'choose_by_experts'):
      return self.experts_per_token
    most = self.most_experts_per_token or 2 * self.experts_per_token
    return min(most, self.experts)

  def check_capacity_factor(self, factor: float) -> None:
    """Raises ValueError where experts cannot have such room in training."""
    if not factor >= 0:
      raise ValueError(f'capacity_factor={factor}: must be 0 or more')
    if self.round_to_capacity and 0 < factor < 1:
      raise ValueError(
        f'capacity_factor={factor}: must be 0 or at least 1 with '
        'model.round_to_capacity, which drops nothing'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(MoEConfig):
  """Sizes and options of the language model, besides those of its MoE layers.

  The defaults are the MiniMind of arXiv 2502.15451 with 16 experts.
  """

  layers: int = option(8, least=1, most=2**10)
  """L, of which the first `dense_layers` have no experts."""
  dense_layers: int = option(0, least=0, most=2**10)
  """Number of leading layers with one dense SwiGLU."""
  dense_hidden: int = option(1408, least=1, most=2**20)
  """Width of that SwiGLU."""
  heads: int = option(8, least=1, most=2**12)
  """Number of query heads."""
  kv_heads: int = option(2, least=1, most=2**12)
  """Number of key/value heads; must divide `heads`."""
  head_size: int = option(0, least=0, most=2**16)
  """Width of a head, an even number; 0 is `width` / `heads`."""
  attention_bias: str = option('none', among=('none', 'inputs', 'all'))
  """Which projections of attention add a bias: those to queries, keys and
  values, or the one from the heads as well."""
  query_key_norm: str = option('none', among=('none', 'head', 'whole'))
  """Whether queries and keys are normalized before they turn: each head by
  itself (Qwen3), or all heads of a token together (OLMoE)."""
  query_key_value_clip: float = option(0.0, least=0, most=1e30)
  """Greatest size of an entry of queries, keys and values; 0.0 is any."""
  rope_theta: float = option(1e6, above=0, most=1e30)
  """Base of the rotary frequencies."""
  rope_factor: float = option(1.0, least=1.0, most=1e6)
  """Factor by which YaRN stretches the text that rotary positions tell apart;
  1.0 is none."""
  rope_length: int = option(4096, least=1, most=2**30)
  """Tokens of the text that they told apart before."""
  rope_fast: float = option(32.0, above=0, most=1e6)
  """YaRN keeps frequencies of at least so many turns over `rope_length`."""
  rope_slow: float = option(1.0, above=0, most=1e6)
  """It divides those of at most so many turns by `rope_factor`."""
  rope_magnitude: float = option(1.0, above=0, most=1e6)
  """Factor of the entries of queries and keys that turn."""
  rope_mscale: float = option(0.0, least=0, most=1e3)
  """Attention's scores are multiplied by the square of 1 + 0.1 `rope_mscale`
  ln(`rope_factor`), as DeepSeek does."""
  rotary_size: int = option(0, least=0, most=2**16)
  """Number of leading entries of a head that turn with the position, even; 0 is
  all of them."""
  latent_size: int = option(0, least=0, most=2**17)
  """Width of the latent vector of a token, of which all heads make their keys
  and values and which is all that a cache keeps, beside one key of width
  `rotary_size` (DeepSeek-V2's latent attention, MLA); 0 is grouped attention.
  `kv_heads` then means nothing."""
  query_latent_size: int = option(0, least=0, most=2**17)
  """Width of the latent vector that queries are made of in latent attention; 0
  makes them of the token itself."""
  value_size: int = option(0, least=0, most=2**16)
  """Width of each head's values in latent attention; 0 is that of a head."""
  norm_epsilon: float = option(1e-5, above=0, most=1.0)
  """Added to the mean square in normalization."""
  tied_embeddings: bool = option(True)
  """Whether the embedding is the matrix of the output layer as well."""
  remat: bool = option(False, change='named')
  """Whether the backward pass recomputes each layer from its input. Choices and
  q are kept, not recomputed. In float32 results stay the same, but for last
  bits where there is an auxiliary loss; in bfloat16 they may differ by its
  rounding, as XLA keeps float32 between the operations that it fuses, unless
  XLA_FLAGS has --xla_allow_excess_precision=false."""
  remat_policy: str = option(
    'nothing_saveable',
    among=(
      'nothing_saveable',
      'dots_with_no_batch_dims_saveable',
      'dots_saveable',
    ),
    change='named',
  )
  """What `remat` keeps beside choices and q, by `jax.checkpoint_policies`: the
  more is kept, the less is computed twice."""

  def __post_init__(self):
    super().__post_init__()
    if self.dense_layers >= self.layers:
      raise ValueError(
        f'model.dense_layers={self.dense_layers}: must be less '
        f'than model.layers={self.layers}, which leaves an MoE layer'
      )
    if self.head_size % 2:
      raise ValueError(f'model.head_size={self.head_size}: must be even')
    if not self.head_size and self.width % (2 * self.heads):
      raise ValueError(
        f'model.heads={self.heads}: must divide model.width={self.width} into '
        'heads of even width, or set model.head_size'
      )
    if self.heads % self.kv_heads:
      raise ValueError(
        f'model.kv_heads={self.kv_heads}: must divide model.heads={self.heads}'
      )
    if self.remat_policy != 'nothing_saveable' and not self.remat:
      raise ValueError(
        f'model.remat_policy={self.remat_policy}: needs model.remat=True, or '
        'all is kept anyway'
      )
    if self.rope_slow >= self.rope_fast:
      raise ValueError(
        f'model.rope_slow={self.rope_slow}: must be less than '
        f'model.rope_fast={self.rope_fast}'
      )
    if self.rope_factor > 1 and self.rope_theta <= 1:
      raise ValueError(
        f'model.rope_theta={self.rope_theta}: must be above 1 with '
        f'model.rope_factor={self.rope_factor}'
      )
    if self.rotary_size % 2 or self.rotary_size > self.head_width:
      raise ValueError(
        f'model.rotary_size={self.rotary_size}: must be even, and at most the '
        f'width of a head, {self.head_width}'
      )
    self._check_latent_attention()

  def _check_latent_attention(self) -> None:
    names = ('query_latent_size', 'value_size')
    if self.latent_size:
      names = ('attention_bias', 'query_key_norm', 'query_key_value_clip')
      if not 0 < self.rotary_size < self.head_width:
        raise ValueError(
          f'model.rotary_size={self.rotary_size}: must be between 0 and the '
          f'width of a head, {self.head_width}, in latent attention, as with '
          f'model.latent_size={self.latent_size}'
        )
    for name in names:
      value = getattr(self, name)
      if value not in (0, 'none'):
        where = 'without' if self.latent_size else 'in'
        raise ValueError(
          f'model.{name}={value}: works {where} latent attention only, but '
          f'model.latent_size={self.latent_size}'
        )

  @property
  def head_width(self) -> int:
    """W, width of each head."""
    return self.head_size or self.width // self.heads

  @property
  def attention_scale(self) -> float:
    """Factor of the products of queries and keys."""
    stretched = 1 + 0.1 * self.rope_mscale * math.log(self.rope_factor)
    return self.head_width**-0.5 * stretched**2

  @property
  def cache_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a cache keeps of a token: heads and width of `key` and `value`."""
    if self.latent_size:
      return (1, self.rotary_size), (1, self.latent_size)
    return ((self.kv_heads, self.head_width),) * 2

  @property
  def value_width(self) -> int:
    """Width of each head's values."""
    return self.value_size or self.head_width
