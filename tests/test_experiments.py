"""Every experiment file is a valid config under every method."""

import pathlib

from flax import nnx
import pytest

from moe_jax import config, nn
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
  ('name', 'total', 'active'),
  [
    ('paper_16e', 0.3027, 0.0951),
    ('paper_64e', 1.1334, 0.1645),
    ('pods/moe_7b', 6.9479, 1.3108),
    ('pods/moe_30b', 30.2705, 3.0914),
    ('pods/moe_106b', 104.8894, 9.3851),
    ('giant_256e', 234.9653, 10.2848),
  ],
)
def test_sizes(name, total, active):
  """In billions of parameters, all and those that a token uses."""
  options = command_line.load_experiment(f'experiments/{name}.py:bip')
  options.mesh.fsdp = False  # It needs a mesh.
  frozen = config.freeze(options)
  model = nnx.eval_shape(lambda: states.make_model(frozen))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  counts = nn.parameter_counts(frozen.model, params)
  assert [round(count / 1e9, 4) for count in counts] == [total, active]
