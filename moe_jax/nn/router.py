"""From tokens to a choice of experts: scores, prices, selection, rounding.

Shape letters: T tokens, B batch, S sequence, D model, E experts, K chosen.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from moe_jax import jax_privates, routing
from moe_jax.nn.config import MoEConfig
from moe_jax.nn.selections import OF_SHARD
from moe_jax.routing.order_statistic import total

# (priced_TxE, q_E, config, mask_T) -> Choice, see nn/selections.py.
Select = Callable[..., routing.Choice]


class MoEOutput(NamedTuple):
  """What a layer tells beside its output.

  Attributes:
    loss: float32 scalar, the balancer's.
    scores: float32 [T, E], of all tokens, batch-major.
    choice: experts, the gates they are mixed with, and loads; rounded where
      that is asked for, and before any drop.
    sums: what adds up over the microbatches of a step, for `router_metrics`:
      int32 `load` [E] of `choice`; float32 `gates` [E], the sum of every
      expert's; `dropped`, the (token, expert) pairs that found no room;
      `infinite`, devices with logits that are not finite; `sequences` that have
      tokens and float32 `sequence_violation`, the sum of their MaxVio; with
      rounding, `unrounded_load` [E] of the choice that the balancer saw.
    most: what is the greatest over the microbatches of a step: float32
      `sequence_violation`, MaxVio of the worst sequence; and `device_load`, the
      greatest load of a device over the mean.
  """

  loss: jax.Array
  scores: jax.Array
  choice: routing.Choice
  sums: dict[str, jax.Array]
  most: dict[str, jax.Array]


def router_metrics(
  sums: dict[str, jax.Array], most: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Turns the sums of a step into metrics.

  A metric is an entry here; what it is made of, if that is not there yet, is
  an entry of `MoEOutput.sums`, all that adds up over devices and microbatches,
  or of `MoEOutput.most`.

  Args:
    sums: of all MoE layers, stacked along a leading layer axis.
    most: likewise.

  Returns:
    Scalars; [L] or [L, E] where the name ends in '/layer'.
  """
  load_LxE = sums['load']
  violation_L = routing.max_violation(load_LxE)
  # In float32: over all layers of a pod's step it may not fit into an int32.
  load_L = jnp.sum(load_LxE, axis=-1, keepdims=True, dtype=jnp.float32)
  share_LxE = load_LxE / jnp.maximum(load_L, 1)
  experts = load_LxE.shape[-1]
  entropy_L = jnp.sum(jax.scipy.special.entr(share_LxE), axis=-1)
  dropped = jnp.sum(sums['dropped'], dtype=jnp.float32)
  sequences_L = jnp.maximum(sums['sequences'], 1)
  metrics = {
    'router/max_violation': jnp.mean(violation_L),
    'router/min_violation': jnp.mean(routing.min_violation(load_LxE)),
    'router/dropped': dropped / jnp.maximum(jnp.sum(load_L), 1),
    'router/sequence_violation': jnp.mean(
      sums['sequence_violation'] / sequences_L
    ),
    'router/worst_sequence_violation': jnp.max(most['sequence_violation']),
    'router/dead_experts': jnp.mean(share_LxE < 0.1 / experts),
    'router/used_experts': jnp.mean(jnp.exp(entropy_L)) / experts,
    'router/device_load': jnp.max(most['device_load']),
    'router/max_violation/layer': violation_L,
    'router/load/layer': load_LxE,
    'router/gates/layer': sums['gates'],
  }
  if 'unrounded_load' in sums:
    metrics['router/max_violation_unrounded'] = jnp.mean(
      routing.max_violation(sums['unrounded_load'])
    )
  return metrics


class StepSoFar(NamedTuple):
  """What a layer remembers of an optimizer step until its end.

  Attributes:
    load: int32 [E], choices by price of all devices.
    calls: int32 scalar, microbatches.
  """

  load: jax.Array
  calls: jax.Array


class Moved(NamedTuple):
  """How a router moved.

  Attributes:
    state: the balancer's new one.
    observation: of this microbatch.
  """

  state: Any
  observation: Any


