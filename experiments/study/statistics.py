"""Paired differences between arms, with their uncertainty."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats


class Difference(NamedTuple):
  """By how much one arm is above another.

  Attributes:
    mean: over the seeds that both have.
    low: end of the 95 % interval; NaN below three seeds.
    high: its other end.
    seeds: how many.
  """

  mean: float
  low: float
  high: float
  seeds: int

  @property
  def certain(self) -> bool:
    """Whether the interval leaves out zero."""
    return self.low > 0 or self.high < 0

  def __str__(self) -> str:
    if np.isnan(self.low):
      return f'{self.mean:+.4f}'
    return f'{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]'


def paired(values: pd.Series, arm: str, other: str) -> Difference:
  """Compares two arms seed by seed.

  Equal seeds have equal initial weights and batches, so that their difference
  varies less than either.

  Args:
    values: by (`arm`, `seed`).
    arm: from which the other is subtracted.
    other: its counterpart.

  Returns:
    The mean difference with its percentile bootstrap over seeds. Of few seeds
    such an interval is narrower than it should be.
  """
  both = values.unstack('arm')[[arm, other]].dropna()
  differences = (both[arm] - both[other]).to_numpy()
  if len(differences) < 3:
    low = high = np.nan
  else:
    found = stats.bootstrap(
      [differences], np.mean, method='percentile', rng=np.random.default_rng(0)
    )
    low, high = found.confidence_interval
  return Difference(differences.mean(), low, high, len(differences))
