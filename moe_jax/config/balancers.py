"""The balancers by name: their options are their functions' arguments."""

from collections.abc import Mapping
import inspect
from typing import Any

from moe_jax import routing
from moe_jax.options import Option, expected, one_line, shown, typed

# `balancer.name` -> the function whose arguments the other options are. Tables
# have methods in this order: the paper's three come first.
BALANCERS = {
  'loss_controlled': routing.loss_controlled,
  'loss_free': routing.loss_free,
  'bip': routing.bip,
  'midpoint': routing.midpoint,
  'quantile': routing.quantile,
  'sinkhorn': routing.sinkhorn,
  'threshold': routing.threshold,
  'unbalanced': routing.unbalanced,
}

# Ranges of the numbers among those arguments. The functions know what is
# impossible; these are the bounds of what jax and the memory can take.
ARGUMENTS = {
  'alpha': Option(least=0, most=1e6),
  'bins': Option(least=2, most=2**20),
  'ema': Option(least=0, most=1),
  'iterations': Option(least=0, most=10**6),
  'rate': Option(least=0, most=1e6),
  'temperature': Option(least=1e-6, most=1e6),
}

# What `--config=FILE.py:METHOD` accepts. The defaults of the three methods of
# arXiv 2502.15451 are the settings of the paper.
METHODS = {name: {'name': name} for name in BALANCERS} | {
  'bip_t2': {'name': 'bip', 'iterations': 2},
  'bip_t8': {'name': 'bip', 'iterations': 8},
  'bip_t14': {'name': 'bip', 'iterations': 14},
  'bip_lag': {'name': 'bip', 'lag': True},
  'midpoint_t1': {'name': 'midpoint', 'iterations': 1},
  'midpoint_lag': {'name': 'midpoint', 'lag': True},
  'quantile_histogram': {'name': 'quantile', 'estimator': 'histogram'},
}


def balancer_options(name: str, **arguments: Any) -> dict[str, Any]:
  """Returns every option of a balancer, defaults filled in from its function.

  Args:
    name: a key of `BALANCERS`.
    **arguments: those that are not to have their default.

  Raises:
    ValueError: the balancer or an option is unknown, or of the wrong type.
  """
  if not isinstance(name, str) or name not in BALANCERS:
    raise ValueError(
      f'balancer.name={shown(name)}: {expected(name, BALANCERS)}'
    )
  options = _defaults(name)
  for key, value in arguments.items():
    if key not in options:
      raise ValueError(
        f'balancer.{one_line(key)}: {name} has no such option, but '
        f'{", ".join(options) or "none at all"}; another method is chosen by '
        f'--config=FILE.py:METHOD'
      )
    options[key] = typed(f'balancer.{key}', value, type(options[key]))
  return {'name': name, **options}


def make_balancer(options: Mapping[str, Any]) -> routing.Balancer:
  """Calls the balancer's function with its options.

  Raises:
    ValueError: an option is unknown, of the wrong type or impossible.
  """
  options = balancer_options(**options)
  name = options.pop('name')
  for key in options.keys() & ARGUMENTS.keys():
    ARGUMENTS[key].check(f'balancer.{key}', options[key])
  try:
    return BALANCERS[name](**options)
  except ValueError as error:
    raise ValueError(f'balancer.{error}') from error


def filled(options: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a balancer's options, of another version maybe, with defaults."""
  name = options['name']
  return {'name': name, **_defaults(name), **options}


def method_of(
  options: Mapping[str, Any], losses: Mapping[str, float] | None = None
) -> str:
  """Returns the name of a balancer with its options, for tables and figures.

  Args:
    options: the group `balancer` of a config, of another version maybe.
    losses: the group `losses`.

  Returns:
    The key of `METHODS` that stands for exactly these options; else the
    function and the arguments that are not its defaults, such as
    `bip(iterations=6)`. Losses follow, as in `loss_free+sequence=0.0001`.
  """
  added = (
    f'+{name}={weight}' for name, weight in (losses or {}).items() if weight
  )
  return _balancer_name(options) + ''.join(added)


def _balancer_name(options: Mapping[str, Any]) -> str:
  for method, of_method in METHODS.items():
    if filled(of_method) == filled(options):
      return method
  defaults = filled({'name': options['name']}).items()
  changed = (
    f'{key}={value!r}'
    for key, value in options.items()
    if (key, value) not in defaults
  )
  return f'{options["name"]}({", ".join(changed)})'


def _defaults(name: str) -> dict[str, Any]:
  if name not in BALANCERS:  # Of another version.
    return {}
  parameters = inspect.signature(BALANCERS[name]).parameters
  return {key: parameter.default for key, parameter in parameters.items()}
