"""Text from a trained model, token by token.

Shape letters: B batch, S sequence, N new tokens, V vocabulary.
"""

import functools

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from moe_jax.nn.decoder import Decoder
from moe_jax.options import Option
from moe_jax.parallel import compilers


def generate(
  model: Decoder,
  prompt_BxS: jax.Array,
  *,
  tokens: int,
  temperature: float = 0.0,
  top_k: int = 0,
  seed: int = 0,
) -> jax.Array:
  """Continues texts, with cached attention and q frozen.

  Compiled for each length of the prompt and number of tokens.

  Args:
    model: its experts have room for all, so that what is chosen for a token
      depends on nothing after it.
    prompt_BxS: int32 [batch, sequence], at least one token.
    tokens: N, how many to add.
    temperature: divides the logits before one token is drawn; 0 takes the
      likeliest.
    top_k: draw among so many of the likeliest; 0 among all.
    seed: of the draws.

  Returns:
    The new tokens, int32 [B, N].

  Raises:
    ValueError: an argument is out of its range.
  """
  if prompt_BxS.shape[1] < 1:
    raise ValueError('prompt: has no token; give at least one')
  Option(least=1).check('tokens', tokens)
  Option(least=0).check('temperature', temperature)
  Option(least=0, most=model.embedding.num_embeddings).check('top_k', top_k)
  graphdef, state = nnx.split(model)
  return _generate(
    graphdef,
    state,
    prompt_BxS,
    jax.random.key(seed),
    jnp.float32(temperature),
    tokens=tokens,
    top_k=1 if temperature == 0 else top_k,
  )


@functools.partial(
  compilers.jit, static_argnames=('graphdef', 'tokens', 'top_k')
)
def _generate(graphdef, state, prompt_BxS, key, temperature, *, tokens, top_k):
  model = nnx.merge(graphdef, state, copy=True)
  batch, sequence = prompt_BxS.shape
  cache = model.init_cache(batch, sequence + tokens)
  logits_BxSxV, _, cache = model.extend(prompt_BxS, cache)

  def add(carry, key):
    logits_BxV, cache = carry
    token_B = _draw(logits_BxV, key, temperature, top_k)
    logits_Bx1xV, _, cache = model.extend(token_B[:, None], cache)
    return (logits_Bx1xV[:, -1], cache), token_B

  keys = jax.random.split(key, tokens)
  _, token_NxB = lax.scan(add, (logits_BxSxV[:, -1], cache), keys)
  return token_NxB.T


def _draw(logits_BxV, key, temperature, top_k):
  if top_k == 1:
    return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
  if top_k:
    least_Bx1 = lax.top_k(logits_BxV, top_k)[0][:, -1:]
    logits_BxV = jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)
  return jax.random.categorical(key, logits_BxV / temperature).astype(jnp.int32)
