"""What can be configured: ml_collections outside, frozen dataclasses inside.

The dataclasses are the one list of options, defaults and types. Experiment
files fill in a `ConfigDict` made from them, flags override its fields, and
`freeze` turns it back into validated dataclasses, once.
"""

from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import difflib
import inspect
import math
from typing import Any
from typing import ClassVar

from ml_collections import ConfigDict

from moe_jax import routing
from moe_jax.data import DataConfig
from moe_jax.data.config import split_names as split_names
from moe_jax.nn import DecoderConfig
from moe_jax.options import Range
from moe_jax.options import check_range
from moe_jax.options import check_ranges
from moe_jax.options import is_plain
from moe_jax.options import one_line
from moe_jax.options import shown

# `balancer.name` -> the function whose arguments the other fields are.
BALANCERS = {
  'bip': routing.bip,
  'loss_controlled': routing.loss_controlled,
  'loss_free': routing.loss_free,
  'midpoint': routing.midpoint,
  'quantile': routing.quantile,
  'sinkhorn': routing.sinkhorn,
  'unbalanced': routing.unbalanced,
}

# Of the numbers among those arguments. The functions know what is impossible;
# these are the bounds of what jax and the memory can take.
BALANCER_RANGES = {
  'alpha': Range(0, 1e6),
  'bins': Range(2, 2**20),
  'ema': Range(0, 1),
  'iterations': Range(0, 10**6),
  'rate': Range(0, 1e6),
  'temperature': Range(1e-6, 1e6),
}

# What `--config=FILE.py:METHOD` accepts: the settings of arXiv 2502.15451 for
# its three methods, and the other rules with their defaults.
METHODS = {
  'loss_controlled': {'name': 'loss_controlled', 'alpha': 0.1},
  'loss_free': {'name': 'loss_free', 'rate': 1e-3},
  'bip': {'name': 'bip', 'iterations': 4},
  'bip_t2': {'name': 'bip', 'iterations': 2},
  'bip_t8': {'name': 'bip', 'iterations': 8},
  'bip_t14': {'name': 'bip', 'iterations': 14},
  'bip_lag': {'name': 'bip', 'iterations': 4, 'lag': True},
  'midpoint': {'name': 'midpoint', 'iterations': 4},
  'midpoint_lag': {'name': 'midpoint', 'iterations': 4, 'lag': True},
  'quantile': {'name': 'quantile'},
  'quantile_histogram': {'name': 'quantile', 'estimator': 'histogram'},
  'sinkhorn': {'name': 'sinkhorn'},
  'unbalanced': {'name': 'unbalanced'},
}

# Options, or groups of them, that may change when a run is continued and may
# differ between runs that are compared: they change nothing that is computed.
MAY_CHANGE = (
  'mesh',
  'checkpoint_every',
  'checkpoints_kept',
  'checkpoints_kept_every',
  'checkpoints_kept_best',
  'skipped_steps',
  'experts_every',
  'model.ragged_exchange',
)

# What may change, too, where --allow_config_change names it.
CHANGEABLE = (
  'steps',
  'learning_rate',
  'warmup_steps',
  'weight_decay',
  'gradient_clip',
  'accumulation',
  'capacity_factor',
  'eval_every',
  'eval_sequences',
  'method',
  'balancer',
  'model.dtype',
  'model.remat',
  'model.round_to_capacity',
  'model.router_z_loss',
  'model.shards',
  'data.evaluation_sets',
)

