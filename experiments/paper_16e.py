"""MiniMind with 16 experts, 302.7 M parameters: the paper's 0.3B model.

Sizes, optimizer and batch are those of arXiv 2502.15451, section 4, and of
MiniMind's trainer (AdamW 5e-4, cosine to a tenth, clip 1.0, 32 x 8 sequences).
The paper does not state its number of tokens; 1,000 steps of 131,072 tokens
are ours. Its text, MiniMind's pretrain_hq.jsonl, is given by
--config.data.dataset=text_files --config.data.files=pretrain_hq.jsonl.

  python -m moe_jax.main --config=experiments/paper_16e.py:bip --workdir=DIR
"""

from ml_collections import ConfigDict

from moe_jax import config as config_lib


def get_config(method: str = 'bip') -> ConfigDict:
  """Returns the options under one method."""
  config = config_lib.default_config(method)
  config.steps = 1000
  config.batch_size = 256
  config.accumulation = 8
  config.sequence_length = 512
  config.learning_rate = 5e-4
  config.eval_every = 100
  config.checkpoint_every = 100
  config.model.experts = 16
  config.model.experts_per_token = 4
  if method == 'quantile':  # Exact ones do not add up over microbatches.
    config.balancer.estimator = 'histogram'
  return config
