"""What prices make of a model that exists: its loads and its loss on a text.

    model = run.restore().with_balancer(name='bip', iterations=14)
    find_prices(model, tokens_NxBxS)
    routed(model, others_NxBxS).loss

Shape letters: N batches, B sequences, S tokens, L MoE layers, E experts.
"""

import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax import nn


class Routed(NamedTuple):
  """How a model routes and predicts a text, its prices frozen.

  Attributes:
    load: int64 [L, E], tokens that each expert got.
    loss: nats a token.
  """

  load: np.ndarray
  loss: float


def find_prices(model: nn.Decoder, tokens_NxBxS: np.ndarray) -> None:
  """Lets the model's rule see a text, batch by batch; parameters stay.

  Rules that solve on a batch have their prices after one; those that move a
  little after each step want many.
  """
  copied = _without_dropping(model)
  for tokens_BxS in tokens_NxBxS:
    _of_batch(copied, tokens_BxS, train=True)
  nnx.update(model, nnx.state(copied, nn.RouterState))


def routed(model: nn.Decoder, tokens_NxBxS: np.ndarray) -> Routed:
  """Routes and predicts a text with prices as they are."""
  copied = _without_dropping(model)
  found = [_of_batch(copied, each, train=False) for each in tokens_NxBxS]
  loads, losses = zip(*jax.device_get(found), strict=True)
  load_LxE = np.sum(loads, axis=0, dtype=np.int64)
  return Routed(load_LxE, float(np.mean(losses, dtype=np.float64)))


def _without_dropping(model):
  """As in evaluation: a capacity is an option of the training."""
  graphdef, state = nnx.split(model)
  copied = nnx.merge(graphdef, state, copy=True)
  copied.set_attributes(dropless=True)
  return copied


@functools.partial(nnx.jit, static_argnames='train')
def _of_batch(model, tokens_BxS, *, train):
  logits_BxSxV, outputs = model(tokens_BxS[:, :-1], None, train=train)
  if train:
    nn.update_routers(model)
  loss_BxS = optax.softmax_cross_entropy_with_integer_labels(
    logits_BxSxV, tokens_BxS[:, 1:]
  )
  return outputs.choice.load, jnp.mean(loss_BxS)
