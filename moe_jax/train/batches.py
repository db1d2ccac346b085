"""Batches of text on the devices of a mesh."""

from collections.abc import Iterator

import jax
from jax.sharding import Mesh
import numpy as np

from moe_jax import data
from moe_jax.config import Config
from moe_jax.train.step import Batch
from moe_jax.train.step import to_devices


def training_batches(
  config: Config, mesh: Mesh, tokens_N: np.ndarray, sequence: int
) -> Iterator[Batch]:
  """Yields the batches from a global sequence index on, without end."""
  batches = data.training_batches(
    tokens_N,
    sequence_length=config.sequence_length,
    batch_size=config.batch_size,
    seed=config.seed,
    start=sequence,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  for batch in batches:
    yield to_devices(mesh, batch)


def evaluation_batches(
  config: Config, mesh: Mesh, tokens_N: np.ndarray
) -> Iterator[Batch]:
  """Yields the batches of an evaluation set."""
  batches = data.evaluation_batches(
    tokens_N,
    sequence_length=config.sequence_length,
    batch_size=config.batch_size // config.accumulation,
    maximum_sequences=config.eval_sequences,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  for batch in batches:
    yield to_devices(mesh, batch)
