"""Every experiment file is a valid config under every method."""

import pathlib

from flax import nnx
import jax
import pytest

from moe_jax import config
from moe_jax import main as command_line
from moe_jax.train import state as states

FILES = [
  path
  for path in pathlib.Path('experiments').rglob('*.py')
  if 'def get_config' in path.read_text()
]


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_methods_differ_in_the_balancer_alone(path):
  frozen = {}
  for method in config.METHODS:
    options = command_line.load_experiment(f'{path}:{method}')
    frozen[method] = config.to_dict(config.freeze(options))
  for method, options in frozen.items():
    of_method = config.METHODS[method].items()
    assert options.pop('balancer').items() >= of_method
  assert all(options == frozen['bip'] for options in frozen.values())


@pytest.mark.parametrize(
  ('name', 'millions'), [('paper_16e', 302.7), ('paper_64e', 1133.4)]
)
def test_paper_sizes(name, millions):
  options = command_line.load_experiment(f'experiments/{name}.py:bip')
  frozen = config.freeze(options)
  model = nnx.eval_shape(lambda: states.make_model(frozen))
  params = nnx.state(model, nnx.Param)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert round(count / 1e6, 1) == millions
