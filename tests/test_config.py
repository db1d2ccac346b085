"""Config errors name the option, the value and what would work."""

import dataclasses
import functools

from ml_collections import ConfigDict
import pytest

from moe_jax import config, routing


@pytest.mark.parametrize('method', config.METHODS)
def test_every_option_survives_the_way_through_flags_and_json(method):
  options = config.default_config(method)
  frozen = config.freeze(options)
  assert config.to_dict(frozen) == options.to_dict()
  assert config.method_of(frozen.balancer) == method


def test_flags_can_type_every_option():
  """Overrides of None and of tuples would be untyped."""

  def check(options):
    for name, value in options.items():
      if isinstance(value, ConfigDict):
        check(value)
      else:
        assert type(value) in (bool, int, float, str), name

  check(config.default_config())


def test_no_option_is_in_two_sections():
  for name in ('vocabulary', 'capacity_factor'):
    with pytest.raises(ValueError, match=rf'^model\.{name}: unknown'):
      config.freeze({'model': {name: 7}})


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('steps', 0, 'steps=0: must be 1 or more'),
    ('seed', -1, 'seed=-1'),
    ('accumulation', 3, 'accumulation=3: must divide batch_size=8'),
    ('warmup_steps', 200, 'warmup_steps=200: must be less than steps=200'),
    (
      'model.remat_policy',
      'dots_saveable',
      'model.remat_policy=dots_saveable: needs model.remat=True',
    ),
    ('profile', '3', 'profile=3: must be START:STEPS'),
    ('profile', '201:3', 'profile=201:3: must start in one of steps=200'),
    ('optimizer.b1', 1.0, 'optimizer.b1=1.0: must be 0.999999 or less'),
    ('learning_rate', 0.0, 'learning_rate=0.0: must be greater than 0'),
    ('learning_rate', float('nan'), 'learning_rate=nan: must be finite'),
    ('capacity_factor', float('inf'), 'capacity_factor=inf: must be finite'),
    ('seed', 2**32, 'seed=4294967296: must be 4294967295 or less'),
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
  options = config.default_config()
  *groups, name = path.split('.')
  section = options
  for group in groups:
    section = section[group]
  section[name] = value
  with pytest.raises(ValueError, match=message.replace('.', r'\.')):
    config.freeze(options)


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
    config.freeze(options)
  assert message in str(error.value)


def test_whole_numbers_do_for_floats():
  assert config.freeze({'learning_rate': 1}).learning_rate == 1.0


def test_a_balancer_is_built_once(monkeypatch):
  built = []

  @functools.wraps(routing.bip)
  def bip(**arguments):
    built.append(arguments)
    return routing.bip(**arguments)

  monkeypatch.setitem(config.BALANCERS, 'bip', bip)
  frozen = config.freeze(config.default_config('loss_free'))
  assert not built
  frozen = config.freeze({'balancer': {'name': 'bip', 'iterations': 3}})
  assert frozen.balancer_rule is frozen.balancer_rule
  (arguments,) = built
  assert arguments['iterations'] == 3


def test_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.Config().steps = 1


@pytest.mark.parametrize(
  ('balancer', 'method'),
  [
    ({'name': 'bip'}, 'bip'),  # Arguments that are missing have their default.
    ({'name': 'bip', 'iterations': 6}, 'bip(iterations=6)'),
    ({'name': 'midpoint', 'lag': True, 'iterations': 4}, 'midpoint_lag'),
    ({'name': 'bip', 'scope': 'shard'}, "bip(scope='shard')"),
    ({'name': 'of_another_version', 'a': 1}, 'of_another_version(a=1)'),
  ],
)
def test_a_method_is_named_after_its_options(balancer, method):
  assert config.method_of(balancer) == method


def test_what_does_not_add_up_is_refused_with_several_microbatches():
  quantile = {'name': 'quantile', 'estimator': 'exact'}
  with pytest.raises(ValueError, match='accumulation=2: .*') as error:
    config.freeze({'accumulation': 2, 'balancer': quantile})
  assert 'quantile_histogram' in str(error.value)
  quantile['estimator'] = 'histogram'
  frozen = config.freeze({'accumulation': 2, 'balancer': quantile})
  assert frozen.balancer_rule.additive
  config.freeze({'balancer': {'name': 'quantile'}})


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({}, 'eval_every=0 and checkpoint_every=100 have no common step'),
    ({'eval_every': 30}, 'before the last, steps=200; make one a multiple'),
    ({'eval_every': 200, 'checkpoint_every': 200}, 'steps=200'),
    (
      {'eval_every': 50, 'data': {'evaluation_sets': 'shakespeare'}},
      'data.evaluation_sets=shakespeare has no validation set',
    ),
  ],
)
def test_keeping_the_best_is_refused_where_it_never_acts(options, message):
  options = {'checkpoints_kept_best': 1, **options}
  with pytest.raises(ValueError) as error:
    config.freeze(options)
  assert str(error.value).startswith('checkpoints_kept_best=1: ')
  assert message in str(error.value)
  # It was accepted before, and such runs can still be opened.
  assert config.freeze(config.upgrade(options)).checkpoints_kept_best == 0


