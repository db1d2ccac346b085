"""Config errors name the option, the value and what would work."""

import dataclasses

from ml_collections import ConfigDict
import pytest

from moe_jax import config as config_lib


@pytest.mark.parametrize('method', config_lib.METHODS)
def test_every_option_survives_the_way_through_flags_and_json(method):
  options = config_lib.default_config(method)
  config = config_lib.freeze(options)
  assert config_lib.to_dict(config) == options.to_dict()
  assert config.method == method


def test_flags_can_type_every_option():
  """Overrides of None and of tuples would be untyped."""

  def check(options):
    for name, value in options.items():
      if isinstance(value, ConfigDict):
        check(value)
      else:
        assert type(value) in (bool, int, float, str), name

  check(config_lib.default_config())


def test_derived_options_follow():
  options = config_lib.default_config()
  options.data.vocabulary, options.capacity_factor = 321, 1.5
  model = config_lib.freeze(options).model
  assert (model.vocabulary, model.capacity_factor) == (321, 1.5)
  with pytest.raises(ValueError, match='vocabulary'):
    config_lib.freeze({'model': {'vocabulary': 7}})


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('steps', 0, 'steps=0: must be 1 or more'),
    ('seed', -1, 'seed=-1'),
    ('accumulation', 3, 'accumulation=3: must divide batch_size=8'),
    ('warmup_steps', 200, 'warmup_steps=200: must be less than steps=200'),
    ('learning_rate', 0.0, 'learning_rate=0.0: must be greater than 0'),
    ('learning_rate', float('nan'), 'learning_rate=nan: must be finite'),
    ('capacity_factor', float('inf'), 'capacity_factor=inf: must be finite'),
    ('seed', 2**32, 'seed=4294967296: must be 4294967295 or less'),
    ('method', 'loss_free', "method='loss_free': does not stand for"),
    ('method', 'nonsense', "method='nonsense'"),
    ('capacity_factor', -0.5, 'capacity_factor=-0.5'),
    ('model.experts_per_token', 17, 'experts_per_token=17: must be at most'),
    ('model.experts', 0, 'model.experts=0'),
    ('model.heads', 7, 'model.heads=7: must divide model.width=512'),
    ('model.kv_heads', 3, 'model.kv_heads=3: must divide model.heads=8'),
    ('model.dense_layers', 8, 'model.dense_layers=8'),
    ('model.scoring', 'relu', "model.scoring='relu': must be one of"),
    ('model.dtype', 'float16', "model.dtype='float16'"),
    ('balancer.iterations', -1, 'balancer.iterations=-1'),
    ('balancer.cutoff', 'last', "balancer.cutoff='last'"),
    ('balancer.name', 'bipp', 'did you mean bip'),
    ('balancer.name', 'loss_free', 'balancer.clip: loss_free has no such'),
    ('data.vocabulary', 10, 'data.vocabulary=10'),
  ],
)
def test_impossible_values_are_refused(path, value, message):
  options = config_lib.default_config()
  *groups, name = path.split('.')
  section = options
  for group in groups:
    section = section[group]
  section[name] = value
  with pytest.raises(ValueError, match=message.replace('.', r'\.')):
    config_lib.freeze(options)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'stepz': 3}, 'stepz: unknown; did you mean steps'),
    ({'steps': 3.0}, 'steps=3.0: must be of type int'),
    ({'steps': True}, 'steps=True: must be of type int'),
    ({'model': {'width': '8'}}, "model.width='8': must be of type int"),
    ({'mesh': {'dat': 1}}, 'mesh.dat: unknown; did you mean data'),
    ({'balancer': 'bip'}, "balancer='bip': must be a group"),
    (
      {'balancer': {'name': 'loss_free', 'rate': 'x'}},
      "balancer.rate='x': must be of type float",
    ),
  ],
)
def test_wrong_names_and_types_are_refused(options, message):
  with pytest.raises(ValueError) as error:
    config_lib.freeze(options)
  assert message in str(error.value)


def test_whole_numbers_do_for_floats():
  assert config_lib.freeze({'learning_rate': 1}).learning_rate == 1.0


def test_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    config_lib.Config().steps = 1
