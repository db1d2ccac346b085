"""Sizes and options of the model."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
  """Sizes and options of an MoE layer.

  Attributes:
    width: D, size of a token's vector.
    hidden: F, width of each expert.
    experts: E, routed experts.
    experts_per_token: K, of which each token takes that many.
    shared_experts: experts of width F that every token takes.
    scoring: how logits become scores, 'softmax' or 'sigmoid'.
    renormalize_gates: whether a token's gates are divided by their sum.
    router_z_loss: weight of mean(logsumexp(logits)^2), 0 for none.
    capacity_factor: room of each expert in training, in units of its even
      share; what does not fit is dropped. 0 is dropless; evaluation always is.
    round_to_capacity: whether training routes are rounded so that no expert of
      a shard of n tokens, padding included, gets more than ceil(n K / E), and
      no token is dropped.
    shards: equal parts of a batch that fill buffers of their own, round by
      themselves and, where the balancer's scope is 'shard', solve by
      themselves; 0 is one for each device of the mesh. Must be a multiple of
      the devices, and their very number if several shards of a device would
      have to solve by themselves.
    ragged_exchange: whether rows without capacity travel by ragged all-to-all.
      False pads them, as CPUs do anyway; some slices cannot do without: v5e of
      16 x 16, if a whole side lies along the mesh axis `expert`. Evaluation is
      without capacity, so there it matters in any case.
    dtype: compute dtype of experts, 'float32' or 'bfloat16'. Parameters and
      the router are float32.
  """

  width: int = 512
  hidden: int = 1408
  experts: int = 16
  experts_per_token: int = 4
  shared_experts: int = 1
  scoring: str = 'softmax'
  renormalize_gates: bool = True
  router_z_loss: float = 0.0
  capacity_factor: float = 0.0
  round_to_capacity: bool = False
  shards: int = 0
  ragged_exchange: bool = True
  dtype: str = 'float32'

  def __post_init__(self):
    for name in ('width', 'hidden', 'experts', 'experts_per_token'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'model.{name}={getattr(self, name)}: must be 1 or more'
        )
    if self.experts_per_token > self.experts:
      raise ValueError(
        f'model.experts_per_token={self.experts_per_token}: must be at most '
        f'model.experts={self.experts}'
      )
    for name in (
      'shared_experts',
      'router_z_loss',
      'capacity_factor',
      'shards',
    ):
      if getattr(self, name) < 0:
        raise ValueError(
          f'model.{name}={getattr(self, name)}: must be 0 or more'
        )
    if self.round_to_capacity and 0 < self.capacity_factor < 1:
      raise ValueError(
        f'capacity_factor={self.capacity_factor}: must be 0 or at least 1 with '
        'model.round_to_capacity, which drops nothing'
      )
    for name, known in (
      ('scoring', ('softmax', 'sigmoid')),
      ('dtype', ('float32', 'bfloat16')),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f'model.{name}={getattr(self, name)!r}: must be one of {known}'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(MoEConfig):
  """Sizes and options of the language model, besides those of its MoE layers.

  The defaults are the MiniMind of arXiv 2502.15451 with 16 experts.

  Attributes:
    vocabulary: V, tokens known.
    layers: L, of which the first `dense_layers` have no experts.
    dense_layers: leading layers with one dense SwiGLU.
    dense_hidden: its width.
    heads: query heads; must divide `width` into even head widths.
    kv_heads: key/value heads; must divide `heads`.
    rope_theta: base of the rotary frequencies.
    norm_epsilon: added to the mean square.
    remat: whether the backward pass recomputes each layer from its input.
  """

  vocabulary: int = 6400
  layers: int = 8
  dense_layers: int = 0
  dense_hidden: int = 1408
  heads: int = 8
  kv_heads: int = 2
  rope_theta: float = 1e6
  norm_epsilon: float = 1e-5
  remat: bool = False

  def __post_init__(self):
    super().__post_init__()
    for name in ('vocabulary', 'layers', 'dense_hidden', 'heads', 'kv_heads'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'model.{name}={getattr(self, name)}: must be 1 or more'
        )
    if not 0 <= self.dense_layers < self.layers:
      raise ValueError(
        f'model.dense_layers={self.dense_layers}: must be 0 or more and less '
        f'than model.layers={self.layers}, which leaves an MoE layer'
      )
    if self.width % (2 * self.heads):
      raise ValueError(
        f'model.heads={self.heads}: must divide model.width={self.width} into '
        'heads of even width'
      )
    if self.heads % self.kv_heads:
      raise ValueError(
        f'model.kv_heads={self.kv_heads}: must divide model.heads={self.heads}'
      )
    for name in ('rope_theta', 'norm_epsilon'):
      if not getattr(self, name) > 0:
        raise ValueError(
          f'model.{name}={getattr(self, name)}: must be greater than 0'
        )
