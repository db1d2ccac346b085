"""Whether a model's routes and predictions depend on the tokens that follow.

Shape letters: V variants of a batch, B batch, S sequence, L layers, K chosen.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.nn import Decoder
from moe_jax.options import Option
from moe_jax.parallel import compilers

PASSES = {
  'frozen': 'q as it was saved, as in evaluation and in a deployed model',
  'solved': 'q solved on the batch, neither capacity nor rounding, as '
  'perplexity_solved is',
  'training': 'as a training step routes: q solved, with capacity and rounding '
  'where the run has them',
}


class Leak(NamedTuple):
  """What changed when the tokens after a position were replaced.

  Attributes:
    position: the last one whose token was kept, counted from 0.
    flipped: share of the routes up to it that changed; a route is a token's
      choice of one expert in a layer, whatever its rank.
    flipped_layers: the same of each MoE layer.
    logits: largest absolute difference up to the position. Where no route
      flips, sums of other tokens in another order may change last bits.
  """

  position: int
  flipped: float
  flipped_layers: list[float]
  logits: float


class Pass(NamedTuple):
  """One way to run a model.

  Attributes:
    loss: nats a token, on the tokens as they were.
    leaks: one for each position.
  """

  loss: float
  leaks: list[Leak]

  @property
  def flipped(self) -> float:
    """Share of routes that flipped, mean over positions."""
    return float(np.mean([leak.flipped for leak in self.leaks]))

  @property
  def logits(self) -> float:
    """Largest difference of logits at any position."""
    return max(leak.logits for leak in self.leaks)


def causality(
  model: Decoder,
  tokens_BxS: jax.Array,
  positions: Sequence[int],
  *,
  passes: Sequence[str] = tuple(PASSES),
  seed: int = 0,
  document_positions_BxS: jax.Array | None = None,
) -> dict[str, Pass]:
  """Replaces what follows and looks for changes in what came before.

  The tokens after a position are replaced in all sequences: a price that was
  solved on the batch has seen all of them. The model is not changed.

  Args:
    model: as trained, on any mesh that the batch divides over.
    tokens_BxS: int32 [batch, sequence].
    positions: the last ones to be kept, each from 0 to S - 2.
    passes: which of `PASSES` to run.
    seed: of the random tokens.
    document_positions_BxS: `positions_BxS` of the model.

  Returns:
    What was found, by pass.

  Raises:
    ValueError: a position or a pass is impossible.
  """
  sequence = tokens_BxS.shape[1]
  if not positions:
    raise ValueError('positions: none is given; give at least one')
  for position in positions:
    Option(least=0, most=sequence - 2).check('positions', position)
  for name in passes:
    Option(among=tuple(PASSES)).check('passes', name)
  random = np.random.default_rng(seed)
  vocabulary = model.embedding.num_embeddings
  variants = [np.asarray(tokens_BxS)]
  for position in positions:
    others = random.integers(0, vocabulary, variants[0].shape)
    after = np.arange(sequence) > position
    variants.append(np.where(after, others, variants[0]))
  graphdef, state = nnx.split(model)
  found = _compare(
    graphdef,
    state,
    np.stack(variants).astype(np.int32),
    np.array([sequence - 1, *positions]),
    document_positions_BxS,
    passes=tuple(passes),
  )
  return {
    name: Pass(float(loss_V[0]), _leaks(positions, flipped_VxL, logits_V))
    for name, (loss_V, flipped_VxL, logits_V) in jax.device_get(found).items()
  }


def _leaks(positions, flipped_VxL, logits_V) -> list[Leak]:
  return [
    Leak(position, float(flipped_L.mean()), flipped_L.tolist(), float(logits))
    for position, flipped_L, logits in zip(
      positions, flipped_VxL[1:], logits_V[1:], strict=True
    )
  ]


@functools.partial(compilers.jit, static_argnames=('graphdef', 'passes'))
def _compare(
  graphdef, state, tokens_VxBxS, positions_V, document_positions_BxS, *, passes
):
  """Compares variants with the first one; returns (loss, flipped, logits)."""

  def run(name, tokens_BxS):
    model = nnx.merge(graphdef, state, copy=True)
    model.set_attributes(dropless=name != 'training')
    logits, outputs = model(
      tokens_BxS,
      positions_BxS=document_positions_BxS,
      train=name != 'frozen',
    )
    return logits, _routes(outputs, tokens_BxS.shape)

  def compare(first, variant):
    """Carries the first variant's results along: logits are large."""
    tokens_BxS, position, is_first = variant
    found = {name: run(name, tokens_BxS) for name in passes}
    first = jax.tree.map(
      lambda old, new: jnp.where(is_first, new, old), first, found
    )
    kept_S = jnp.arange(tokens_BxS.shape[1]) <= position
    return first, {
      name: (
        _loss(found[name][0], tokens_BxS),
        *difference(first[name], found[name], kept_S),
      )
      for name in passes
    }

  abstract = jax.eval_shape(
    lambda tokens_BxS: {name: run(name, tokens_BxS) for name in passes},
    tokens_VxBxS[0],
  )
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
  is_first_V = jnp.arange(len(tokens_VxBxS)) == 0
  _, found = lax.scan(compare, nothing, (tokens_VxBxS, positions_V, is_first_V))
  return found


