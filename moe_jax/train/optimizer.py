"""AdamW as MiniMind has it."""

import optax

from moe_jax.config import Config


def make_schedule(config: Config) -> optax.Schedule:
  """Builds linear warm-up, then a cosine to a tenth of the learning rate.

  Step n of w steps of warm-up has n/w of the peak: none has nothing.

  Returns:
    The learning rate by the number of updates made before, 0 at the first.
  """
  return optax.warmup_cosine_decay_schedule(
    init_value=config.learning_rate / max(config.warmup_steps, 1),
    peak_value=config.learning_rate,
    warmup_steps=max(config.warmup_steps - 1, 0),
    decay_steps=config.steps,
    end_value=config.learning_rate / 10,
  )


def make_optimizer(config: Config) -> optax.GradientTransformation:
  """Builds clipping by global norm, then AdamW."""
  return optax.chain(
    optax.clip_by_global_norm(config.gradient_clip),
    optax.adamw(make_schedule(config), weight_decay=config.weight_decay),
  )