def test_keeping_the_best_is_accepted_where_two_can_be_compared():
  options = {'checkpoints_kept_best': 1, 'eval_every': 50}
  assert config.freeze(options).checkpoints_kept_best == 1
  assert config.upgrade(options)['checkpoints_kept_best'] == 1


def test_an_evaluation_is_bounded_unless_that_is_said():
  assert 0 < config.Config().eval_sequences < 1000
  assert config.freeze({'eval_sequences': 0}).eval_sequences == 0


def test_an_older_config_is_brought_up_to_date():
  old = config.default_config('loss_free').to_dict() | {'method': 'loss_free'}
  del old['eval_solved'], old['model']['remat'], old['balancer']['centre']
  new = config.upgrade(old)
  assert new == config.default_config('loss_free').to_dict()
  assert new['eval_solved']  # As every evaluation did before.
  assert config.upgrade(new) == new


def changed(**options):
  before = config.to_dict(config.Config())
  return before, config.to_dict(config.freeze(before | options))


def test_differences_are_of_what_is_computed():
  before, now = changed(
    steps=300,
    checkpoint_every=7,
    mesh={'expert': 2},
    data={'cache_dir': 'elsewhere', 'vocabulary': 300},
    balancer={'name': 'loss_free', 'rate': 0.01},
  )
  found = config.differences(before, now)
  assert found.pop('steps') == (200, 300)
  assert found.pop('data.vocabulary') == (6400, 300)
  assert found.pop('balancer.rate') == (None, 0.01)
  assert found.pop('balancer.name') == ('bip', 'loss_free')
  assert all(name.startswith('balancer.') for name in found)
  assert not config.differences(before, now, ['steps', 'data', 'balancer'])


def test_what_changes_in_a_run_is_refused_unless_that_is_said():
  before, now = changed(steps=300, learning_rate=0.1, skipped_steps=3)
  config.check_changes(None, now, where='--workdir=x')
  allowed = ['steps', 'learning_rate', 'balancer']
  config.check_changes(before, now, allowed, where='--workdir=x')
  with pytest.raises(ValueError) as error:
    config.check_changes(before, now, ['steps'], where='--workdir=x')
  assert str(error.value) == (
    '--workdir=x: holds a run of another config: learning_rate=0.1 (was '
    '0.0005); choose another work directory, or continue with the change by '
    '--allow_config_change=learning_rate'
  )
  before, now = changed(steps=300, seed=1)
  with pytest.raises(ValueError, match='another work directory$'):
    config.check_changes(before, now, ['steps'], where='--workdir=x')


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('stepz', 'stepz: no such option'),
    ('seed', 'seed: cannot change in a run; what can is steps, '),
    ('model', 'model: cannot change in a run; .*, balancer, .*, model.dtype'),
    ('mesh.expert.x', 'mesh.expert.x: no such option'),
  ],
)
def test_only_what_may_change_can_be_allowed(name, message):
  with pytest.raises(ValueError, match=f'^--allow_config_change={message}'):
    config.check_changes(*changed(), [name], where='--workdir=x')


@pytest.mark.parametrize(
  ('name', 'change'),
  [
    ('steps', 'named'),
    ('balancer.rate', 'named'),
    ('model.dtype', 'named'),
    ('model.width', 'no'),
    ('model', 'no'),
    ('mesh.fsdp', 'yes'),
    ('data.cache_dir', 'yes'),
    ('unknown', 'no'),
  ],
)
def test_what_may_change(name, change):
  assert config.may_change(name) == change


def test_losses_go_with_every_balancer():
  """DeepSeek-V3's recipe, from flags."""
  frozen = config.freeze(
    {
      'balancer': {'name': 'loss_free'},
      'losses': {'sequence': 1e-4, 'z': 1e-3},
    }
  )
  assert frozen.balancer_rule == routing.with_losses(
    routing.loss_free(),
    routing.auxiliary_loss(1e-4, over='sequence'),
    routing.z_loss(1e-3),
  )
  losses = dataclasses.asdict(frozen.losses)
  name = config.method_of(frozen.balancer, losses)
  assert name == 'loss_free+sequence=0.0001+z=0.001'
  plain = config.freeze({'balancer': {'name': 'loss_free'}})
  assert plain.balancer_rule == routing.loss_free()


def test_a_z_loss_of_an_older_config_is_kept():
  options = config.to_dict(config.freeze({}))
  options['model']['router_z_loss'] = 0.25
  del options['losses']
  assert config.upgrade(options)['losses']['z'] == 0.25
  assert config.freeze(config.upgrade(options)).losses.z == 0.25
