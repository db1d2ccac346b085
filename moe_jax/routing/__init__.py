"""The mathematics of load balancing: pure functions of arrays, jax only.

Every rule picks experts the same way, by the top-k of scores minus prices q;
rules differ in how q comes about (`solve`, `update`) and whether a loss is
added. This folder imports nothing else of the project.
"""

from .balancer import Balancer, State, zero_observation
from .bip import bip, dual_iterations, midpoint
from .loss_free import loss_free
from .losses import auxiliary_loss, loss_controlled
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
from .selection import Choice, choose
from .sinkhorn import sinkhorn
from .unbalanced import unbalanced
from .violation import max_violation, min_violation

__all__ = [
  'Balancer',
  'Choice',
  'State',
  'StreamRule',
  'StreamState',
  'assign_stream',
  'auxiliary_loss',
  'bip',
  'choose',
  'dual_iterations',
  'kth_largest',
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
  'round_to_capacity',
  'sinkhorn',
  'unbalanced',
  'within_capacity',
  'zero_observation',
]
