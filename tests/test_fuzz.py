"""No flag, experiment file or option ends in anything but one clear line."""

import contextlib
import io
import pathlib
import tempfile
import traceback

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import pytest

from moe_jax import config
from moe_jax import main as command_line
from moe_jax.options import Option, options_of
from moe_jax.parallel import mesh as meshes
from moe_jax.train import batches, state, step

DEMO = 'experiments/demo.py'
NO_DEADLINE = hypothesis.settings(
  deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
LONG = hypothesis.settings(NO_DEADLINE, max_examples=3000)
QUICK = hypothesis.settings(NO_DEADLINE, max_examples=120)


def paths(options, prefix='config'):
  """Yields the full names of options and of their groups."""
  for name, value in options.items():
    yield f'{prefix}.{name}'
    if isinstance(value, ConfigDict):
      yield from paths(value, f'{prefix}.{name}')


# --- Every option has a range ------------------------------------------------

FREE_TEXT = {  # On purpose: names of data sets, files and features.
  'data.corpus',
  'data.dataset',
  'data.files',
  'data.validation_files',
  'tracker_project',
  'data.text_field',
  'data.tfds_dir',
  'data.cache_dir',
  'replay_routes',
  'init_from',
  'data.anneal_corpus',
}
OPTIONS = options_of(config.Config)
NUMBERS = {
  name: field for name, field in OPTIONS.items() if field.type in (int, float)
}


def with_option(name, value, **model):
  """Returns the defaults with one value in the place of another."""
  options = config.to_dict(config.Config())
  options['model'] |= model
  *groups, last = name.split('.')
  section = options[groups[0]] if groups else options
  section[last] = value
  return options


def test_every_option_is_declared():
  flat = config.flatten(config.to_dict(config.Config()))
  of_balancer = {name for name in flat if name.startswith('balancer.')}
  assert OPTIONS.keys() - {'balancer'} == flat.keys() - of_balancer


@pytest.mark.parametrize('name', NUMBERS)
def test_every_number_has_a_range(name):
  wanted, said = NUMBERS[name].type, NUMBERS[name].metadata[Option]
  least = said.least if said.above is None else said.above
  for value in (least - 1, said.most * 2 + 2):
    with pytest.raises(ValueError, match=rf'\b{name}='):
      config.freeze(with_option(name, wanted(value)))


@pytest.mark.parametrize(
  'name',
  [
    name
    for name, field in OPTIONS.items()
    if field.type is str and name not in FREE_TEXT
  ],
)
def test_every_text_has_its_values(name):
  with pytest.raises(ValueError, match=f'{name}='):
    config.freeze(with_option(name, 'no such value'))


@pytest.mark.parametrize('method', config.METHODS)
def test_every_argument_of_a_balancer_has_a_range_or_values(method):
  options = config.balancer_options(**config.METHODS[method])
  for name, value in options.items():
    if type(value) in (int, float):
      said = config.ARGUMENTS[name]
      wrong = (said.least - 1, said.most * 2)
    else:
      wrong = () if type(value) is bool else ('no such value',)
    for other in wrong:
      balancer = {**options, name: type(value)(other)}
      with pytest.raises(ValueError, match=rf'^balancer\.{name}='):
        config.freeze({'balancer': balancer})


@pytest.mark.parametrize(
  'options',
  [
    {'batch_size': 2**20, 'sequence_length': 2**12},
    {'batch_size': 2**10, 'sequence_length': 2**19},
    {
      'batch_size': 2**10,
      'sequence_length': 2**18,
      'model': {'selection': 'choose_above', 'experts_per_token': 4},
    },
  ],
)
def test_tokens_of_a_step_can_be_counted(options):
  with pytest.raises(ValueError, match=r'batch_size=.*less than 2\^31'):
    config.freeze(options)


# --- Flags -------------------------------------------------------------------

NAMES = sorted(paths(config.default_config()))
values = st.one_of(
  st.sampled_from(
    ['', 'nan', '-inf', 'None', 'true', '()', '(1, 2)', '[', '0x1', '1_0']
    + ['1e999', '9' * 5000, '-1', '0', '1', '2', '1.5', '\x00', '\ud800', '\n']
    + ['{}', '"', "'", '@', '*', '--config', '../..', '${x}', '1' + '0' * 30]
  ),
  st.integers().map(str),
  st.floats().map(str),
  st.text(max_size=8),
)
names = st.one_of(
  st.sampled_from(NAMES),
  st.sampled_from(NAMES).map(lambda name: name[:-1]),
  st.sampled_from(NAMES).map(lambda name: name + '.x.y'),
  st.sampled_from(
    ['config', 'noconfig', 'workdir', 'print_sharding', 'noprint_sharding']
    + ['flagfile', 'undefok', 'config.', 'config..', '.config', 'config[0]']
    + ['config.model.', 'config.__class__', 'config.balancer.__dict__', '']
    + ['helpfull', 'v', 'no', 'config.to_dict', 'noconfig.balancer.clip']
  ),
  st.text(max_size=6),
)
arguments = st.one_of(
  st.builds(
    lambda dash, name, sign, value: f'{dash}{name}{sign}{value}',
    st.sampled_from(['--', '--', '--', '-', '', '---', '--no']),
    names,
    st.sampled_from(['=', '=', '=', '', ' ', '==']),
    values,
  ),
  names.map('--{}'.format),
  values,
  st.just('--'),
)
command_lines = st.builds(
  lambda first, rest: [*first, *rest],
  st.sampled_from([[f'--config={DEMO}:{m}'] for m in config.METHODS] + [[]]),
  st.lists(arguments, max_size=4),
)


def one_line_or_config(argv):
  """Only a config, or ValueError of one line."""
  errors = io.StringIO()
  try:
    with contextlib.redirect_stderr(errors):
      options, _ = command_line.parse(
        ['main', *argv], others={'print_sharding': False}
      )
      assert isinstance(config.freeze(options), config.Config)
  except ValueError as error:
    assert type(error) is ValueError
    message = str(error)
    assert len(message.splitlines()) == 1, message
    message.encode()
    # It names what is wrong: an option, a flag or the argument itself.
    assert '=' in message or '--' in message or ': ' in message, message
  assert not errors.getvalue()


flag_examples = [
  [f'--config={DEMO}:bip', '--flagfile=/dev/zero'],
  [f'--config={DEMO}:bip', '--undefok=config.stepz', '--config.stepz=3'],
  [f'--config={DEMO}:bip', '--config.steps=' + '9' * 5000],
  [f'--config={DEMO}:bip', '--config.learning_rate=' + '9' * 5000],
  [f'--config={DEMO}:bip', '--config.data.files=\ud800'],
  [f'--config={DEMO}:bip', '--workdir=\x00'],
  [f'--config={DEMO}:bip', '--config.data.tfds_dir=a\nb'],
  [f'--config={DEMO}:bip', '--noconfig.balancer.clip'],
]


@pytest.mark.parametrize('argv', flag_examples)
def test_odd_flags_are_one_line(argv):
  one_line_or_config(argv)


@QUICK
@hypothesis.given(command_lines)
def test_any_flags_are_one_line(argv):
  one_line_or_config(argv)


@pytest.mark.long
@LONG
@hypothesis.given(command_lines)
def test_any_flags_are_one_line_long(argv):
  one_line_or_config(argv)


# --- Options -----------------------------------------------------------------

anything = st.recursive(
  st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.sampled_from([10**400, -(2**70), 2**31, 1e308, -0.0, object(), int]),
  ),
  lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.dictionaries(
      st.one_of(st.text(max_size=5), st.integers(), st.none()),
      inner,
      max_size=3,
    ),
  ),
  max_leaves=4,
)
overrides = st.lists(
  st.tuples(st.sampled_from(NAMES), anything), min_size=1, max_size=3
)


