"""MaxText's Mixtral-like model for a v6e pod: 754 B parameters, 123 B a token.

The sizes are those of MaxText's docs/guides/optimization/custom_model.md, which
publishes what it reaches on 256 chips with 8,192 tokens a chip: 49.8 % MFU with
capacity factor 1.0 and 38.1 % with 1.5. It is here to be planned, so that
launch/plan.py is held against a measurement; nobody trains it with this code.
What differs, and how it compares, is in experiments/results/plans/README.md.

  python -m experiments.maxtext.compare --out=FILE.json
"""

from ml_collections import ConfigDict

from moe_jax import config


def get_config(method: str = 'unbalanced') -> ConfigDict:
  """Returns the options under one method."""
  options = config.default_config(method)
  options.batch_size = 256
  options.sequence_length = 8192
  options.capacity_factor = 1.0
  options.mesh.data = 16
  options.mesh.expert = 16
  options.mesh.fsdp = True
  options.model.update(
    layers=56,
    width=8192,
    hidden=32_768,
    experts=16,
    experts_per_token=2,
    shared_experts=0,
    heads=128,
    kv_heads=8,
    head_size=256,
    dtype='bfloat16',
    remat=True,
  )
  options.data.vocabulary = 32_000
  return options
