"""AdamW as MiniMind has it."""

import optax

from moe_jax.config import Config


def make_schedule(config: Config) -> optax.Schedule:
  """Builds linear warm-up, then a cosine to a tenth of the learning rate."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0 if config.warmup_steps else config.learning_rate,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.steps,
    end_value=config.learning_rate / 10,
  )


def make_optimizer(config: Config) -> optax.GradientTransformation:
  """Builds clipping by global norm, then AdamW."""
  return optax.chain(
    optax.clip_by_global_norm(config.gradient_clip),
    optax.adamw(make_schedule(config), weight_decay=config.weight_decay),
  )
