"""From tokens to batches, for training and for evaluation.

Shape letters: N tokens, B batch (sequences), S sequence.
"""

from collections.abc import Iterator, Sequence
import zlib

import grain
import numpy as np

from moe_jax.data.mixtures import Mixture, Source, Tokens


def document_positions(
  tokens_BxS: np.ndarray, end_of_document: int
) -> np.ndarray:
  """Counts each token's place in its document, from 0.

  What a sequence begins with counts as the beginning of a document.

  Args:
    tokens_BxS: integer [..., S].
    end_of_document: token after which another document begins.

  Returns:
    int32 [..., S].
  """
  places_S = np.arange(tokens_BxS.shape[-1], dtype=np.int32)
  begins_BxS = np.zeros(tokens_BxS.shape, bool)
  begins_BxS[..., 1:] = tokens_BxS[..., :-1] == end_of_document
  first_BxS = np.maximum.accumulate(np.where(begins_BxS, places_S, 0), axis=-1)
  return places_S - first_BxS


def training_batches(
  sources: Sequence[Source],
  *,
  sequence_length: int,
  batch_size: int,
  seed: int,
  start: int = 0,
  anneal_from: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Returns an endless iterator over shuffled batches, starting anywhere.

  Sequence i holds the tokens i*S .. i*S+S-1, its targets are one further on;
  sequences run across the ends of documents. Tokens after the last whole
  sequence are not used. In each epoch every sequence comes once, in an order
  that depends on the seed and the epoch alone. Of several sources, each has
  epochs of its own. Which source a row is of depends on the weights alone, and
  after any number of rows shares are as near to them as whole rows can be.
  Where the mixture is annealed, each source goes on with its next row.

  Its state is one integer: after t batches, start + t * batch_size, whatever
  the number of processes.

  Args:
    sources: texts of N > S tokens.
    sequence_length: S.
    batch_size: sequences of a batch, over all processes; a multiple of their
      number.
    seed: at least 0; each seed gives its own order.
    start: the first batch's first row, counted over all rows ever drawn; found
      at once, without going through those before.
    anneal_from: tokens, counted over all rows, after which the weights are the
      annealing ones; 0 for never.
    process_index: which process this is.
    process_count: number of processes; each gets consecutive rows of a batch.

  Returns:
    An iterator over {'inputs': int32 [B_local, S], 'targets': int32
    [B_local, S]}, B_local = batch_size / process_count; of several sources also
    'sources': bool [B_local, sources], True where a row is of one.
  """

  def rows(number: int, source: Source) -> grain.MapDataset:
    # grain adds the epoch to the seed, so with neighbouring seeds one run's
    # second epoch would be another's first. Hashed seeds are far apart.
    entropy = [seed, zlib.crc32(source.name.encode())] if mixed else seed
    order = int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def sequence(index: int) -> dict[str, np.ndarray]:
      first = index * sequence_length
      window = source.tokens[first : first + sequence_length + 1]
      window = window.astype(np.int32)
      row = {'inputs': window[:-1], 'targets': window[1:]}
      if mixed:
        row['sources'] = np.arange(len(sources)) == number
      return row

    count = source.sequences(sequence_length)
    return grain.MapDataset.range(count).shuffle(order).repeat().map(sequence)

  mixed = len(sources) > 1
  parts = [rows(number, source) for number, source in enumerate(sources)]
  whole = parts[0]
  if mixed:
    mixture = Mixture(sources, sequence_length, anneal_from)
    whole = grain.MapDataset.select_from_datasets(parts, mixture)
  # A bucket answers in its own time, but many requests at once.
  remote = any(getattr(each.tokens, 'remote', False) for each in sources)
  threads, ahead = (16, 16) if remote else (1, 4)
  # Batch t * process_count + p of these is process p's share of step t.
  return iter(
    whole[start:]
    .batch(batch_size // process_count, drop_remainder=True)[
      process_index::process_count
    ]
    .to_iter_dataset(grain.ReadOptions(threads, ahead))
  )


def evaluation_batches(
  tokens_N: Tokens,
  *,
  sequence_length: int,
  batch_size: int,
  maximum_sequences: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Returns the batches in which every token but the first is predicted once.

  They come in the order of the text. What the last sequence and the last batch
  have too much is padded with token 0 and masked; a process may get batches
  that are all padding, so that all have equally many.

  Args:
    tokens_N: integer [N].
    sequence_length: S; the text may be shorter than that.
    batch_size: sequences of a batch, over all processes; a multiple of their
      number.
    maximum_sequences: stop after so many; 0 for all.
    process_index: which process this is.
    process_count: number of processes; each gets consecutive rows of a batch.

  Returns:
    An iterator over {'inputs': int32 [B_local, S], 'targets': int32
    [B_local, S], 'mask': bool [B_local, S], True where a target counts}.

  Raises:
    ValueError: there are fewer than two tokens.
  """
  if len(tokens_N) < 2:
    raise ValueError(
      f'evaluation set of {len(tokens_N)} tokens: nothing to predict; it needs '
      'at least 2'
    )
  predicted = len(tokens_N) - 1
  if maximum_sequences:
    predicted = min(predicted, maximum_sequences * sequence_length)
  local = batch_size // process_count
  rows_B = process_index * local + np.arange(local)

  def batch(first_row: int) -> dict[str, np.ndarray]:
    starts_B = (first_row + rows_B) * sequence_length
    places_BxS = starts_B[:, None] + np.arange(sequence_length)
    mask_BxS = places_BxS < predicted
    # Padding repeats the last place: a lazy text is not read from its start.
    places_BxS = np.minimum(places_BxS, predicted - 1)

    def tokens(places):
      return np.where(mask_BxS, tokens_N[places], 0).astype(np.int32)

    inputs, targets = tokens(places_BxS), tokens(places_BxS + 1)
    return {'inputs': inputs, 'targets': targets, 'mask': mask_BxS}

  return map(batch, range(0, -(-predicted // sequence_length), batch_size))
