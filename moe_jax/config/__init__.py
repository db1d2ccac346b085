"""What can be configured: ml_collections outside, frozen dataclasses inside.

The fields of `Config` and of its sections are the one list of options: default,
type, range, meaning and whether it may change in a continued run. Experiment
files fill in a `ConfigDict` made from them, flags override its fields, and
`freeze` turns it into a validated `Config`, once.
"""

from moe_jax.config.balancers import (
  ARGUMENTS,
  BALANCERS,
  METHODS,
  balancer_options,
  method_of,
)
from moe_jax.config.changes import (
  check_changes,
  differences,
  may_change,
  upgrade,
)
from moe_jax.config.dicts import default_config, flatten, freeze, to_dict
from moe_jax.config.schema import Config, MeshConfig
from moe_jax.data.config import split_names

__all__ = [
  'ARGUMENTS',
  'BALANCERS',
  'METHODS',
  'Config',
  'MeshConfig',
  'balancer_options',
  'check_changes',
  'default_config',
  'differences',
  'flatten',
  'freeze',
  'may_change',
  'method_of',
  'split_names',
  'to_dict',
  'upgrade',
]
