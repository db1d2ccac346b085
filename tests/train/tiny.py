"""A run small enough for tests: a few words of text, a few weights.

Also an experiment file, for runs from the command line:
  --config=tests/train/tiny.py:bip --config.data.files=... \
      --config.data.cache_dir=...
"""

import pathlib

from ml_collections import ConfigDict
import numpy as np

from moe_jax import config as config_lib
from moe_jax.runs import preemption
from moe_jax.train.loop import train
from moe_jax.train.plan import Plan, plan


def write_text(directory: pathlib.Path) -> pathlib.Path:
  """Writes documents of random words that are the same every time."""
  random = np.random.default_rng(0)
  words = ['balance', 'expert', 'token', 'router', 'of', 'the', 'a', 'load']
  for i in range(30):
    text = ' '.join(random.choice(words, 120, p=random.dirichlet([0.5] * 8)))
    (directory / f'{i:02d}.txt').write_text(text)
  return directory


def get_config(method: str) -> ConfigDict:
  """Returns options that train in a second, but for those of the text."""
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
    dataset='text_files', vocabulary=300, evaluation_sets='validation'
  )
  return options


def of_text(directory: pathlib.Path) -> dict[str, str]:
  """Returns the options that name the text in `directory`."""
  return {
    'data.files': str(directory / '*.txt'),
    'data.cache_dir': str(directory / 'cache'),
  }


def tiny_config(
  directory: pathlib.Path, method: str = 'bip', **overrides
) -> config_lib.Config:
  """Returns `get_config` on the text in `directory`, validated."""
  options = get_config(method)
  options.update_from_flattened_dict(of_text(directory) | overrides)
  return config_lib.freeze(options)


def run(config, workdir, allowed=(), preempted=preemption.never) -> Plan:
  """Trains to the end, or until preempted; returns what was trained."""
  planned = plan(config, workdir, allowed)
  train(planned, preempted)
  return planned
