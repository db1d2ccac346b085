"""MiniMind with 16 experts, 302.7 M parameters: the paper's 0.3B model.

Sizes, optimizer and batch are those of arXiv 2502.15451, section 4, and of
MiniMind's trainer (AdamW 5e-4, cosine to a tenth, clip 1.0, 32 x 8 sequences).
The paper does not state its number of tokens; 1,000 steps of 131,072 tokens
are ours. Its text, MiniMind's pretrain_hq.jsonl, is given by
--config.data.dataset=text_files --config.data.files=pretrain_hq.jsonl.

  python -m moe_jax.main --config=experiments/paper_16e.py:bip --workdir=DIR
"""

from ml_collections import ConfigDict

from moe_jax import config


def get_config(method: str = 'bip') -> ConfigDict:
  """Returns the options under one method."""
  options = config.default_config(method)
  options.steps = 1000
  options.batch_size = 256
  options.accumulation = 8
  options.sequence_length = 512
  options.learning_rate = 5e-4
  options.eval_every = 100
  options.checkpoint_every = 100
  options.model.experts = 16
  options.model.experts_per_token = 4
  if method == 'quantile':  # Exact quantiles do not add up over microbatches.
    options.balancer.estimator = 'histogram'
  return options
