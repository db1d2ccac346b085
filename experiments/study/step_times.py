"""What uneven loads would cost the paper's model on several H100."""

import functools

from experiments import paper_16e
from launch import hardware
from moe_jax import config as config_lib
from moe_jax.analysis.placement_study import Options
from moe_jax.analysis.step_time import StepTime, step_time

# Of a dual iteration on GPUs, see `moe_jax.routing.kth_largest`.
ALL_REDUCES = 8


@functools.cache
def of_paper(devices: int) -> StepTime:
  """Returns the time of a step of 131,072 tokens, without solves of prices.

  Args:
    devices: that share the 16 experts of each layer.
  """
  config = config_lib.freeze(paper_16e.get_config())
  model = config.model
  tokens = config.batch_size * config.sequence_length
  return step_time(
    config_lib.to_dict(config),
    pairs=tokens * model.experts_per_token,
    devices=devices,
    flops=Options.flops,
    bandwidth=Options.bandwidth,
  )


def over_even(devices: int, imbalance: float) -> float:
  """Returns the time of a step over that with even loads.

  Args:
    devices: that share the experts.
    imbalance: max over mean load of the devices, mean over layers.
  """
  time = of_paper(devices)
  return time.seconds(imbalance) / time.seconds(1.0)


def solves(devices: int, iterations: int) -> float:
  """Returns the seconds of latency of a step's solves over all devices.

  Args:
    devices: in nodes of eight.
    iterations: of a solve, one a layer.
  """
  chip = hardware.CHIPS['h100']
  latency = chip.hop + (chip.far if devices > chip.node else 0.0)
  layers = config_lib.freeze(paper_16e.get_config()).model.layers
  return layers * iterations * ALL_REDUCES * latency
