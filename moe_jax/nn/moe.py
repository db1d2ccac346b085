"""The Mixture-of-Experts layer: owns weights and router state."""

import dataclasses
import functools
import math
from typing import NamedTuple

from flax import nnx
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from moe_jax import routing
from moe_jax.nn.feed_forward import SwiGLU
from moe_jax.nn.feed_forward import linear_init
from moe_jax.parallel import dispatch


class RouterState(nnx.Variable):
  """Mutable state of a router: float32, never differentiated or optimised."""


class ExpertParam(nnx.Param):
  """A weight [..., E, in, out] with one matrix per expert."""


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
    shards: equal parts of a batch that round by themselves, and solve by
      themselves where the balancer's scope is 'shard'; must divide the batch.
      0 is one part for each device that a trainer splits the batch over, 1
      without a trainer.
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


class MoEOutput(NamedTuple):
  """What a layer tells beside its output.

  Attributes:
    loss: float32 scalar, the balancer's loss and the router z-loss.
    dropped: int32 scalar, (token, expert) pairs that found no room.
    scores: float32 [T, E], of all tokens, batch-major.
    choice: experts, raw gates and loads; rounded where that is asked for, and
      before any drop.
    unrounded_load: int32 [E], of the choice that the balancer saw.
    finite: bool scalar, whether all logits of unmasked tokens are.
  """

  loss: jax.Array
  dropped: jax.Array
  scores: jax.Array
  choice: routing.Choice
  unrounded_load: jax.Array
  finite: jax.Array


