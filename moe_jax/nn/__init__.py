"""Flax NNX modules: they own parameters and router state."""

from moe_jax.nn.config import DecoderConfig, MoEConfig
from moe_jax.nn.decoder import Decoder, DecoderCache
from moe_jax.nn.decoding import generate
from moe_jax.nn.layout import (
  carry_prices,
  is_stacked,
  moe_layers,
  parameter_counts,
  parameter_specs,
  prices,
  useful_flops,
)
from moe_jax.nn.moe import MoE, RouterState, update_routers
from moe_jax.nn.router import MoEOutput, router_metrics

__all__ = [
  'Decoder',
  'DecoderCache',
  'DecoderConfig',
  'MoE',
  'MoEConfig',
  'MoEOutput',
  'RouterState',
  'carry_prices',
  'generate',
  'is_stacked',
  'moe_layers',
  'parameter_counts',
  'parameter_specs',
  'prices',
  'router_metrics',
  'update_routers',
  'useful_flops',
]
