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


def find_prices(
  model: nn.Decoder,
  tokens_NxBxS: np.ndarray,
  positions_NxBxS: np.ndarray | None = None,
) -> None:
  """Lets the model's rule see a text, batch by batch; parameters stay.

  Rules that solve on a batch have their prices after one; those that move a
  little after each step want many.

  Args:
    model: its prices are changed.
    tokens_NxBxS: the text.
    positions_NxBxS: `data.document_positions` of the tokens, for a run with
      `data.cross_documents=false`; None: a sequence is one document.
  """
  copied = _without_dropping(model)
  for batch in _batches(tokens_NxBxS, positions_NxBxS):
    _of_batch(copied, *batch, train=True)
  nnx.update(model, nnx.state(copied, nn.RouterState))


def routed(
  model: nn.Decoder,
  tokens_NxBxS: np.ndarray,
  positions_NxBxS: np.ndarray | None = None,
) -> Routed:
  """Routes and predicts a text with prices as they are; see `find_prices`."""
  copied = _without_dropping(model)
  batches = _batches(tokens_NxBxS, positions_NxBxS)
  found = [_of_batch(copied, *batch, train=False) for batch in batches]
  loads, losses = zip(*jax.device_get(found), strict=True)
  load_LxE = np.sum(loads, axis=0, dtype=np.int64)
  return Routed(load_LxE, float(np.mean(losses, dtype=np.float64)))


def _without_dropping(model):
  """As in evaluation: a capacity is an option of the training."""
  graphdef, state = nnx.split(model)
  copied = nnx.merge(graphdef, state, copy=True)
  copied.set_attributes(dropless=True)
  return copied


def _batches(tokens_NxBxS, positions_NxBxS):
  if positions_NxBxS is None:
    positions_NxBxS = [None] * len(tokens_NxBxS)
  return zip(tokens_NxBxS, positions_NxBxS, strict=True)


@functools.partial(nnx.jit, static_argnames='train')
def _of_batch(model, tokens_BxS, positions_BxS, *, train):
  if positions_BxS is not None:
    positions_BxS = positions_BxS[:, :-1]
  logits_BxSxV, outputs = model(
    tokens_BxS[:, :-1], positions_BxS=positions_BxS, train=train
  )
  if train:
    nn.update_routers(model)
  loss_BxS = optax.softmax_cross_entropy_with_integer_labels(
    logits_BxSxV, tokens_BxS[:, 1:]
  )
  return outputs.choice.load, jnp.mean(loss_BxS)