# Model options that follow from others and are not set by themselves.
_DERIVED = ('vocabulary', 'capacity_factor')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; -1 takes what is left.

  Attributes:
    data: copies of the model, each with its own part of the batch.
    expert: parts into which the experts are split.
    fsdp: whether parameters and optimizer state are split over `data`, too
      (ZeRO-3); needs model.remat.
  """

  RANGES: ClassVar[dict[str, Range]] = {
    'data': Range(-1, 2**20),
    'expert': Range(-1, 2**14),
  }

  data: int = -1
  expert: int = 1
  fsdp: bool = False

  def __post_init__(self):
    check_ranges(self, self.RANGES, 'mesh.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One training run.

  Attributes:
    method: its name in tables and figures.
    steps: optimizer steps.
    seed: of the initial weights and the order of the data.
    batch_size: sequences a step, over all devices and microbatches.
    sequence_length: tokens a sequence.
    accumulation: microbatches a step, one after the other.
    learning_rate: peak, after warm-up; then a cosine to a tenth of it.
    warmup_steps: steps of linear warm-up.
    weight_decay: of AdamW, on every parameter, as in MiniMind.
    gradient_clip: greatest global norm of the gradient.
    capacity_factor: room of each expert in training, in units of its even
      share; 0.0 is dropless.
    eval_every: steps between evaluations; 0 evaluates at the end only.
    eval_sequences: of each set, at most that many; 0 takes all.
    checkpoint_every: steps between checkpoints; the end has one, too.
    checkpoints_kept: the newest that many are kept.
    checkpoints_kept_every: those of every so many steps are kept, too; 0 for
      none.
    checkpoints_kept_best: those that many of the least validation loss are
      kept, too, of those that were saved at a step with an evaluation.
    skipped_steps: a step whose loss, gradient or router logits are not finite
      changes nothing; that many in a row end the run.
    experts_every: steps between records of every expert's load and price, the
      greater part of the metrics where there are many experts.
    balancer: its name and the arguments of its function.
    model: sizes of the language model.
    mesh: the devices.
    data: the text.
  """

  RANGES: ClassVar[dict[str, Range]] = {
    'steps': Range(1, 10**9),
    'batch_size': Range(1, 2**24),
    'sequence_length': Range(2, 2**24),
    'accumulation': Range(1, 2**24),
    'checkpoint_every': Range(1, 10**9),
    'checkpoints_kept': Range(1, 10**6),
    'checkpoints_kept_every': Range(0, 10**9),
    'checkpoints_kept_best': Range(0, 10**6),
    'skipped_steps': Range(1, 10**9),
    'experts_every': Range(1, 10**9),
    'seed': Range(0, 2**32 - 1),  # jax would take it modulo 2^32.
    'warmup_steps': Range(0, 10**9),
    'learning_rate': Range(0, 1e3, above=True),
    'gradient_clip': Range(0, 1e30, above=True),
    'capacity_factor': DecoderConfig.RANGES['capacity_factor'],
    'weight_decay': Range(0, 1e3),
    'eval_every': Range(0, 10**9),
    'eval_sequences': Range(0, 10**9),
  }

  method: str = 'bip'
  steps: int = 200
  seed: int = 0
  batch_size: int = 8
  sequence_length: int = 256
  accumulation: int = 1
  learning_rate: float = 5e-4
  warmup_steps: int = 0
  weight_decay: float = 0.01
  gradient_clip: float = 1.0
  capacity_factor: float = 0.0
  eval_every: int = 0
  eval_sequences: int = 0
  checkpoint_every: int = 100
  checkpoints_kept: int = 2
  checkpoints_kept_every: int = 0
  checkpoints_kept_best: int = 0
  skipped_steps: int = 10
  experts_every: int = 1
  balancer: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: balancer_options('bip')
  )
  model: DecoderConfig = DecoderConfig()
  mesh: MeshConfig = MeshConfig()
  data: DataConfig = DataConfig()

  def __post_init__(self):
    check_ranges(self, self.RANGES)
    chosen = self.model.experts_per_token
    pairs = self.batch_size * self.sequence_length * chosen
    if pairs >= 2**31:
      raise ValueError(
        f'batch_size={self.batch_size}: times sequence_length='
        f'{self.sequence_length} times model.experts_per_token={chosen} must '
        'be less than 2^31, or the loads of a step could not be counted'
      )
    if self.batch_size % self.accumulation:
      raise ValueError(
        f'accumulation={self.accumulation}: must divide '
        f'batch_size={self.batch_size}'
      )
    if self.warmup_steps >= self.steps:
      raise ValueError(
        f'warmup_steps={self.warmup_steps}: must be less than '
        f'steps={self.steps}'
      )
    if self.mesh.fsdp and not self.model.remat:
      raise ValueError(
        'mesh.fsdp=True: needs model.remat=True, or the gathered weights of '
        'all layers would be kept for the backward pass'
      )
    make_balancer(self.balancer)
    if self.accumulation > 1 and self.balancer.get('estimator') == 'exact':
      raise ValueError(
        f'accumulation={self.accumulation}: an exact quantile does not add up '
        "over microbatches; set balancer.estimator='histogram'"
      )
    expected = METHODS.get(self.method, {}).get('name')
    if self.balancer['name'] != expected:
      raise ValueError(
        f'method={self.method!r}: does not stand for balancer.name='
        f'{self.balancer["name"]!r}; choose it by --config=FILE.py:METHOD'
      )


def balancer_options(name: str, **arguments: Any) -> dict[str, Any]:
  """Returns every option of a balancer, defaults filled in from its function.

  Args:
    name: a key of `BALANCERS`.
    **arguments: those that are not to have their default.
  """
  if not isinstance(name, str) or name not in BALANCERS:
    raise ValueError(
      f'balancer.name={shown(name)}: {_expected(name, BALANCERS)}'
    )
  parameters = inspect.signature(BALANCERS[name]).parameters
  options = {key: value.default for key, value in parameters.items()}
  for key, value in arguments.items():
    if key not in options:
      raise ValueError(
        f'balancer.{one_line(key)}: {name} has no such option, but '
        f'{", ".join(options) or "none at all"}; another method is chosen by '
        f'--config=FILE.py:METHOD'
      )
    options[key] = _typed(f'balancer.{key}', value, type(options[key]))
  return {'name': name, **options}


