"""Text to tokens to batches: corpora, tokenizer and the input pipeline."""

from moe_jax.data.pipeline import DataConfig
from moe_jax.data.pipeline import TextData
from moe_jax.data.pipeline import evaluation_batches
from moe_jax.data.pipeline import load_text
from moe_jax.data.pipeline import token_counts
from moe_jax.data.pipeline import training_batches
from moe_jax.data.tokenizer import Tokenizer

__all__ = [
  'DataConfig',
  'TextData',
  'Tokenizer',
  'evaluation_batches',
  'load_text',
  'token_counts',
  'training_batches',
]
