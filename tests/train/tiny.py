"""A run small enough for tests: a few words of text, a few weights."""

import pathlib

import numpy as np

from moe_jax import config as config_lib


def write_text(directory: pathlib.Path) -> pathlib.Path:
  """Writes documents of random words that are the same every time."""
  random = np.random.default_rng(0)
  words = ['balance', 'expert', 'token', 'router', 'of', 'the', 'a', 'load']
  for i in range(30):
    text = ' '.join(random.choice(words, 120, p=random.dirichlet([0.5] * 8)))
    (directory / f'{i:02d}.txt').write_text(text)
  return directory


def tiny_config(
  directory: pathlib.Path, method: str = 'bip', **overrides
) -> config_lib.Config:
  """Returns a config that trains on the text in `directory` in a second."""
  options = config_lib.default_config(method)
  options.update(
    steps=6,
    batch_size=8,
    sequence_length=16,
    learning_rate=1e-2,
    checkpoint_every=3,
    eval_sequences=8,
  )
  options.model.update(
    width=16,
    hidden=16,
    layers=2,
    heads=2,
    kv_heads=1,
    experts=8,
    experts_per_token=2,
  )
  options.data.update(
    dataset='text_files',
    files=str(directory / '*.txt'),
    vocabulary=300,
    evaluation_sets='validation',
    cache_dir=str(directory / 'cache'),
  )
  options.update_from_flattened_dict(overrides)
  return config_lib.freeze(options)
