"""Perplexity and bits per byte on held-out text."""

import collections
from collections.abc import Callable
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from moe_jax.config import Config
from moe_jax.data import TextData, token_counts
from moe_jax.train.batches import evaluation_batches
from moe_jax.train.state import Training, TrainState
from moe_jax.train.step import cross_entropy


def make_evaluation_step(
  training: Training, token_bytes_V: np.ndarray, solved: bool
) -> Callable[..., dict[str, jax.Array]]:
  """Builds `(params, router, batch) -> sums` over a batch, jit-compiled.

  Args:
    training: the model.
    token_bytes_V: int32 [V], bytes that each token stands for.
    solved: whether there is a second pass, in which q is solved on the batch.
  """

  def evaluation_step(params, router, batch):
    def loss(solve):
      model = nnx.merge(training.graphdef, params, router, copy=True)
      model.set_attributes(dropless=True)
      logits, _ = model(
        batch.inputs,
        batch.mask,
        positions_BxS=batch.positions,
        train=solve,
      )
      return jnp.sum(cross_entropy(logits, batch))

    bytes_BxS = jnp.asarray(token_bytes_V, jnp.int32)[batch.targets]
    sums = {
      'loss': loss(solve=False),
      'tokens': jnp.sum(batch.mask),
      'bytes': jnp.sum(bytes_BxS * batch.mask),
    }
    return sums | {'loss_solved': loss(solve=True)} if solved else sums

  # Whole on every device, so that every process can read them.
  return jax.jit(
    evaluation_step,
    out_shardings=training.abstract.step.sharding,
    compiler_options=training.compiler_options,
  )


def make_evaluation(
  config: Config, training: Training, mesh: Mesh, text: TextData
) -> Callable[[TrainState, Callable[[], bool]], dict[str, float] | None]:
  """Builds `(state, stop) -> metrics`, which evaluates on all sets of a text.

  Each batch is run with q frozen, as a deployed model has it, and where
  `config.eval_solved` says so a second time with q solved on the batch itself
  as in training, which sees the future. Neither changes the router. There are
  `perplexity` and `bits_per_byte`; of the second pass, with suffix `_solved`.

  `stop` is asked before each batch, in all processes alike; where it says yes,
  there are no metrics: None.
  """
  step = make_evaluation_step(
    training, text.tokenizer.token_bytes_V, config.eval_solved
  )

  def evaluate(state, stop):
    metrics = {}
    for name in text.evaluation:
      batches = evaluation_batches(config, mesh, text, name)
      sums = _add_up(step, state, batches, stop)
      if sums is None:
        return None
      for suffix in ('', '_solved') if config.eval_solved else ('',):
        loss = sums[f'loss{suffix}']
        metrics |= {
          f'eval/{name}/perplexity{suffix}': perplexity(loss, sums['tokens']),
          f'eval/{name}/bits_per_byte{suffix}': bits_per_byte(
            loss, sums['bytes']
          ),
        }
    return metrics

  return evaluate


def _add_up(step, state, batches, stop) -> dict[str, float] | None:
  """Sums over the batches of a set, in float64; None if `stop` said yes."""
  sums = collections.defaultdict(float)

  def add(of_batch):
    for name, value in of_batch.items():
      sums[name] += float(value)

  waiting = {}  # A batch's sums are read when the next one is under way.
  for batch in batches:
    if stop():
      return None
    before, waiting = waiting, step(state.evaluated, state.router, batch)
    add(before)
  add(waiting)
  return sums


def perplexity(loss: float, tokens: float) -> float:
  """Computes exp(nats / tokens); infinite where that overflows."""
  try:
    return math.exp(loss / tokens)
  except OverflowError:
    return math.inf


def bits_per_byte(loss: float, count: float) -> float:
  """Converts nats over `count` bytes of text."""
  return loss / (math.log(2) * count)


def unigram_loss(
  train_tokens_N: np.ndarray, tokens_M: np.ndarray, vocabulary: int
) -> float:
  """Computes the loss of a model that knows only how often each token is.

  Args:
    train_tokens_N: counted, with one added to each count.
    tokens_M: predicted, but for the first one.
    vocabulary: number of tokens.

  Returns:
    The sum of negative log-likelihoods in nats.
  """
  counts_V = token_counts(train_tokens_N, vocabulary) + 1.0
  log_V = np.log(counts_V / counts_V.sum())
  return float(-log_V[tokens_M[1:]].sum())
