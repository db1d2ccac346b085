"""Batches of text on the devices of a mesh."""

from collections.abc import Callable, Iterator, Mapping
import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from moe_jax import data
from moe_jax.config import Config
from moe_jax.parallel import mesh as meshes
from moe_jax.runs import routes


class Batch(NamedTuple):
  """Sequences and what follows each of their tokens.

  Attributes:
    inputs: int32 [B, S].
    targets: int32 [B, S].
    mask: bool [B, S], False for padding; None where there is none.
    experts: int16 [B, L, S, K], what each MoE layer takes instead of choosing,
      -1 for slots that are not used; None where it chooses.
    positions: int32 [B, S], of each input in its document, to which attention
      keeps; None where it crosses documents.
    sources: bool [B, sources], of which text a row is; None where there is one.
  """

  inputs: jax.Array
  targets: jax.Array
  mask: jax.Array | None = None
  experts: jax.Array | None = None
  positions: jax.Array | None = None
  sources: jax.Array | None = None


def to_devices(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> Batch:
  """Splits the rows of a batch over all devices of all processes."""
  sharding = NamedSharding(mesh, meshes.BATCH)
  return Batch(
    **{
      name: jax.make_array_from_process_local_data(sharding, rows)
      for name, rows in batch.items()
    }
  )


def training_batches(
  config: Config, mesh: Mesh, text: data.TextData, sequence: int
) -> Iterator[Batch]:
  """Returns the batches from a global sequence index on, without end.

  With the experts to take, where routes are replayed.
  """
  batches = data.training_batches(
    text.train,
    sequence_length=config.sequence_length,
    batch_size=config.batch_size,
    seed=config.seed,
    start=sequence,
    anneal_from=config.data.anneal_from,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  if config.replay_routes:
    step = sequence // config.batch_size + 1
    batches = _with_experts(config, batches, step)
  if not config.data.cross_documents:
    batches = _with_positions(batches, text.tokenizer.end_of_document)
  return map(functools.partial(to_devices, mesh), batches)


def make_epochs(
  config: Config, text: data.TextData
) -> Callable[[int], dict[str, float]]:
  """Builds what tells how often each of several texts was gone through.

  Returns:
    `(sequence) -> metrics`, none of a single text.
  """
  if len(text.train) == 1:
    return lambda sequence: {}
  mixture = data.Mixture(
    text.train, config.sequence_length, config.data.anneal_from
  )
  return lambda sequence: {
    f'data/epochs/{name}': count
    for name, count in mixture.epochs(sequence).items()
  }


def _with_experts(config, batches, step) -> Iterator[dict[str, np.ndarray]]:
  """Adds the recorded experts to the batches of this and the next steps."""
  recorded = routes.Reader(config.replay_routes)
  count = config.batch_size // jax.process_count()
  first = jax.process_index() * count
  for number, batch in enumerate(batches, start=step):
    experts = recorded.read(number, range(first, first + count))
    yield batch | {'experts': experts}


def _with_positions(batches, end_of_document):
  """Adds the place of each input in its document."""
  for batch in batches:
    positions = data.document_positions(batch['inputs'], end_of_document)
    yield batch | {'positions': positions}


def evaluation_batches(
  config: Config, mesh: Mesh, text: data.TextData, name: str
) -> Iterator[Batch]:
  """Returns the batches of the evaluation set with this name."""
  batches = data.evaluation_batches(
    text.evaluation[name],
    sequence_length=config.sequence_length,
    batch_size=config.batch_size // config.accumulation,
    maximum_sequences=config.eval_sequences,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  if not config.data.cross_documents:
    batches = _with_positions(batches, text.tokenizer.end_of_document)
  return map(functools.partial(to_devices, mesh), batches)