def route(
  x_BxSxD: jax.Array,
  router_DxE: jax.Array,
  state: Any,
  so_far: StepSoFar,
  balancer: routing.Balancer,
  select: Select,
  config: MoEConfig,
  *,
  train: bool,
  rounding: bool = False,
  mask_BxS: jax.Array | None = None,
  experts_BxSxK: jax.Array | None = None,
  groups: int = 1,
  axis_name: tuple[str, ...] | None = None,
) -> tuple[MoEOutput, Moved | None]:
  """Chooses experts; with `train`, lets the balancer solve for q first.

  Args:
    x_BxSxD: tokens, any float dtype; scored in float32.
    router_DxE: the router's weight, float32.
    state: the balancer's.
    so_far: what happened before in this step.
    balancer: the rule for q.
    select: from scores and prices to a choice.
    config: of the layer.
    train: whether q may move.
    rounding: whether, with `train`, no expert may get more than its share.
    mask_BxS: bool; False for padding.
    experts_BxSxK: experts to be taken instead of choosing, see
      `routing.replay`.
    groups: equal, consecutive parts of the tokens that round by themselves.
      Without `axis_name` they also solve as so many devices would: each by
      itself where the balancer is `per_shard`.
    axis_name: mesh axes over which the batch is split, inside `jax.shard_map`.

  Returns:
    The output before any drop, with loads and sums of this device; and how the
    router moved, None where q is frozen.
  """
  logits_BxSxE = jnp.dot(
    x_BxSxD.astype(jnp.float32), router_DxE, precision=lax.Precision.HIGHEST
  )
  scores_BxSxE = routing.SCORINGS[config.scoring](logits_BxSxE)
  priced_BxSxE = logits_BxSxE if config.priced == 'logits' else scores_BxSxE
  tokens = _tokens(scores_BxSxE, priced_BxSxE, mask_BxS, experts_BxSxK)
  if train:
    solve = functools.partial(_solve, balancer, select, state, config, rounding)
    if axis_name is None and groups > 1:
      solved = _as_devices(solve, tokens, groups)
    else:
      solved = solve(tokens, groups=groups, axis_name=axis_name)
    moved, choice, taken = solved
    loss = balancer.loss(
      routing.LossInputs(
        logits_BxSxE,
        scores_BxSxE,
        choice,
        mask_BxS,
        router_DxE,
        step_load_E=so_far.load + total(choice.load, axis_name),
        k=config.experts_per_token,
        axis_name=axis_name,
      )
    )
    # Of the matrix alone, where that was made to vary. Otherwise a loss that
    # varies is one that forgot its sum over devices, which `shard_map` refuses.
    varies = jax_privates.varying_axes
    if varying := varies(loss) & varies(router_DxE):
      loss = lax.pmean(loss, tuple(varying))
  else:
    q_E = balancer.price(state)
    taken = choice = _choice(select, tokens, q_E, config)
    loss, moved = jnp.float32(0.0), None
  gates_TxK = _final_gates(taken.gates, config)
  if train and not balancer.additive:
    # Compiled code cannot raise: nothing that follows may look right.
    gates_TxK = jnp.where(so_far.calls > 0, jnp.nan, gates_TxK)
  taken = taken._replace(gates=gates_TxK)
  sums, most = _told(taken, mask_BxS, logits_BxSxE)
  if rounding:
    sums['unrounded_load'] = choice.load
  return MoEOutput(loss, tokens.scores, taken, sums, most), moved


class _Tokens(NamedTuple):
  """What routes are made of.

  Attributes:
    scores: [T, E], for the gates.
    priced: [T, E], scores or logits.
    mask: bool [T], or None.
    experts: int32 [T, K] to replay, or None.
  """

  scores: jax.Array
  priced: jax.Array
  mask: jax.Array | None
  experts: jax.Array | None


def _tokens(*of_tokens_BxS: jax.Array | None) -> _Tokens:
  """Joins the axes of batch and sequence."""
  return _Tokens(
    *(None if x is None else x.reshape(-1, *x.shape[2:]) for x in of_tokens_BxS)
  )


def _choice(select, tokens: _Tokens, q_E, config: MoEConfig) -> routing.Choice:
  """Selects, or replays; gates are raw scores."""
  if tokens.experts is not None:
    return routing.replay(tokens.scores, tokens.experts, mask_T=tokens.mask)
  choice = select(tokens.priced, q_E, config, tokens.mask)
  if config.priced == 'scores':
    return choice
  return routing.with_gates(choice, tokens.scores, tokens.mask)


def _competing(priced_TxE, q_E, config: MoEConfig) -> jax.Array:
  """Returns -inf for experts outside of a token's best groups."""
  groups, most = config.expert_groups, config.groups_per_token
  # Where a token takes all experts of its groups, none of them competes.
  if most * config.experts == config.experts_per_token * groups or groups == 1:
    return priced_TxE
  may_TxE = routing.competing(
    priced_TxE, q_E, groups=groups, groups_per_token=most
  )
  return jnp.where(may_TxE, priced_TxE, -jnp.inf)


