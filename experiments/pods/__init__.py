"""Trainings whose model and batch suit a pod: one file for each model.

Each names its machines and how many tokens a chip has of a step: several
thousand, or what a step costs whatever its tokens would weigh too much. The
default rule is `midpoint` with one iteration; for the reason see
experiments/results/benchmarks/traffic.md.
"""

from ml_collections import ConfigDict

from moe_jax import config


def for_pod(
  options: ConfigDict, *, expert: int, fsdp: bool = False
) -> ConfigDict:
  """Returns the options with what all pods have in common.

  Rounding gives each expert exactly its even share, so that buffers are static
  and small, all devices exchange equal amounts and nothing is dropped.

  Args:
    options: of another experiment; they are changed.
    expert: devices that share the experts of a layer: a side of a TPU slice or
      the GPUs of a node, the fastest links.
    fsdp: whether the other devices share parameters and moments as well.
  """
  options.accumulation = 1
  options.capacity_factor = 0.0
  options.mesh.update(data=-1, expert=expert, fsdp=fsdp)
  options.model.update(dtype='bfloat16', remat=True, round_to_capacity=True)
  return options


def pretraining(method: str, *, expert: int, fsdp: bool = False) -> ConfigDict:
  """Returns options of a long training of a large model on a pod."""
  options = for_pod(config.default_config(method), expert=expert, fsdp=fsdp)
  options.steps = 100_000
  options.warmup_steps = 2_000
  options.sequence_length = 4096
  options.learning_rate = 3e-4
  options.weight_decay = 0.1
  options.eval_every = 1_000
  options.checkpoint_every = 1_000
  options.experts_every = 100  # All of them would be most of the metrics.
  options.data.vocabulary = 65_536
  return options
