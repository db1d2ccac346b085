"""7 B parameters, 1.3 B for a token: a model for one node of 8 H100.

Sizes are those of OLMoE-1B-7B (arXiv 2409.02060): 16 layers of width 2048, 64
experts of 1024, 8 for a token; one shared expert is ours. A step has 131,072
tokens, 16,384 for a GPU, which has 8 experts of each layer.

  python -m launch.plan --config=experiments/pods/moe_7b.py:midpoint_t1 \\
      --topology=h100:8
"""

from ml_collections import ConfigDict

from experiments.pods import pretraining


def get_config(method: str = 'midpoint_t1') -> ConfigDict:
  """Returns the options under one method."""
  options = pretraining(method, expert=8)
  options.batch_size = 32
  options.model.update(
    layers=16,
    width=2048,
    hidden=1024,
    experts=64,
    experts_per_token=8,
    heads=16,
    kv_heads=16,
  )
  return options
