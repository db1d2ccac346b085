"""Public models in the formats of transformers: in, out and what they mean.

Mixtral, OLMoE, Qwen3-MoE, GLM-4-MoE and DeepSeek-V3.
"""

from moe_jax.hf.exporting import export_model
from moe_jax.hf.importing import import_model

__all__ = ['export_model', 'import_model']
