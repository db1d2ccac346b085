"""The mathematics of load balancing: pure functions of arrays, jax only.

Every rule picks experts the same way, by the top-k of scores minus prices q;
rules differ in how q comes about (`solve`, `update`) and whether a loss is
added. This folder imports nothing else of the project.
"""

from .balancer import (
  Balancer,
  LossInputs,
  State,
  with_losses,
  zero_observation,
)
from .bip import bip, dual_iterations, midpoint
from .causal import causal_prices
from .loss_free import loss_free
from .losses import (
  auxiliary_loss,
  loss_controlled,
  similarity_loss,
  z_loss,
)
from .online import (
  StreamRule,
  StreamState,
  assign_stream,
  online_exact,
  online_histogram,
  regret,
  within_capacity,
)
from .oracle import lp_optimum, optimality
from .order_statistic import kth_largest
from .quantile import quantile
from .rounding import round_to_capacity
from .scoring import SCORINGS
from .selection import (
  Choice,
  check_groups,
  choose,
  choose_above,
  choose_by_experts,
  choose_evenly,
  competing,
  load_of,
  replay,
  with_gates,
)
from .sinkhorn import sinkhorn
from .threshold import threshold
from .unbalanced import unbalanced
from .violation import max_violation, min_violation

__all__ = [
  'Balancer',
  'Choice',
  'LossInputs',
  'SCORINGS',
  'State',
  'StreamRule',
  'StreamState',
  'assign_stream',
  'auxiliary_loss',
  'bip',
  'causal_prices',
  'check_groups',
  'choose',
  'choose_above',
  'choose_by_experts',
  'choose_evenly',
  'competing',
  'dual_iterations',
  'kth_largest',
  'load_of',
  'loss_controlled',
  'loss_free',
  'lp_optimum',
  'max_violation',
  'midpoint',
  'min_violation',
  'online_exact',
  'online_histogram',
  'optimality',
  'quantile',
  'regret',
  'replay',
  'round_to_capacity',
  'similarity_loss',
  'sinkhorn',
  'threshold',
  'unbalanced',
  'with_gates',
  'with_losses',
  'within_capacity',
  'z_loss',
  'zero_observation',
]