class MoE(nnx.Module):
  """Routes each token to K of E SwiGLU experts and mixes what they return.

  With `train=True` a call lets the balancer solve for q on the tokens at hand,
  keeps the solved state and adds to the step's observation; `update_router`
  applies that once a step. With `train=False` q is frozen.

  Args:
    config: sizes and options.
    balancer: the rule for q, from `moe_jax.routing`.
    rngs: for the initial weights.
  """

  def __init__(
    self, config: MoEConfig, balancer: routing.Balancer, *, rngs: nnx.Rngs
  ):
    self.config, self.balancer = config, balancer
    width, hidden, experts = config.width, config.hidden, config.experts
    # The router is tiny and decides discretely: all of it is float32.
    self.router = nnx.Param(linear_init()(rngs.params(), (width, experts)))

    def expert_weights(inputs, outputs):
      shape = (experts, inputs, outputs)
      return ExpertParam(linear_init(batch_axis=0)(rngs.params(), shape))

    self.gate = expert_weights(width, hidden)
    self.up = expert_weights(width, hidden)
    self.down = expert_weights(hidden, width)
    self.shared = (
      SwiGLU(
        width,
        config.shared_experts * hidden,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
      )
      if config.shared_experts
      else None
    )
    self.state = RouterState(balancer.init(experts))
    self.observation = RouterState(
      routing.zero_observation(balancer, experts, config.experts_per_token)
    )

  def __call__(
    self,
    x_BxSxD: jax.Array,
    mask_BxS: jax.Array | None = None,
    *,
    train: bool,
  ) -> tuple[jax.Array, MoEOutput]:
    """Applies the layer.

    Args:
      x_BxSxD: tokens, any float dtype.
      mask_BxS: bool; False for padding, which is routed nowhere.
      train: whether q may move.

    Returns:
      [B, S, D] of the input's dtype, and what the router did.
    """
    mask_T = None
    if mask_BxS is not None:
      mask_T = mask_BxS.reshape(-1)
      x_BxSxD = jnp.where(mask_BxS[..., None], x_BxSxD, 0)
    with jax.named_scope('router'):
      output = self._route(x_BxSxD, mask_BxS, mask_T, train=train)
    x_TxD = x_BxSxD.reshape(-1, self.config.width)
    mixed = self._mix(x_TxD, output.choice, mask_T, train=train)
    y_BxSxD = mixed.y.reshape(x_BxSxD.shape)
    if self.shared is not None:
      y_BxSxD += self.shared(x_BxSxD)
    output = output._replace(dropped=mixed.dropped)
    return y_BxSxD.astype(x_BxSxD.dtype), output

  def _route(self, x_BxSxD, mask_BxS, mask_T, *, train) -> MoEOutput:
    """Scores and chooses; with `train`, this is where the router moves."""
    config, k = self.config, self.config.experts_per_token
    logits_BxSxE = jnp.dot(
      x_BxSxD.astype(jnp.float32),
      self.router[...],
      precision=lax.Precision.HIGHEST,
    )
    score = {'softmax': jax.nn.softmax, 'sigmoid': jax.nn.sigmoid}
    scores_BxSxE = score[config.scoring](logits_BxSxE)
    scores_TxE = scores_BxSxE.reshape(-1, config.experts)
    state, loss = self.state.get_value(), jnp.float32(0.0)
    if train:
      state, seen, choice, rounded = self._solve(scores_TxE, mask_T)
      self.state.set_value(state)
      self.observation.set_value(
        jax.tree.map(jnp.add, self.observation.get_value(), seen)
      )
      loss = self.balancer.loss(scores_BxSxE, choice, k=k, mask_BxS=mask_BxS)
      loss += config.router_z_loss * _z_loss(logits_BxSxE, mask_BxS)
    else:
      choice = routing.choose(scores_TxE, state.q, k=k, mask_T=mask_T)
      rounded = choice
    return MoEOutput(
      loss=loss,
      dropped=jnp.int32(0),
      scores=scores_TxE,
      choice=rounded,
      unrounded_load=choice.load,
      finite=jnp.all(jnp.isfinite(logits_BxSxE)),
    )

  def _solve(self, scores_TxE, mask_T):
    """Returns state, observation, the choice by prices and the one to take."""
    config, k = self.config, self.config.experts_per_token
    state = self.state.get_value()

    def solve(scores_TxE, mask_T, axis_name=None):
      q_E, new_state = self.balancer.solve(
        state, scores_TxE, k=k, mask_T=mask_T, axis_name=axis_name
      )
      # A backward pass that recomputes the rest neither solves nor, see
      # `choose`, chooses again.
      q_E = checkpoint_name(lax.stop_gradient(q_E), 'q')
      choice = routing.choose(scores_TxE, q_E, k=k, mask_T=mask_T)
      seen = self.balancer.observe(
        new_state,
        q_E,
        scores_TxE,
        choice,
        k=k,
        mask_T=mask_T,
        axis_name=axis_name,
      )
      rounded = choice
      if config.round_to_capacity:
        rounded = routing.round_to_capacity(
          scores_TxE,
          q_E,
          k=k,
          mask_T=mask_T,
        )
      return new_state, seen, choice, rounded

    shards = max(1, config.shards)
    if shards == 1:
      return solve(scores_TxE, mask_T)
    if len(scores_TxE) % shards:
      raise ValueError(
        f'shards={shards}: must divide the {len(scores_TxE)} tokens of a batch'
      )
    split = jax.tree.map(
      lambda x: x.reshape(shards, -1, *x.shape[1:]), (scores_TxE, mask_T)
    )
    # `out_axes=None` refuses a state or observation that differs by shard.
    state, seen, *choices = jax.vmap(
      functools.partial(solve, axis_name='shard'),
      axis_name='shard',
      out_axes=(None, None, 0, 0),
    )(*split)
    choices = [
      routing.Choice(
        choice.experts.reshape(-1, k),
        choice.gates.reshape(-1, k),
        jnp.sum(choice.load, axis=0),
      )
      for choice in choices
    ]
    return state, seen, *choices

  def _mix(self, x_TxD, choice, mask_T, *, train) -> dispatch.Mixed:
    config = self.config
    if config.renormalize_gates:
      total = jnp.sum(choice.gates, axis=-1, keepdims=True)
      choice = choice._replace(gates=choice.gates / (total + 1e-20))
    dtype = jnp.dtype(config.dtype)
    weights = dispatch.ExpertWeights(
      *(w[...].astype(dtype) for w in (self.gate, self.up, self.down))
    )
    x_TxD = x_TxD.astype(dtype)
    if not (train and config.capacity_factor):
      return dispatch.grouped(x_TxD, choice, weights, mask_T=mask_T)
    tokens, k = choice.experts.shape
    shards = max(1, config.shards) if config.round_to_capacity else 1
    room = shards * math.ceil(
      config.capacity_factor * tokens * k / (shards * config.experts)
    )
    return dispatch.capacity(
      x_TxD,
      choice,
      weights,
      mask_T=mask_T,
      capacity=min(room, tokens),
    )

  def update_router(self) -> None:
    """Moves the router by the step's observations and forgets them."""
    observation = self.observation.get_value()
    self.state.set_value(
      self.balancer.update(
        self.state.get_value(), observation, k=self.config.experts_per_token
      )
    )
    self.observation.set_value(jax.tree.map(jnp.zeros_like, observation))


def _z_loss(logits_BxSxE: jax.Array, mask_BxS: jax.Array | None) -> jax.Array:
  """Averages logsumexp(logits)^2 over tokens (arXiv 2202.08906, eq. 5)."""
  square_BxS = jnp.square(jax.nn.logsumexp(logits_BxSxE, axis=-1))
  if mask_BxS is None:
    return jnp.mean(square_BxS)
  total = jnp.sum(jnp.where(mask_BxS, square_BxS, 0.0))
  return total / jnp.maximum(jnp.sum(mask_BxS), 1)