def make_balancer(options: Mapping[str, Any]) -> routing.Balancer:
  """Calls the balancer's function with its options."""
  options = balancer_options(**options)
  name = options.pop('name')
  for key in options.keys() & BALANCER_RANGES.keys():
    check_range(f'balancer.{key}', options[key], BALANCER_RANGES[key])
  try:
    return BALANCERS[name](**options)
  except ValueError as error:
    raise ValueError(f'balancer.{error}') from error


def default_config(method: str = 'bip') -> ConfigDict:
  """Returns every option with its default and the balancer of `method`.

  Args:
    method: a key of `METHODS`.
  """
  if method not in METHODS:
    raise ValueError(f'method {method!r}: {_expected(method, METHODS)}')
  balancer = balancer_options(**METHODS[method])
  return ConfigDict(to_dict(Config(method=method, balancer=balancer)))


def to_dict(config: Config) -> dict[str, Any]:
  """Returns the options as nested dicts of numbers, strings and booleans."""
  options = dataclasses.asdict(config)
  for name in _DERIVED:
    del options['model'][name]
  return options


def flatten(options: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns nested options by their full names, such as `model.experts`."""
  flat = {}
  for name, value in options.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def is_among(name: str, options: Iterable[str]) -> bool:
  """Whether an option is one of `options`, or in a group that is one."""
  return any(name == of or name.startswith(f'{of}.') for of in options)


def freeze(options: ConfigDict | Mapping[str, Any]) -> Config:
  """Builds the validated `Config`.

  Raises:
    ValueError: an option is unknown, of the wrong type or impossible; the
      message names it, its value and what would work.
  """
  if isinstance(options, ConfigDict):
    options = options.to_dict()
  sections = dict(options)
  _check_names(sections, [field.name for field in dataclasses.fields(Config)])
  for name, kind in (
    ('model', DecoderConfig),
    ('mesh', MeshConfig),
    ('data', DataConfig),
  ):
    section = _group(sections, name)
    if name == 'model' and set(section) & set(_DERIVED):
      raise ValueError(f'model: {_DERIVED} follow from other options')
    sections[name] = _build(kind, section, f'{name}.')
  if 'balancer' in sections:
    sections['balancer'] = balancer_options(**_balancer_group(sections))
  config = _build(Config, sections, '')
  model = dataclasses.replace(
    config.model,
    vocabulary=config.data.vocabulary,
    capacity_factor=config.capacity_factor,
  )
  return dataclasses.replace(config, model=model)


def _group(sections: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  section = sections.get(name, {})
  if not isinstance(section, Mapping):
    raise ValueError(f'{name}={shown(section)}: must be a group of options')
  return section


def _balancer_group(sections: Mapping[str, Any]) -> dict[str, Any]:
  section = dict(_group(sections, 'balancer'))
  for name in section:
    if not isinstance(name, str):
      raise ValueError(f'balancer.{shown(name)}: names are strings')
  if 'name' not in section:
    raise ValueError(
      f'balancer.name: missing; known are {", ".join(BALANCERS)}'
    )
  return section


def _check_names(options, known, prefix: str = '') -> None:
  for name in options:
    if name not in known:
      raise ValueError(f'{prefix}{one_line(name)}: {_expected(name, known)}')


def _build(kind: type, options: Mapping[str, Any], prefix: str):
  fields = {field.name: field for field in dataclasses.fields(kind)}
  _check_names(options, fields, prefix)
  checked = {}
  for name, value in options.items():
    wanted = fields[name].type
    if wanted in (int, float, str, bool):
      value = _typed(f'{prefix}{name}', value, wanted)
    checked[name] = value
  return kind(**checked)


def _typed(name: str, value: Any, wanted: type) -> Any:
  if wanted is float and type(value) is int and abs(value) < 2**1000:
    return float(value)
  if type(value) is not wanted:
    raise ValueError(
      f'{name}={shown(value)}: must be of type {wanted.__name__}'
    )
  if wanted is float and not math.isfinite(value):
    raise ValueError(f'{name}={value}: must be finite')
  if wanted is str and not is_plain(value):
    raise ValueError(
      f'{name}={shown(value)}: must be one line without control characters'
    )
  return value


def _expected(name: str, known) -> str:
  close = difflib.get_close_matches(str(name), known, n=1)
  hint = f'did you mean {close[0]}? ' if close else ''
  return f'unknown; {hint}known are {", ".join(sorted(known))}'
