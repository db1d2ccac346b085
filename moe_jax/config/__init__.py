"""What can be configured: ml_collections outside, frozen dataclasses inside.

The fields of `Config` and of its sections are the one list of options: default,
type, range, meaning and whether it may change in a continued run. Experiment
files fill in a `ConfigDict` made from them, flags override its fields, and
`freeze` turns it into a validated `Config`, once.
"""

from moe_jax.config.balancers import ARGUMENTS
from moe_jax.config.balancers import BALANCERS
from moe_jax.config.balancers import METHODS
from moe_jax.config.balancers import balancer_options
from moe_jax.config.balancers import make_balancer
from moe_jax.config.balancers import method_of
from moe_jax.config.changes import check_changes
from moe_jax.config.changes import differences
from moe_jax.config.changes import is_among
from moe_jax.config.changes import may_change
from moe_jax.config.changes import upgrade
from moe_jax.config.dicts import default_config
from moe_jax.config.dicts import flatten
from moe_jax.config.dicts import freeze
from moe_jax.config.dicts import to_dict
from moe_jax.config.schema import Config
from moe_jax.config.schema import MeshConfig
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
  'is_among',
  'make_balancer',
  'may_change',
  'method_of',
  'split_names',
  'to_dict',
  'upgrade',
]