def _routes(outputs, shape) -> jax.Array:
  """Returns experts [L, B, S, K]; -1 in slots that are not used."""
  choice = outputs.choice
  experts = jnp.where(choice.active, choice.experts, -1)
  return experts.reshape(len(experts), *shape, -1)


def difference(
  first: tuple[jax.Array, jax.Array],
  other: tuple[jax.Array, jax.Array],
  kept_S: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Compares logits [B, S, V] and experts [L, B, S, K] at positions kept.

  Experts of -1 are none. The rank of an expert does not matter.

  Returns:
    The share of routes that are not in both, [L], and the most that logits
    differ by.
  """
  (logits_BxSxV, experts_LxBxSxK), (logits, experts) = first, other
  same = experts_LxBxSxK[..., :, None] == experts[..., None, :]
  flipped, count = 0, 0
  for found_LxBxSxK, there in (
    (jnp.any(same, axis=-1), experts_LxBxSxK >= 0),
    (jnp.any(same, axis=-2), experts >= 0),
  ):
    there &= kept_S[:, None]
    flipped += jnp.sum(there & ~found_LxBxSxK, axis=(1, 2, 3))
    count += jnp.sum(there, axis=(1, 2, 3))
  differs_BxSxV = jnp.abs(logits_BxSxV - logits) * kept_S[:, None]
  return flipped / jnp.maximum(count, 1), jnp.max(differs_BxSxV)


def _loss(logits_BxSxV, tokens_BxS) -> jax.Array:
  """Averages the cross-entropy of all tokens but each sequence's first."""
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(
      logits_BxSxV[:, :-1], tokens_BxS[:, 1:]
    )
  )


def decoding(model: Decoder, tokens_BxS: jax.Array) -> Leak:
  """Feeds a batch token by token, as generation does, and compares.

  A sequence counts as one document.

  Returns:
    How routes and logits differ from those of the frozen pass on whole
    sequences.

  Raises:
    ValueError: the model's selection cannot decode.
  """
  graphdef, state = nnx.split(model)
  flipped_L, logits = jax.device_get(_decode(graphdef, state, tokens_BxS))
  last = tokens_BxS.shape[1] - 1
  return _leaks([last], np.stack([flipped_L] * 2), np.stack([logits] * 2))[0]


@functools.partial(compilers.jit, static_argnames='graphdef')
def _decode(graphdef, state, tokens_BxS):
  model = nnx.merge(graphdef, state, copy=True)
  logits_BxSxV, outputs = model(tokens_BxS, train=False)
  whole = logits_BxSxV, _routes(outputs, tokens_BxS.shape)

  def feed(cache, token_B):
    logits_Bx1xV, outputs, cache = model.extend(token_B[:, None], cache)
    return cache, (logits_Bx1xV, _routes(outputs, (len(token_B), 1)))

  cache = model.init_cache(*tokens_BxS.shape)
  _, (logits_SxBx1xV, experts_SxLxBx1xK) = lax.scan(feed, cache, tokens_BxS.T)
  steps = (
    jnp.moveaxis(logits_SxBx1xV[:, :, 0], 0, 1),
    jnp.moveaxis(experts_SxLxBx1xK[..., 0, :], 0, 2),
  )
  return difference(whole, steps, jnp.ones(tokens_BxS.shape[1], bool))
