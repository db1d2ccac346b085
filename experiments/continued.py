"""A model that exists, trained on: of a run, or imported from elsewhere.

python -m moe_jax.hf import FOLDER --workdir=runs/public
python -m moe_jax.data.prepare --source='texts/*.txt' --tokenizer=FOLDER \\
    --out=corpus
MODEL=runs/public python -m moe_jax.main \\
    --config=experiments/continued.py:bip --workdir=runs/continued \\
    --config.data.corpus=corpus

MODEL is the work directory of the model. The run begins with its parameters and
prices.
"""

import json
import os
import pathlib

from ml_collections import ConfigDict

from moe_jax import config


def get_config(method: str = 'bip') -> ConfigDict:
  """Returns options for a model that is trained already, under one method."""
  options = config.default_config(method)
  options.steps = 200
  options.batch_size = 8
  options.sequence_length = 512
  options.learning_rate = 2e-5
  options.warmup_steps = 20
  options.data.evaluation_sets = 'validation'
  if workdir := os.environ.get('MODEL'):
    path = pathlib.Path(workdir) / 'config.json'
    of_model = config.upgrade(json.loads(path.read_text()))
    options.model.update(of_model['model'])
    for name in ('dataset', 'vocabulary'):
      options.data[name] = of_model['data'][name]
    options.init_from = workdir
  return options
