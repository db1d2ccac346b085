"""What a run was made with: run.json, beside its config."""

import hashlib
import importlib.metadata
import json
from typing import Any
import uuid

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

import moe_jax
from moe_jax import nn
from moe_jax.config import Config
from moe_jax.data import TextData
from moe_jax.train import evaluate as evaluation

_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tokenizers')


def of_run(
  config: Config, mesh: Mesh, text: TextData, params: Any
) -> dict[str, Any]:
  """Returns versions, devices and sizes of a run, and what is easy to beat."""
  total, active = nn.parameter_counts(config.model, params)
  evaluated = {
    name: _evaluated(config, tokens) for name, tokens in text.evaluation.items()
  }
  facts = {
    'run': uuid.uuid4().hex,  # Its name; its checkpoints bear it.
    'versions': versions(),
    'device_kind': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'processes': jax.process_count(),
    'mesh': dict(mesh.shape),
    'parameters': total,
    'active_parameters': active,
    'tokens_per_step': config.batch_size * config.sequence_length,
    'train_tokens_in_corpus': len(text.train_tokens),
    'text_fingerprint': text.fingerprint,
    'evaluated_tokens': {
      name: len(tokens) - 1 for name, tokens in evaluated.items()
    },
    'not_evaluated': text.not_evaluated,
  }
  if 'validation' in evaluated:
    facts |= _unigram_facts(config, text, evaluated['validation'])
  return facts


def versions() -> dict[str, str]:
  """Returns the versions of the packages that results may depend on."""
  packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {'moe_jax': moe_jax.__version__, **packages}


def digest(tree: Any) -> str:
  """Hashes the values and positions of all numbers of a tree of arrays."""
  sums = list(checksums(tree).values())
  return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def checksums(tree: Any) -> dict[str, int]:
  """Returns a checksum of every array of a tree of 32-bit arrays, by its name.

  Which device has which part does not matter. Each adds up its own, modulo
  2^32: an array need not fit into one host. A change of a single element always
  changes the sum, any other one does but for one chance in 2^32.
  """
  names = [
    jax.tree_util.keystr(path, simple=True, separator='.')
    for path, _ in jax.tree.leaves_with_path(tree)
  ]
  sums = jax.device_get(_checksums(jax.tree.leaves(tree)))
  return dict(zip(names, map(int, sums), strict=True))


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
  return [_checksum(leaf) for leaf in leaves]


def _checksum(x: jax.Array) -> jax.Array:
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    index = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    position = position * np.uint32(size) + index
  # Multiplications and shifts that mix well: those of MurmurHash3.
  mixed = (bits ^ position) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _evaluated(config: Config, tokens_N: np.ndarray) -> np.ndarray:
  """Returns the part of a set that the model is evaluated on."""
  count = config.eval_sequences * config.sequence_length
  return tokens_N[: count + 1] if count else tokens_N


def _unigram_facts(
  config: Config, text: TextData, tokens_N: np.ndarray
) -> dict[str, float]:
  loss = evaluation.unigram_loss(
    text.train_tokens, tokens_N, config.data.vocabulary
  )
  size = int(text.tokenizer.token_bytes_V[tokens_N[1:]].sum())
  return {
    'unigram_perplexity': evaluation.perplexity(loss, len(tokens_N) - 1),
    'unigram_bits_per_byte': evaluation.bits_per_byte(loss, size),
  }
