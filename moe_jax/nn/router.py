"""From tokens to a choice of experts: scores, prices, rounding.

Shape letters: T tokens, B batch, S sequence, D model, E experts, K chosen.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from moe_jax import routing
from moe_jax.nn.config import MoEConfig

_SCORES = {'softmax': jax.nn.softmax, 'sigmoid': jax.nn.sigmoid}


class MoEOutput(NamedTuple):
  """What a layer tells beside its output.

  Attributes:
    loss: float32 scalar, the balancer's loss and the router z-loss.
    scores: float32 [T, E], of all tokens, batch-major.
    choice: experts, raw gates and loads; rounded where that is asked for, and
      before any drop.
    sums: what adds up over the microbatches of a step, for `router_metrics`:
      int32 `load` [E] of `choice`; `dropped`, the (token, expert) pairs that
      found no room; `infinite`, devices with logits that are not finite; with
      rounding, `unrounded_load` [E] of the choice that the balancer saw.
  """

  loss: jax.Array
  scores: jax.Array
  choice: routing.Choice
  sums: dict[str, jax.Array]


def router_metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Turns the sums of a step into metrics.

  A metric is an entry here; what it is made of, if that is not there yet, is
  an entry of `MoEOutput.sums`: all that adds up over devices and microbatches.

  Args:
    sums: of all MoE layers, stacked along a leading layer axis.

  Returns:
    Scalars; [L] or [L, E] where the name ends in '/layer'.
  """
  load_LxE = sums['load']
  violation_L = routing.max_violation(load_LxE)
  # In float32: over all layers of a pod's step it may not fit into an int32.
  pairs = jnp.maximum(jnp.sum(load_LxE, dtype=jnp.float32), 1)
  dropped = jnp.sum(sums['dropped'], dtype=jnp.float32)
  metrics = {
    'router/max_violation': jnp.mean(violation_L),
    'router/min_violation': jnp.mean(routing.min_violation(load_LxE)),
    'router/dropped': dropped / pairs,
    'router/max_violation/layer': violation_L,
    'router/load/layer': load_LxE,
  }
  if 'unrounded_load' in sums:
    metrics['router/max_violation_unrounded'] = jnp.mean(
      routing.max_violation(sums['unrounded_load'])
    )
  return metrics


def route(
  x_BxSxD: jax.Array,
  weight_DxE: jax.Array,
  state: Any,
  balancer: routing.Balancer,
  config: MoEConfig,
  *,
  train: bool,
  rounding: bool = False,
  mask_BxS: jax.Array | None = None,
  groups: int = 1,
  axis_name: tuple[str, ...] | None = None,
) -> tuple[MoEOutput, tuple[Any, Any] | None]:
  """Chooses experts; with `train`, lets the balancer solve for q first.

  Args:
    x_BxSxD: tokens, any float dtype; scored in float32.
    weight_DxE: the router's weight, float32.
    state: the balancer's.
    balancer: the rule for q.
    config: of the layer.
    train: whether q may move.
    rounding: whether, with `train`, no expert may get more than its share.
    mask_BxS: bool; False for padding.
    groups: equal, consecutive parts of the tokens that round by themselves.
      Without `axis_name` they also solve as so many devices would: each by
      itself where the balancer is `per_shard`.
    axis_name: mesh axes over which the batch is split, inside `jax.shard_map`.

  Returns:
    The output before any drop, with loads and sums of this device; and the
    balancer's new state with its observation, None where q is frozen.
  """
  logits_BxSxE = jnp.dot(
    x_BxSxD.astype(jnp.float32), weight_DxE, precision=lax.Precision.HIGHEST
  )
  scores_BxSxE = _SCORES[config.scoring](logits_BxSxE)
  scores_TxE = scores_BxSxE.reshape(-1, weight_DxE.shape[1])
  mask_T = None if mask_BxS is None else mask_BxS.reshape(-1)
  k = config.experts_per_token
  if train:
    solve = functools.partial(_solve, balancer, state, k=k, rounding=rounding)
    if axis_name is None and groups > 1:
      solved = _as_devices(solve, scores_TxE, mask_T, groups)
    else:
      solved = solve(scores_TxE, mask_T, groups=groups, axis_name=axis_name)
    new_state, seen, choice, rounded = solved
    loss = balancer.loss(
      scores_BxSxE, choice, k=k, mask_BxS=mask_BxS, axis_name=axis_name
    )
    if config.router_z_loss:
      z_loss = _z_loss(logits_BxSxE, mask_BxS, axis_name)
      loss += config.router_z_loss * z_loss
    moved = (new_state, seen)
  else:
    choice = routing.choose(scores_TxE, state.q, k=k, mask_T=mask_T)
    rounded, loss, moved = choice, jnp.float32(0.0), None
  sums = {
    'load': rounded.load,
    'infinite': jnp.any(~jnp.isfinite(logits_BxSxE)).astype(jnp.int32),
  }
  if rounding:
    sums['unrounded_load'] = choice.load
  return MoEOutput(loss, scores_TxE, rounded, sums), moved


def _solve(
  balancer, state, scores_TxE, mask_T, *, k, rounding, groups, axis_name
):
  """Returns state, observation, the choice by prices and the one to take."""
  q_E, new_state = balancer.solve(
    state, scores_TxE, k=k, mask_T=mask_T, axis_name=axis_name
  )
  # A backward pass that recomputes the rest neither solves nor, see `choose`,
  # chooses again.
  q_E = checkpoint_name(lax.stop_gradient(q_E), 'q')
  choice = routing.choose(scores_TxE, q_E, k=k, mask_T=mask_T)
  seen = balancer.observe(
    new_state, q_E, scores_TxE, choice, k=k, mask_T=mask_T, axis_name=axis_name
  )
  if not rounding:
    return new_state, seen, choice, choice

  def round_group(scores_TxE, mask_T):
    return routing.round_to_capacity(scores_TxE, q_E, k=k, mask_T=mask_T)

  rounded = jax.vmap(round_group)(*_split(groups, scores_TxE, mask_T))
  return new_state, seen, choice, _joined(rounded)


def _as_devices(solve: Callable, scores_TxE, mask_T, groups: int):
  """Solves on one device as on `groups` of them."""
  # `out_axes=None` refuses a state or observation that differs by group.
  state, seen, *choices = jax.vmap(
    functools.partial(solve, groups=1, axis_name='group'),
    axis_name='group',
    out_axes=(None, None, 0, 0),
  )(*_split(groups, scores_TxE, mask_T))
  return state, seen, *map(_joined, choices)


def _split(groups: int, *tokens: jax.Array | None):
  return jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), tokens)


def _joined(choice_G: routing.Choice) -> routing.Choice:
  experts, gates = (
    x.reshape(-1, x.shape[-1]) for x in (choice_G.experts, choice_G.gates)
  )
  return routing.Choice(experts, gates, jnp.sum(choice_G.load, axis=0))


def _z_loss(logits_BxSxE, mask_BxS, axis_name) -> jax.Array:
  """Averages logsumexp(logits)^2 over tokens (arXiv 2202.08906, eq. 5)."""
  square_BxS = jnp.square(jax.nn.logsumexp(logits_BxSxE, axis=-1))
  if mask_BxS is None:
    mask_BxS = jnp.ones(square_BxS.shape, bool)
  square = jnp.sum(jnp.where(mask_BxS, square_BxS, 0.0))
  count = jnp.sum(mask_BxS)
  if axis_name is not None:
    square, count = lax.psum((square, count), axis_name)
  return square / jnp.maximum(count, 1)
