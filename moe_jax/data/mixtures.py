"""Mixtures: which row of training is of which source, by whole numbers."""

from collections.abc import Iterator, Sequence
import fractions
import math
import sys
from typing import NamedTuple, Protocol

import grain
import numpy as np


class Tokens(Protocol):
  """An array of tokens, or what is indexed like one and read lazily."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: slice | np.ndarray) -> np.ndarray: ...


class Source(NamedTuple):
  """One of the texts that are trained on.

  Attributes:
    name: of the text.
    tokens: integer [N].
    weight: its share of the rows, relative to the other weights.
    annealing_weight: the same where the mixture is annealed.
  """

  name: str
  tokens: Tokens
  weight: float = 1.0
  annealing_weight: float = 0.0

  def sequences(self, sequence_length: int) -> int:
    """Returns how many there are, each with its last target."""
    return (len(self.tokens) - 1) // sequence_length


class Mixture(grain.transforms.DatasetSelectionMap):
  """Says of each row of which source it is, and which row of that one.

  Rows of a source are counted through: where the mixture is annealed, each goes
  on with its next one. grain's own mix can do neither that nor exact shares: of
  0.7 it makes 0.6997.

  Args:
    sources: to be mixed.
    sequence_length: tokens of a row.
    anneal_from: tokens after which the weights are the annealing ones; 0 for
      never.
  """

  def __init__(
    self,
    sources: Sequence[Source],
    sequence_length: int,
    anneal_from: int = 0,
  ):
    self._switch = -(-anneal_from // sequence_length) or sys.maxsize
    self._weights = _whole([source.weight for source in sources])
    self._later = _whole([source.annealing_weight for source in sources])
    self._sizes = {
      source.name: source.sequences(sequence_length) for source in sources
    }

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, row: int) -> tuple[int, int]:
    before = self.rows(row)
    pairs = enumerate(zip(before, self.rows(row + 1), strict=True))
    source = next(i for i, (old, new) in pairs if new > old)
    return source, before[source]

  def rows(self, count: int) -> list[int]:
    """Returns how many of the first `count` rows are of each source."""
    early = min(count, self._switch)
    both = (_divide(early, self._weights), _divide(count - early, self._later))
    return list(map(sum, zip(*both, strict=True)))

  def epochs(self, count: int) -> dict[str, float]:
    """Returns how often each source was gone through in so many rows."""
    rows = zip(self.rows(count), self._sizes.items(), strict=True)
    return {name: done / size for done, (name, size) in rows}


def _whole(weights: Sequence[float]) -> list[int]:
  """Returns whole numbers in exactly the proportions of decimal numbers."""
  exact = [fractions.Fraction(str(weight)) for weight in weights]
  multiple = math.lcm(*(weight.denominator for weight in exact))
  return [int(weight * multiple) for weight in exact]


def _divide(count: int, weights: Sequence[int]) -> Iterator[int]:
  """Divides a number of rows; one more row is one more of a single source.

  For each source takes its part, rounded up, of what the ones before it left.
  """
  total = sum(weights)
  for weight in weights:
    left = count * (total - weight) // max(total, 1)
    yield count - left
    count, total = left, total - weight