def _solve(
  balancer,
  select,
  state,
  config,
  rounding,
  tokens: _Tokens,
  *,
  groups,
  axis_name,
):
  """Returns how the router moved, the choice by prices and the one to take."""
  over = {
    'k': config.experts_per_token,
    'mask_T': tokens.mask,
    'axis_name': axis_name,
  }
  limits = {}
  if balancer.knows_groups:
    limits = {
      'groups': config.expert_groups,
      'groups_per_token': config.groups_per_token,
    }
  q_E, new_state = balancer.solve(state, tokens.priced, **over, **limits)
  # A backward pass that recomputes the rest neither solves nor, see `choose`,
  # chooses again.
  q_E = checkpoint_name(lax.stop_gradient(q_E), 'q')
  choose = functools.partial(_choice, select, q_E=q_E, config=config)
  if config.selection in OF_SHARD:
    choice = _joined(jax.vmap(choose)(_split(groups, tokens)))
  else:
    choice = choose(tokens)
  seen = balancer.observe(new_state, q_E, tokens.priced, choice, **over)
  moved = Moved(new_state, seen)
  if not rounding or tokens.experts is not None:
    return moved, choice, choice

  def round_group(tokens):
    priced_TxE = _competing(tokens.priced, q_E, config)
    rounded = routing.round_to_capacity(
      priced_TxE, q_E, k=config.experts_per_token, mask_T=tokens.mask
    )
    return routing.with_gates(rounded, tokens.scores, tokens.mask)

  rounded = jax.vmap(round_group)(_split(groups, tokens))
  return moved, choice, _joined(rounded)


def _as_devices(solve: Callable, tokens: _Tokens, groups: int):
  """Solves on one device as on `groups` of them."""
  # `out_axes=None` refuses a state or observation that differs by group.
  moved, *choices = jax.vmap(
    functools.partial(solve, groups=1, axis_name='group'),
    axis_name='group',
    out_axes=(None, 0, 0),
  )(_split(groups, tokens))
  return moved, *map(_joined, choices)


def _split(groups: int, tokens: _Tokens) -> _Tokens:
  return jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), tokens)


def _joined(choice_G: routing.Choice) -> routing.Choice:
  load_E = jnp.sum(choice_G.load, axis=0)
  of_tokens = choice_G._replace(load=None)
  joined = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), of_tokens)
  return joined._replace(load=load_E)


def _final_gates(gates_TxK, config: MoEConfig) -> jax.Array:
  if config.renormalize_gates:
    sum_Tx1 = jnp.sum(gates_TxK, axis=-1, keepdims=True)
    gates_TxK = gates_TxK / (sum_Tx1 + 1e-20)
  return gates_TxK if config.gate_scale == 1 else gates_TxK * config.gate_scale


def _told(choice: routing.Choice, mask_BxS, logits_BxSxE):
  """Returns what `router_metrics` needs of a choice: sums, and the most."""
  batch, sequence, experts = logits_BxSxE.shape
  valid_TxK = choice.active
  tokens_B = jnp.full(batch, sequence)
  if mask_BxS is not None:
    valid_TxK &= mask_BxS.reshape(-1, 1)
    tokens_B = jnp.sum(mask_BxS, axis=1)
  of_sequences = (batch, sequence, -1)
  load_BxE = jax.vmap(functools.partial(routing.load_of, experts=experts))(
    choice.experts.reshape(of_sequences), valid_TxK.reshape(of_sequences)
  )
  gates_TxK = lax.stop_gradient(choice.gates)
  violation_B = routing.max_violation(load_BxE)
  sums = {
    'load': choice.load,
    'gates': _by_expert(choice.experts, gates_TxK, experts),
    'sequences': jnp.sum(tokens_B > 0, dtype=jnp.int32),
    'sequence_violation': jnp.sum(violation_B),
    'infinite': jnp.any(~jnp.isfinite(logits_BxSxE)).astype(jnp.int32),
  }
  return sums, {'sequence_violation': jnp.max(violation_B)}


def _by_expert(experts_TxK, gates_TxK, experts: int) -> jax.Array:
  """Sums the gates of each expert; float32 [E]."""

  def by_comparing(experts_TxK, gates_TxK):
    chosen_TxKxE = experts_TxK[..., None] == jnp.arange(experts)
    return jnp.sum(chosen_TxKxE * gates_TxK[..., None], axis=(0, 1))

  def by_adding(experts_TxK, gates_TxK):
    return jnp.zeros(experts, jnp.float32).at[experts_TxK].add(gates_TxK)

  return lax.platform_dependent(
    experts_TxK, gates_TxK, cpu=by_adding, default=by_comparing
  )
