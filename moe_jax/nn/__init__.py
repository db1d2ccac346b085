"""Flax NNX modules: they own parameters and router state."""

from moe_jax.nn.config import DecoderConfig
from moe_jax.nn.config import MoEConfig
from moe_jax.nn.decoder import Decoder
from moe_jax.nn.decoder import DecoderCache
from moe_jax.nn.decoding import generate
from moe_jax.nn.layout import carry_prices
from moe_jax.nn.layout import is_stacked
from moe_jax.nn.layout import moe_layers
from moe_jax.nn.layout import parameter_counts
from moe_jax.nn.layout import parameter_specs
from moe_jax.nn.layout import prices
from moe_jax.nn.moe import ExpertParam
from moe_jax.nn.moe import MoE
from moe_jax.nn.moe import RouterState
from moe_jax.nn.router import MoEOutput
from moe_jax.nn.router import router_metrics

__all__ = [
  'Decoder',
  'DecoderCache',
  'DecoderConfig',
  'ExpertParam',
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
]
