"""From tokens to batches, for training and for evaluation.

Shape letters: N tokens, B batch (sequences), S sequence.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses

import grain
import numpy as np

from moe_jax.options import Option


def training_batches(
  tokens_N: np.ndarray,
  *,
  sequence_length: int,
  batch_size: int,
  seed: int,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Returns an endless iterator over shuffled batches, starting anywhere.

  Sequence i holds the tokens i*S .. i*S+S-1, its targets are one further on;
  sequences run across the ends of documents. Tokens after the last whole
  sequence are not used. In each epoch every sequence comes once, in an order
  that depends on the seed and the epoch alone.

  Its state is one integer: after t batches, start + t * batch_size, whatever
  the number of processes.

  Args:
    tokens_N: integer [N].
    sequence_length: S.
    batch_size: sequences of a batch, over all processes.
    seed: at least 0; each seed gives its own order.
    start: the first batch's first row, counted over all rows ever drawn; found
      at once, without going through those before.
    process_index: which process this is.
    process_count: number of processes; each gets consecutive rows of a batch.

  Returns:
    An iterator over {'inputs': int32 [B_local, S], 'targets': int32
    [B_local, S]}, B_local = batch_size / process_count.

  Raises:
    ValueError: an argument is impossible, or the tokens are fewer than one
      sequence needs.
  """
  local = _local_size(sequence_length, batch_size, process_index, process_count)
  Option(least=0).check('seed', seed)
  Option(least=0, most=2**62 - 1).check('start', start)
  if len(tokens_N) <= sequence_length:
    raise ValueError(
      f'sequence_length={sequence_length}: the training text has only '
      f'{len(tokens_N)} tokens, which allows at most {len(tokens_N) - 1}'
    )
  # grain adds the epoch to the seed, so with neighbouring seeds one run's
  # second epoch would be another's first. Hashed seeds are far apart.
  seed = int(np.random.SeedSequence(seed).generate_state(1)[0])

  def sequence(index: int) -> dict[str, np.ndarray]:
    start = index * sequence_length
    window = tokens_N[start : start + sequence_length + 1].astype(np.int32)
    return {'inputs': window[:-1], 'targets': window[1:]}

  # Batch t * process_count + p of `local` rows is process p's share of step t.
  return iter(
    grain.MapDataset.range((len(tokens_N) - 1) // sequence_length)
    .shuffle(seed)
    .repeat()[start:]
    .map(sequence)
    .batch(local, drop_remainder=True)[process_index::process_count]
    .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _EvaluationBatches(Sequence):
  """See `evaluation_batches`."""

  tokens_N: np.ndarray
  predicted: int  # Number of tokens that are a target.
  sequence_length: int
  batch_size: int
  rows_B: np.ndarray  # Of each batch, this process's.

  def __len__(self) -> int:
    return -(-self.predicted // (self.batch_size * self.sequence_length))

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    first = range(len(self))[index] * self.batch_size  # IndexError past it.
    starts_B = (first + self.rows_B) * self.sequence_length
    places_BxS = starts_B[:, None] + np.arange(self.sequence_length)
    mask_BxS = places_BxS < self.predicted
    places_BxS = np.where(mask_BxS, places_BxS, 0)
    # Each target is one further on than its input.
    batch = {'inputs': places_BxS, 'targets': places_BxS + 1}
    return {'mask': mask_BxS} | {
      name: np.where(mask_BxS, self.tokens_N[places], 0).astype(np.int32)
      for name, places in batch.items()
    }


def evaluation_batches(
  tokens_N: np.ndarray,
  *,
  sequence_length: int,
  batch_size: int,
  maximum_sequences: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Sequence[dict[str, np.ndarray]]:
  """Returns the batches in which every token but the first is predicted once.

  They come in the order of the text. What the last sequence and the last batch
  have too much is padded with token 0 and masked; a process may get batches
  that are all padding, so that all have equally many.

  Args:
    tokens_N: integer [N].
    sequence_length: S; the text may be shorter than that.
    batch_size: sequences of a batch, over all processes.
    maximum_sequences: stop after so many; 0 for all.
    process_index: which process this is.
    process_count: number of processes; each gets consecutive rows of a batch.

  Returns:
    A sequence of {'inputs': int32 [B_local, S], 'targets': int32 [B_local, S],
    'mask': bool [B_local, S], True where a target counts}.

  Raises:
    ValueError: an argument is impossible, or there are fewer than two tokens.
  """
  local = _local_size(sequence_length, batch_size, process_index, process_count)
  Option(least=0).check('maximum_sequences', maximum_sequences)
  if len(tokens_N) < 2:
    raise ValueError(
      f'evaluation set of {len(tokens_N)} tokens: nothing to predict; it needs '
      'at least 2'
    )
  predicted = len(tokens_N) - 1
  if maximum_sequences:
    predicted = min(predicted, maximum_sequences * sequence_length)
  rows_B = process_index * local + np.arange(local)
  return _EvaluationBatches(
    tokens_N, predicted, sequence_length, batch_size, rows_B
  )


def _local_size(sequence_length, batch_size, process_index, process_count):
  """Returns the rows of a batch that each process gets."""
  Option(least=1).check('sequence_length', sequence_length)
  Option(least=1).check('process_count', process_count)
  last = process_count - 1
  Option(least=0, most=last).check('process_index', process_index)
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f'batch_size={batch_size}: must be a positive multiple of the number of '
      f'processes, {process_count}'
    )
  return batch_size // process_count
