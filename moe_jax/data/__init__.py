"""Text to tokens to batches: corpora, tokenizer and the input pipeline."""

from moe_jax.data.batches import (
  document_positions,
  evaluation_batches,
  training_batches,
)
from moe_jax.data.config import DataConfig
from moe_jax.data.mixtures import Mixture, Source
from moe_jax.data.text import TextData, load_text, resolve, token_counts
from moe_jax.data.tokenizer import Tokenizer

__all__ = [
  'DataConfig',
  'Mixture',
  'Source',
  'TextData',
  'Tokenizer',
  'document_positions',
  'evaluation_batches',
  'load_text',
  'resolve',
  'token_counts',
  'training_batches',
]