def freeze_overridden(method, changes):
  options = config.default_config(method).to_dict()
  for name, value in changes:
    *groups, last = name.split('.')[1:]
    section = options
    for group in groups:
      section = section.get(group)
      if not isinstance(section, dict):
        return
    section[last] = value
  try:
    config.freeze(options)
  except ValueError as error:
    assert type(error) is ValueError
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert any(name.split('.')[-1] in message for name, _ in changes), message


def test_number_that_python_cannot_print_is_refused():
  freeze_overridden('bip', [('config.steps', 10**5000)])
  freeze_overridden('bip', [('config.learning_rate', 10**5000)])


@hypothesis.settings(NO_DEADLINE, max_examples=200)
@hypothesis.given(st.sampled_from(sorted(config.METHODS)), overrides)
def test_any_options_are_one_line(method, changes):
  freeze_overridden(method, changes)


@pytest.mark.long
@hypothesis.settings(NO_DEADLINE, max_examples=10_000)
@hypothesis.given(st.sampled_from(sorted(config.METHODS)), overrides)
def test_any_options_are_one_line_long(method, changes):
  freeze_overridden(method, changes)


# --- Experiment files --------------------------------------------------------


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'\x00\xff\xfe',
    b'# coding: latin-7777\n',
    b'def get_config(',
    b'get_config = 3',
    b'def get_config(): pass',
    b'def get_config(m): pass',
    b'def get_config(m): return {}',
    b'def get_config(m, n): pass',
    b'def get_config(m): raise SystemExit(0)',
    b'import sys; sys.exit()',
    b'def get_config(m): raise GeneratorExit',
    b'def get_config(m): raise BaseException("a\\nb")',
    b'def get_config(m): return get_config(m)',
    b'class E(Exception):\n  def __str__(self): 1 / 0\n'
    b'def get_config(m): raise E',
    b'from ml_collections import ConfigDict\n'
    b'def get_config(m): return ConfigDict()',
    b'from ml_collections import ConfigDict\n'
    b'def get_config(m): return ConfigDict({1: 2, "steps": None})',
    b'from ml_collections import ConfigDict\n'
    b'def get_config(m):\n  c = ConfigDict()\n  c.me = c\n  return c',
    b'from ml_collections import ConfigDict, FieldReference\n'
    b'def get_config(m): return ConfigDict({"steps": FieldReference("a")})',
    b'from ml_collections import ConfigDict\n'
    b'def get_config(m): return ConfigDict({"model": 3, "balancer": None})',
    b'from ml_collections import ConfigDict\n'
    b'def get_config(m): return ConfigDict({"balancer": {1: 2}})',
    b'from ml_collections import ConfigDict\n'
    b'def get_config(m): return ConfigDict({"balancer": {}})',
  ],
)
@pytest.mark.parametrize('flag', ['--config.steps=3', '--config.model.width=8'])
def test_odd_experiment_files_are_one_line(content, flag, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_bytes(content)
  for method in ('', ':bip', ':\x00'):
    one_line_or_config([f'--config={path}{method}', flag])
    one_line_or_config([f'--config={path}{method}'])


def test_interrupt_of_an_experiment_file_is_an_interrupt(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('raise KeyboardInterrupt')
  with pytest.raises(KeyboardInterrupt):
    command_line.load_experiment(str(path))


# --- What is in range can be traced ------------------------------------------

choice = st.sampled_from
fitting_options = st.fixed_dictionaries(
  {
    'batch_size': choice([16, 48]),
    'sequence_length': choice([2, 3, 8, 17]),
    'accumulation': choice([1, 1, 2]),
    'steps': choice([1, 2, 10**9]),
    'capacity_factor': choice([0.0, 1e-9, 0.7, 1.0, 2.0**14]),
    'learning_rate': choice([1e-320, 1e-3, 1e3]),
    'gradient_clip': choice([1e-45, 1.0, 1e30]),
    'model': st.fixed_dictionaries(
      {
        'width': choice([8, 16]),
        'hidden': choice([1, 3, 8]),
        'experts': choice([8, 16]),
        'experts_per_token': choice([1, 2, 3, 8]),
        'shared_experts': choice([0, 1, 2]),
        'scoring': choice(['softmax', 'sigmoid']),
        'renormalize_gates': st.booleans(),
        'round_to_capacity': st.booleans(),
        'shards': choice([0, 0, 0, 8]),
        'dtype': choice(['float32', 'bfloat16']),
        'layers': choice([1, 3]),
        'dense_hidden': choice([1, 4]),
        'heads': choice([2, 4]),
        'kv_heads': choice([1, 2]),
        'rope_theta': choice([1e-3, 1.0, 1e30]),
        'norm_epsilon': choice([1e-320, 1e-5, 1.0]),
        'remat': st.just(True),
      }
    ),
    'mesh': choice([{}, {'data': 1, 'expert': -1}, {'expert': 2}]).flatmap(
      lambda axes: st.booleans().map(lambda fsdp: {**axes, 'fsdp': fsdp})
    ),
    'data': st.just({'vocabulary': 300}),
  }
)
# Each may go with none, some or all of those.
other_options = choice(
  [
    ('batch_size', 6),
    ('batch_size', 2**20),
    ('sequence_length', 2**20),
    ('accumulation', 3),
    ('accumulation', 16),
    ('warmup_steps', 1),
    ('mesh.data', 2),
    ('mesh.data', -1),
    ('mesh.data', 0),
    ('mesh.expert', 2),
    ('mesh.expert', 2**14),
    ('model.width', 2),
    ('model.width', 12),
    ('model.width', 2**17),
    ('model.hidden', 2**20),
    ('model.experts', 1),
    ('model.experts', 3),
    ('model.experts', 2**14),
    ('model.dense_layers', 1),
    ('model.heads', 1),
    ('model.kv_heads', 4),
    ('model.layers', 2**10),
    ('model.remat', False),
    ('model.shared_experts', 2**10),
    ('model.shards', 1),
    ('model.shards', 16),
    ('model.shards', 2**20),
    ('data.vocabulary', 2**24),
  ]
)
TEXTS = {
  'cutoff': ['next', 'midpoint'],
  'estimator': ['exact', 'histogram'],
  'over': ['sequence', 'batch'],
  'rule': ['sign', 'proportional'],
  'scope': ['global', 'shard'],
}


def values_of(name, default):
  if type(default) is bool:
    return st.booleans()
  if type(default) is str:
    return choice(TEXTS[name])
  said = config.ARGUMENTS[name]
  return choice([type(default)(x) for x in (said.least, default, said.most)])


@st.composite
def small_configs(draw):
  """Options that may or may not fit together."""
  method = draw(st.sampled_from(['bip', 'loss_controlled', *config.METHODS]))
  balancer = config.balancer_options(**config.METHODS[method])
  for name, value in balancer.items():
    if name != 'name':
      balancer[name] = draw(values_of(name, value))
  options = {'balancer': balancer, **draw(fitting_options)}
  for name, value in draw(st.lists(other_options, max_size=1)):
    *groups, last = name.split('.')
    section = options[groups[0]] if groups else options
    section[last] = value
  return options


def trace_or_refuse(options, devices):
  """Traces a training step, or gets ValueError that we raised ourselves."""
  try:
    frozen = config.freeze(options)
    mesh = meshes.make_mesh(
      frozen.mesh.data, frozen.mesh.expert, devices=jax.devices()[:devices]
    )
    training = state.make_training(frozen, mesh)
  except ValueError as error:
    assert type(error) is ValueError
    frame = traceback.extract_tb(error.__traceback__)[-1]
    assert '/moe_jax/' in frame.filename, frame
    return False
  tokens = jax.ShapeDtypeStruct(
    (frozen.batch_size, frozen.sequence_length),
    jnp.int32,
    sharding=jax.sharding.NamedSharding(mesh, meshes.BATCH),
  )
  train_step = step.make_train_step(frozen, training)
  train_step.trace(training.abstract, batches.Batch(tokens, tokens))
  return True


@pytest.mark.long
@hypothesis.settings(NO_DEADLINE, max_examples=100)
@hypothesis.given(small_configs(), st.sampled_from([1, 2, 8]))
def test_any_config_is_refused_or_traced(options, devices):
  trace_or_refuse(options, devices)


@pytest.mark.long
@pytest.mark.parametrize('end', ['least', 'most'])
def test_each_end_of_a_range_is_refused_or_traced(end):
  outcomes = {}
  small = {'width': 16, 'hidden': 16, 'layers': 1}
  for name, field in NUMBERS.items():
    if name == 'model.layers':
      continue  # 1024 layers are traced, but not in seconds.
    said = field.metadata[Option]
    value = said.most if end == 'most' else said.least
    if value is None:
      value = 1e-323  # Just above 0.
    options = with_option(name, field.type(value), **small)
    outcomes[name] = trace_or_refuse(options, 1)
  assert sum(outcomes.values()) > len(outcomes) / 2, outcomes


# --- Work directories --------------------------------------------------------


def content(folder):
  return {
    path.relative_to(folder): path.read_bytes() if path.is_file() else None
    for path in folder.rglob('*')
  }


def refused_and_left_alone(argv):
  with tempfile.TemporaryDirectory() as parent:
    new, old = pathlib.Path(parent) / 'new', pathlib.Path(parent) / 'old'
    old.mkdir()
    (old / 'notes.txt').write_text('mine')
    (old / 'metrics.jsonl').write_bytes(b'\xff\x00')
    before = content(pathlib.Path(parent))
    for workdir in (new, old):
      with contextlib.redirect_stderr(io.StringIO()) as errors:
        assert command_line.main(['main', f'--workdir={workdir}', *argv]) == 2
      assert errors.getvalue().startswith('error: ')
      assert len(errors.getvalue().splitlines()) == 1
    assert content(pathlib.Path(parent)) == before


refused = command_lines.map(
  lambda argv: [
    # A last word that is wrong whatever came before.
    *(word for word in argv if 'workdir' not in word and 'help' not in word),
    '--config.steps=-1',
  ]
).filter(lambda argv: '-h' not in argv)


@hypothesis.settings(NO_DEADLINE, max_examples=40)
@hypothesis.given(refused)
def test_refused_flags_leave_work_directories_alone(argv):
  refused_and_left_alone(argv)


@pytest.mark.long
@hypothesis.settings(NO_DEADLINE, max_examples=1000)
@hypothesis.given(refused)
def test_refused_flags_leave_work_directories_alone_long(argv):
  refused_and_left_alone(argv)


@pytest.mark.parametrize(
  'flag',
  [
    'mesh.data=77',
    'batch_size=9',
    'replay_routes=nothing_of_that_name',
    'replay_routes=' + 'x' * 300,
    'init_from=nothing_of_that_name',
    'init_from=' + 'x' * 300 + '@7',
    'data.anneal_corpus=sotu',
    'data.corpus=, ',
    'data.dataset=nothing_of_that_name',
    'data.dataset=text_files',
    'data.files=nothing_of_that_name.txt',
    'data.cache_dir=Makefile/below',
    'data.cache_dir=gs://bucket/cache',
    'data.cache_dir=' + 'x' * 300,
    'data.cache_dir=~nobody_of_that_name/cache',
    'data.files=~nobody_of_that_name/a.txt',
    'data.dataset=lm1b --config.data.tfds_dir=~nobody_of_that_name/x',
    'data.evaluation_sets=nothing_of_that_name',
  ],
)
def test_what_is_refused_late_leaves_work_directories_alone(flag):
  files = 'data.dataset=text_files' if 'files' in flag else 'steps=1'
  refused_and_left_alone(
    [
      f'--config={DEMO}:bip',
      '--config.mesh.data=8',
      f'--config.{files}',
      *f'--config.{flag}'.split(),
    ]
  )
