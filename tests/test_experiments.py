"""Every experiment file is a valid config under every method."""

import pathlib

from flax import nnx
import jax
import pytest

from moe_jax import config as config_lib
from moe_jax import main as command_line
from moe_jax.train import state as state_lib

FILES = [
  path
  for path in pathlib.Path('experiments').glob('*.py')
  if 'def get_config' in path.read_text()
]


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_methods_differ_in_the_balancer_alone(path):
  frozen = {}
  for method in config_lib.METHODS:
    options = command_line.load_experiment(f'{path}:{method}')
    frozen[method] = config_lib.to_dict(config_lib.freeze(options))
  for options in frozen.values():
    balancer = options.pop('balancer')
    assert balancer.items() >= config_lib.METHODS[options.pop('method')].items()
  assert all(options == frozen['bip'] for options in frozen.values())


@pytest.mark.parametrize(
  ('name', 'millions'), [('paper_16e', 302.7), ('paper_64e', 1133.4)]
)
def test_paper_sizes(name, millions):
  options = command_line.load_experiment(f'experiments/{name}.py:bip')
  config = config_lib.freeze(options)
  model = nnx.eval_shape(lambda: state_lib.make_model(config))
  params = nnx.state(model, nnx.Param)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert round(count / 1e6, 1) == millions
