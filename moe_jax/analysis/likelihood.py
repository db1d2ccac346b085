"""How likely a model finds what follows a text, with q frozen.

Shape letters: N requests, B batch, S sequence.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import nn
from moe_jax.parallel import compilers

_SHORTEST = 32  # Tokens; each length up to the longest that is a power of 2
# times this is compiled once.


class Likelihood(NamedTuple):
  """How likely a continuation is.

  Attributes:
    log: natural logarithm of its probability, given its context.
    greedy: whether each of its tokens is the most likely one.
  """

  log: float
  greedy: bool


def log_likelihoods(
  model: nn.Decoder,
  requests: Sequence[tuple[Sequence[int], Sequence[int]]],
  *,
  longest: int,
  batch: int,
) -> list[Likelihood]:
  """Tells how likely continuations are after their contexts.

  Args:
    model: of which prices stay as they are.
    requests: tokens of contexts, none of them empty, and of continuations.
    longest: most tokens that the model reads at once. Each token of a
      continuation follows what is before it, the first tokens of which are left
      out where it is more; a longer continuation is read in parts.
    batch: sequences at once.

  Raises:
    ValueError: a context is empty.
  """
  found: list[Likelihood] = [Likelihood(0.0, True)] * len(requests)
  rows = []
  for place, (context, continuation) in enumerate(requests):
    if not len(context):
      raise ValueError(f'requests: context {place} is empty')
    tokens = np.int32([*context, *continuation])
    for start in range(len(context), len(tokens), longest):
      end = min(start + longest, len(tokens))
      read = tokens[max(0, end - longest - 1) : end]
      rows.append((len(read) - 1, place, end - start, read))
  graphdef, state = nnx.split(model)
  rows.sort(key=lambda row: row[:2])  # Alike in length: little is padded.
  for start in range(0, len(rows), batch):
    some = rows[start : start + batch]
    width = min(longest, _padded(some[-1][0]))
    tokens_BxS = np.zeros((batch, width + 1), np.int32)
    mask_BxS = np.zeros((batch, width), bool)
    for row, (length, _, _, tokens) in enumerate(some):
      tokens_BxS[row, : length + 1] = tokens
      mask_BxS[row, :length] = True
    logs_BxS, greedy_BxS = jax.device_get(
      _next_tokens(graphdef, state, tokens_BxS, mask_BxS)
    )
    for row, (length, place, count, _) in enumerate(some):
      part, before = slice(length - count, length), found[place]
      found[place] = Likelihood(
        before.log + float(logs_BxS[row, part].sum(dtype=np.float64)),
        before.greedy and bool(greedy_BxS[row, part].all()),
      )
  return found


def _padded(length: int) -> int:
  width = _SHORTEST
  while width < length:
    width *= 2
  return width


@functools.partial(compilers.jit, static_argnums=0)
def _next_tokens(graphdef, state, tokens_BxS, mask_BxS):
  """Returns log-probability of each next token, and whether it is the best."""
  model = nnx.merge(graphdef, state, copy=True)
  logits_BxSxV, _ = model(tokens_BxS[:, :-1], mask_BxS, train=False)
  logs_BxSxV = jax.nn.log_softmax(logits_BxSxV.astype(jnp.float32))
  next_BxS = tokens_BxS[:, 1:]
  logs_BxS = jnp.take_along_axis(logs_BxSxV, next_BxS[..., None], -1)[..., 0]
  return logs_BxS, jnp.argmax(logits_BxSxV, -1) == next_BxS
