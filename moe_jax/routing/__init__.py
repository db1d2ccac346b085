"""The mathematics of load balancing: pure functions of arrays, jax only.

Every rule picks experts the same way, by the top-k of scores minus prices q;
rules differ in how q comes about (`solve`, `update`) and whether a loss is
added. This folder imports nothing else of the project.
"""

from moe_jax.routing.auxiliary_loss import auxiliary_loss
from moe_jax.routing.auxiliary_loss import loss_controlled
from moe_jax.routing.balancer import Balancer
from moe_jax.routing.balancer import Choice
from moe_jax.routing.balancer import State
from moe_jax.routing.balancer import choose
from moe_jax.routing.balancer import unbalanced
from moe_jax.routing.balancer import zero_observation
from moe_jax.routing.bias import loss_free
from moe_jax.routing.dual import bip
from moe_jax.routing.dual import dual_iterations
from moe_jax.routing.dual import midpoint
from moe_jax.routing.entropic import sinkhorn
from moe_jax.routing.oracle import lp_optimum
from moe_jax.routing.oracle import optimality
from moe_jax.routing.order_statistic import kth_largest
from moe_jax.routing.quantiles import quantile
from moe_jax.routing.rounding import round_to_capacity
from moe_jax.routing.streaming import StreamRule
from moe_jax.routing.streaming import StreamState
from moe_jax.routing.streaming import assign_stream
from moe_jax.routing.streaming import online_exact
from moe_jax.routing.streaming import online_histogram
from moe_jax.routing.streaming import regret
from moe_jax.routing.streaming import within_capacity
from moe_jax.routing.violation import max_violation
from moe_jax.routing.violation import min_violation

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
