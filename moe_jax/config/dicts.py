"""Configs as nested dicts, as flags and JSON have them, and back."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from ml_collections import ConfigDict

from moe_jax.config.balancers import METHODS, balancer_options
from moe_jax.config.schema import Config
from moe_jax.options import build, expected, group, one_line


def default_config(method: str = 'bip') -> ConfigDict:
  """Returns every option with its default and the balancer of `method`.

  Args:
    method: a key of `METHODS`.
  """
  if method not in METHODS:
    raise ValueError(f'method {method!r}: {expected(method, METHODS)}')
  balancer = balancer_options(**METHODS[method])
  return ConfigDict(to_dict(Config(balancer=balancer)))


def freeze(options: ConfigDict | Mapping[str, Any]) -> Config:
  """Builds the validated `Config`.

  Raises:
    ValueError: an option is unknown, of the wrong type or impossible; the
      message names it, its value and what would work.
  """
  if isinstance(options, ConfigDict):
    options = options.to_dict()
  options = dict(options)
  if 'balancer' in options:
    balancer = group('balancer', options['balancer'])
    arguments = {one_line(name): value for name, value in balancer.items()}
    name = arguments.pop('name', '')
    options['balancer'] = balancer_options(name, **arguments)
  return build(Config, options)


def to_dict(config: Config) -> dict[str, Any]:
  """Returns the options as nested dicts of numbers, strings and booleans."""
  return dataclasses.asdict(config)


def flatten(options: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns nested options by their full names, such as `model.experts`."""
  flat = {}
  for name, value in options.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat
