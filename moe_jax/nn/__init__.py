"""Flax NNX modules: they own parameters and router state."""

from moe_jax.nn.config import DecoderConfig
from moe_jax.nn.config import MoEConfig
from moe_jax.nn.decoder import Decoder
from moe_jax.nn.decoder import DecoderCache
from moe_jax.nn.decoder import parameter_specs
from moe_jax.nn.decoding import generate
from moe_jax.nn.moe import ExpertParam
from moe_jax.nn.moe import MoE
from moe_jax.nn.moe import MoEOutput
from moe_jax.nn.moe import RouterState

__all__ = [
  'Decoder',
  'DecoderCache',
  'DecoderConfig',
  'ExpertParam',
  'MoE',
  'MoEConfig',
  'MoEOutput',
  'RouterState',
  'generate',
  'parameter_specs',
]
