"""Paired differences between arms, with their uncertainty."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats


class Difference(NamedTuple):
  """By how much one arm is above another.

  Attributes:
    mean: over the seeds that both have.
    margin: half of its 95 % interval; NaN where there is one seed.
  """

  mean: float
  margin: float

  def __str__(self) -> str:
    if np.isnan(self.margin):
      return f'{self.mean:+.3f}'
    return f'{self.mean:+.3f} ± {self.margin:.3f}'

  @property
  def told(self) -> str:
    """The difference, and what its interval says."""
    if np.isnan(self.margin):
      return f'{self} (one seed)'
    if abs(self.mean) <= self.margin:
      return f'{self} (no difference shown)'
    return f'{self} ({"lower" if self.mean < 0 else "higher"})'

  def exceeds(self, least: float) -> str:
    """Answers whether it is so much or more."""
    if self.mean - self.margin >= least:
      return 'Yes'
    return 'No' if self.mean + self.margin < least else 'Not shown'


def paired(values: pd.Series, arm: str, other: str) -> Difference:
  """Compares two arms seed by seed.

  Equal seeds have equal initial weights and batches, so that their difference
  varies less than either. The interval is Student's, as a bootstrap of three to
  five values is too narrow.

  Args:
    values: by (`arm`, `seed`).
    arm: from which the other is subtracted.
    other: its counterpart.
  """
  arms = _seeds_of_both(values, arm, other)
  return _with_margin(arms[arm] - arms[other])


def saving(values: pd.Series, arm: str, other: str) -> Difference:
  """Tells by which share of it one arm is below another, seed by seed."""
  arms = _seeds_of_both(values, arm, other)
  return _with_margin(1 - arms[arm] / arms[other])


def _seeds_of_both(values, arm, other):
  return values.unstack('arm')[[arm, other]].dropna()


def _with_margin(values: pd.Series) -> Difference:
  count, mean = len(values), values.mean()
  if count < 2:
    return Difference(mean, np.nan)
  error = values.std(ddof=1) / np.sqrt(count)
  return Difference(mean, stats.t.ppf(0.975, count - 1) * error)
