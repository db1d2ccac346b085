"""What uneven loads would cost the paper's model on several H100."""

from collections.abc import Callable
import functools

from experiments import paper_16e
from moe_jax import config as config_lib
from moe_jax.analysis.placement_study import Options
from moe_jax.analysis.step_time import step_time


@functools.cache
def of_paper(devices: int) -> Callable[[float], float]:
  """Returns the time of a step from its imbalance, over that with even loads.

  Args:
    devices: that share the 16 experts of each layer.

  Returns:
    A function of max over mean load of the devices, mean over layers.
  """
  config = config_lib.freeze(paper_16e.get_config())
  model = config.model
  tokens = config.batch_size * config.sequence_length
  time = step_time(
    config_lib.to_dict(config),
    pairs=tokens * model.experts_per_token,
    devices=devices,
    flops=Options.flops,
    bandwidth=Options.bandwidth,
  )
  return lambda imbalance: time.seconds(imbalance) / time.seconds(1.0)
