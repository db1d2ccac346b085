"""Schedules and optimizers by optax's names; by default, MiniMind's AdamW."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from moe_jax import nn
from moe_jax.config import Config


def make_schedule(config: Config) -> optax.Schedule:
  """Builds linear warm-up, then what `optimizer.schedule` names.

  Step n of w steps of warm-up has n/w of the peak: none has nothing.

  Returns:
    The learning rate by the number of updates made before, 0 at the first.
  """
  peak, options = config.learning_rate, config.optimizer
  first, end = peak / max(config.warmup_steps, 1), peak * options.end
  warm_up = max(config.warmup_steps - 1, 0)
  if options.schedule == 'cosine':
    return optax.warmup_cosine_decay_schedule(
      first, peak, warm_up, config.steps, end
    )
  left = config.steps - warm_up
  falls = {'constant': 0, 'linear': left, 'wsd': options.decay_steps}
  count = falls[options.schedule]
  rest = optax.constant_schedule(peak)
  if count:
    rest = optax.linear_schedule(peak, end, count, left - count)
  if not warm_up:
    return rest
  return optax.join_schedules(
    [optax.linear_schedule(first, peak, warm_up), rest], [warm_up]
  )


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
  """Builds clipping, then the optimizer, whose `update` needs `norm`."""
  options, schedule = config.optimizer, make_schedule(config)
  betas = (options.b1, options.b2)
  mask = None if options.decay == 'all' else _matrices
  if options.name == 'adamw':
    optimizer = optax.adamw(
      schedule,
      *betas,
      options.eps,
      mu_dtype=options.first_moment,
      weight_decay=config.weight_decay,
      mask=mask,
    )
  else:
    # optax's adafactor does not decay in units of the learning rate, and its
    # muon leaves the mask to the matrices that it takes itself.
    optimizer = optax.chain(
      _without_decay(config, schedule),
      optax.add_decayed_weights(
        lambda count: -config.weight_decay * schedule(count), mask
      ),
    )
  greatest = config.gradient_clip
  clip = _clip(greatest) if greatest else optax.identity()
  return optax.chain(clip, optimizer)


def _clip(greatest: float) -> optax.GradientTransformationExtraArgs:
  """Clips by the global norm, which the step has computed already.

  `optax.clip_by_global_norm` computes it again and divides each element by it,
  which on CPUs took more passes over the gradient.
  """

  def update(gradient, state, params=None, *, norm, **_):
    del params
    scale = jnp.minimum(1, greatest / norm)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradient), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _without_decay(
  config: Config, schedule: optax.Schedule
) -> optax.GradientTransformation:
  options = config.optimizer
  if options.name == 'adafactor':
    return optax.adafactor(schedule)
  return contrib.muon(
    schedule,
    mu_dtype=options.first_moment,
    eps=options.eps,
    adam_b1=options.b1,
    adam_b2=options.b2,
    muon_weight_dimension_numbers=_orthogonalized,
    # As large as AdamW's, so that one learning rate does for both: Liu et al.,
    # arXiv 2502.16982, section 2.2.
    consistent_rms=0.2,
  )


def _rank(path: tuple, leaf: jax.Array) -> int:
  """Counts the axes that a parameter has beside that of stacked layers."""
  return leaf.ndim - nn.is_stacked(path[0].key)


def _matrices(params: Any) -> Any:
  """Marks what is neither the scale of a norm nor a bias."""
  return jax.tree.map_with_path(lambda *leaf: _rank(*leaf) > 1, params)


def _orthogonalized(params: Any) -> Any:
  """Marks the matrices of layers: not embeddings, which are looked up."""

  def axes(path, leaf):
    hidden = nn.is_stacked(path[0].key) and _rank(path, leaf) > 1
    return contrib.MuonDimensionNumbers(-2, -1) if hidden else None

  return jax.tree.map_with_path(axes, params)
