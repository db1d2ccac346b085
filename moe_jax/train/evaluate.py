"""Perplexity and bits per byte on held-out text."""

import collections
from collections.abc import Callable
from collections.abc import Iterable
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from moe_jax.config import Config
from moe_jax.data import TextData
from moe_jax.data import token_counts
from moe_jax.train.batches import Batch
from moe_jax.train.batches import evaluation_batches
from moe_jax.train.state import Training
from moe_jax.train.state import TrainState
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
      model = nnx.merge(training.dropless_graphdef, params, router, copy=True)
      logits, _ = model(batch.inputs, batch.mask, train=solve)
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
  as in training, which sees the future. Neither changes the router.

  `stop` is asked before each batch, in all processes alike; where it says yes,
  there are no metrics: None.
  """
  step = make_evaluation_step(
    training, text.tokenizer.token_bytes_V, config.eval_solved
  )

  def evaluate_all(state, stop):
    metrics = {}
    for name, tokens_N in text.evaluation.items():
      batches = evaluation_batches(config, mesh, tokens_N)
      of_set = evaluate(step, state, batches, stop)
      if of_set is None:
        return None
      metrics |= {f'eval/{name}/{key}': value for key, value in of_set.items()}
    return metrics

  return evaluate_all


def evaluate(
  evaluation_step: Callable[..., dict[str, jax.Array]],
  state: TrainState,
  batches: Iterable[Batch],
  stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
  """Sums over the batches of a set, in float64.

  Returns:
    `perplexity` and `bits_per_byte` with q frozen; of the second pass, if there
    is one, both with the suffix `_solved`. None if `stop` said yes.
  """
  sums = collections.defaultdict(float)
  # A batch's sums are read when the next one is under way.
  waiting: list[dict[str, jax.Array]] = []

  def read():
    for name, value in waiting.pop().items():
      sums[name] += float(value)

  for batch in batches:
    if stop():
      return None
    waiting.insert(0, evaluation_step(state.params, state.router, batch))
    if len(waiting) > 1:
      read()
  while waiting:
    read()
  results = {}
  for name in [name for name in sums if name.startswith('loss')]:
    loss, suffix = sums[name], name.removeprefix('loss')
    results[f'perplexity{suffix}'] = perplexity(loss, sums['tokens'])
    results[f'bits_per_byte{suffix}'] = bits_per_byte(loss, sums['bytes'])
  return results


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
