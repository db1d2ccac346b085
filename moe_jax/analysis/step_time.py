"""How long a step would take: a small model of compute and exchange.

Shape letters: D model, F hidden, E experts, P devices.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

ASSUMPTIONS = (
  'A layer takes as long as its fullest device. Each of its pairs of a token '
  'and an expert costs 18 D F FLOPs (three matrices, forward and twice '
  'backward) and four transfers of D bfloat16 numbers, (P - 1) / P of them to '
  'other devices.',
  'The other matrix products of a step cost 6 FLOPs a token and parameter, '
  'split evenly; the scores of attention are left out.',
  'An expert that a device did not have before is sent there with its AdamW '
  'state, 12 bytes a parameter. A redundant copy exchanges its gradient and '
  'its weights once a step, in float32.',
  'FLOP/s and bandwidth are attained in full, without latency; nothing '
  'overlaps; solves of prices, the all-reduce of dense gradients and the '
  'optimizer take no time; nothing was measured.',
  'Loads are those of a whole step. Those of its microbatches and shards are '
  'less even, so that real devices wait longer.',
)


class StepTime(NamedTuple):
  """Seconds of the parts of a step on each device, see `ASSUMPTIONS`.

  Attributes:
    even: routed experts of all layers, if all devices had the mean load.
    other: what does not depend on loads.
    move: to receive an expert, in every layer.
    copy: to keep a redundant copy equal to its expert, in every layer.
  """

  even: float
  other: float
  move: float
  copy: float

  def seconds(
    self, imbalance: float, *, moves: float = 0.0, copies: float = 0.0
  ) -> float:
    """Returns the seconds of a step.

    Args:
      imbalance: max over mean load, mean over layers.
      moves: experts that a device receives in each layer, a step.
      copies: redundant copies in each layer of a device.
    """
    changed = moves * self.move + copies * self.copy
    return self.other + imbalance * self.even + changed


def step_time(
  config: Mapping[str, Any],
  *,
  pairs: float,
  devices: int,
  flops: float,
  bandwidth: float,
) -> StepTime:
  """Models the time of a step of a run.

  Args:
    config: the run's, nested.
    pairs: of a token and a routed expert, in a layer and step.
    devices: P, which share tokens and experts.
    flops: FLOP/s of a device.
    bandwidth: bytes/s that a device sends while it receives as many.
  """
  model = config['model']
  width, expert = model['width'], 3 * model['width'] * model['hidden']
  layers = model['layers'] - model['dense_layers']
  other = (
    _attention(model) * model['layers']
    + (model['shared_experts'] * expert + width * model['experts']) * layers
    + 3 * width * model['dense_hidden'] * model['dense_layers']
    + width * config['data']['vocabulary']
  )
  tokens = pairs / model['experts_per_token']
  exchange = 4 * width * 2 * (devices - 1) / devices / bandwidth
  return StepTime(
    even=layers * pairs / devices * (6 * expert / flops + exchange),
    other=6 * other * tokens / devices / flops,
    move=layers * 12 * expert / bandwidth,
    copy=layers * 8 * expert / bandwidth,
  )


def _attention(model: Mapping[str, Any]) -> int:
  """Returns the parameters of the matrices of a layer's attention."""
  width, heads = model['width'], model['heads']
  head = model['head_size'] or width // heads
  latent = model.get('latent_size', 0)
  if not latent:
    return 2 * width * head * (heads + model['kv_heads'])
  query, turning = model['query_latent_size'], model['rotary_size']
  value = model['value_size'] or head
  return (
    width * query
    + (query or width) * heads * head
    + width * (latent + turning)
    + latent * heads * (head - turning + value)
    + heads * value * width
  )
