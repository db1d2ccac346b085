"""What a run was made with: run.json, beside its config."""

import importlib.metadata
from typing import Any
import uuid

import jax
from jax.sharding import Mesh
import numpy as np

import moe_jax
from moe_jax import nn
from moe_jax.config import Config
from moe_jax.data import TextData
from moe_jax.nn.selections import OF_SHARD
from moe_jax.parallel.peaks import PEAK_FLOPS
from moe_jax.train import evaluate as evaluation
from moe_jax.train.state import shards_of

# Tokens of each training text whose frequencies are counted.
_COUNTED = 1 << 22
_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tokenizers')


def of_run(
  config: Config, mesh: Mesh, text: TextData, params: Any
) -> dict[str, Any]:
  """Returns versions, devices and sizes of a run, and what is easy to beat."""
  total, active = nn.parameter_counts(config.model, params)
  count = config.eval_sequences * config.sequence_length
  evaluated = {
    name: tokens_N[: count + 1] if count else tokens_N
    for name, tokens_N in text.evaluation.items()
  }
  facts = {
    'run': uuid.uuid4().hex,  # Its name; its checkpoints bear it.
    'versions': versions(),
    'device_kind': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'processes': jax.process_count(),
    'mesh': dict(mesh.shape),
    'shards': shards_that_matter(config, mesh),
    'parameters': total,
    'active_parameters': active,
    'tokens_per_step': config.batch_size * config.sequence_length,
    'train_tokens_in_corpus': sum(len(s.tokens) for s in text.train),
    'text_fingerprint': text.fingerprint,
    'end_of_document': text.tokenizer.end_of_document_token,
    'evaluated_tokens': {k: len(x) - 1 for k, x in evaluated.items()},
    'not_evaluated': text.not_evaluated,
  }
  if 'validation' in evaluated:
    tokens_N = evaluated['validation']
    some = [source.tokens[:_COUNTED] for source in text.train]
    loss = evaluation.unigram_loss(
      np.concatenate(some), tokens_N, config.data.vocabulary
    )
    size = int(text.tokenizer.token_bytes_V[tokens_N[1:]].sum())
    facts |= {
      'unigram_perplexity': evaluation.perplexity(loss, len(tokens_N) - 1),
      'unigram_bits_per_byte': evaluation.bits_per_byte(loss, size),
    }
  return facts


def shards_that_matter(config: Config, mesh: Mesh) -> int:
  """Returns into how many parts a batch is split that route by themselves.

  0 where results do not depend on it.
  """
  matter = (
    config.balancer_rule.per_shard
    or config.model.round_to_capacity
    or config.capacity_factor
    or config.model.selection in OF_SHARD
  )
  return shards_of(config, mesh) if matter else 0


def seconds_at_peak(config: Config, mesh: Mesh, params: Any) -> float | None:
  """Returns how long the useful FLOPs of a step take at its devices' peak.

  Args:
    config: of the run.
    mesh: its devices.
    params: the parameters, or what describes them.

  Returns:
    Seconds; over those of a step they are its MFU. None where the peak is not
    known, as on CPUs.
  """
  peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
  if peak is None:
    return None
  flops = nn.useful_flops(config.model, params, config.sequence_length)
  tokens = config.batch_size * config.sequence_length
  return tokens * flops / (mesh.size * peak)


def versions() -> dict[str, str]:
  """Returns the versions of the packages that results may depend on."""
  packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {'moe_jax': moe_jax.__version__, **packages}
