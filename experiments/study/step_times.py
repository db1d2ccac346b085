"""What uneven loads would cost the paper's model on several H100."""

import functools

from experiments import paper_16e
from launch import hardware
from moe_jax import config as config_lib
from moe_jax.analysis.step_time import StepTime, step_time

# Of a dual iteration on GPUs: `moe_jax.routing.kth_largest` has 8, with the
# value that follows two more.
ALL_REDUCES = {'bip': 8, 'midpoint': 10}
_CHIP = hardware.CHIPS['h100']  # In nodes of eight, as a DGX has them.


@functools.cache
def of_paper(devices: int) -> StepTime:
  """Returns the time of a step of 131,072 tokens, without solves of prices.

  Args:
    devices: that share the 16 experts of each layer; from node to node they
      exchange by the network.
  """
  config = config_lib.freeze(paper_16e.get_config())
  model = config.model
  tokens = config.batch_size * config.sequence_length
  return step_time(
    config_lib.to_dict(config),
    pairs=tokens * model.experts_per_token,
    devices=devices,
    flops=_CHIP.peak,
    bandwidth=_bandwidth(devices),
  )


def _bandwidth(devices: int) -> float:
  """Returns bytes/s with which one sends equal parts to all others."""
  near = min(devices, _CHIP.node) - 1
  far = devices - 1 - near
  return (devices - 1) / (near / _CHIP.link + far / _CHIP.network)


def over_even(devices: int, imbalance: float) -> float:
  """Returns the time of a step over that with even loads.

  Args:
    devices: that share the experts.
    imbalance: max over mean load of the devices, mean over layers.
  """
  time = of_paper(devices)
  return time.seconds(imbalance) / time.seconds(1.0)


def solves(devices: int, method: str, iterations: int = 4) -> float:
  """Returns the seconds of latency of a step's solves, one a layer.

  Args:
    devices: that solve together.
    method: a key of `ALL_REDUCES`.
    iterations: of a solve.
  """
  latency = _CHIP.hop + (_CHIP.far if devices > _CHIP.node else 0.0)
  layers = config_lib.freeze(paper_16e.get_config()).model.layers
  return layers * iterations * ALL_REDUCES[method] * latency
