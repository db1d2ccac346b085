"""Loads of experts in the next steps, predicted from those of the last ones.

Loads fluctuate first and then settle (arXiv 2404.16914, on GPT-3 models): a
*drift* tells the two regimes apart, layer by layer.

Shape letters: N records, L layers, E experts. Any axes may stand between N and
E. A record is a step whose loads were recorded, so that horizons and windows
are in steps only where `experts_every` is 1.
"""

from collections.abc import Callable
import functools

import numpy as np

WINDOW = 10
"""Records over which loads are averaged."""
DRIFT = 0.05
"""Share of tokens that may change experts between windows of settled loads."""
_EMA = 0.9  # weight of the past


def last(loads_NxLxE: np.ndarray, horizon: int) -> np.ndarray:
  """Predicts what was recorded last."""
  return loads_NxLxE


def ema(loads_NxLxE: np.ndarray, horizon: int) -> np.ndarray:
  """Predicts the exponential moving average: 0.9 of it is the past."""
  averages, average, weight = np.empty_like(loads_NxLxE), 0.0, 0.0
  for i, loads in enumerate(loads_NxLxE):
    average = _EMA * average + (1 - _EMA) * loads
    weight = _EMA * weight + (1 - _EMA)
    averages[i] = average / weight  # not drawn to 0 in the beginning
  return averages


def trend(
  loads_NxLxE: np.ndarray, horizon: int, window: int = WINDOW
) -> np.ndarray:
  """Continues the straight line of least squares through the last records.

  What it would make negative is 0, and the sum is that of the last record. The
  first record is continued by itself.
  """
  lines = loads_NxLxE.copy()
  for i in range(1, len(loads_NxLxE)):
    past = loads_NxLxE[max(0, i + 1 - window) : i + 1]
    times = np.arange(len(past)) - (len(past) - 1) / 2
    slope = np.tensordot(times, past, 1) / np.sum(times**2)
    line = past.mean(0) + slope * (times[-1] + horizon)
    lines[i] = _with_sum(np.maximum(line, 0.0), loads_NxLxE[i])
  return lines


def regime(
  loads_NxLxE: np.ndarray,
  horizon: int,
  window: int = WINDOW,
  threshold: float = DRIFT,
) -> np.ndarray:
  """Predicts by the regime that each layer is in.

  A layer whose `drift` is at most the threshold is settled: the mean of the two
  windows is predicted. Any other fluctuates: the last record is.
  """
  settled_NxL = drift(loads_NxLxE, window) <= threshold
  means = _window_means(loads_NxLxE, 2 * window)
  return np.where(settled_NxL[..., None], means, loads_NxLxE)


PREDICTORS: dict[str, Callable[..., np.ndarray]] = {
  'last': last,
  'ema': ema,
  'trend': trend,
  'regime': regime,
}
"""`(loads_NxLxE, horizon) -> predictions`: row i, of record i + horizon, from
records up to i alone."""


def predictors(
  window: int, threshold: float
) -> dict[str, Callable[..., np.ndarray]]:
  """Returns `PREDICTORS` with another window and threshold of drift."""
  return PREDICTORS | {
    'trend': functools.partial(trend, window=window),
    'regime': functools.partial(regime, window=window, threshold=threshold),
  }


def errors(
  loads_NxLxE: np.ndarray,
  predict: Callable[..., np.ndarray],
  horizon: int,
) -> np.ndarray:
  """Computes how wrong each prediction is; 0 is right, 2 the worst.

  That is the sum over experts of the absolute difference, over the sum of the
  loads.

  Returns:
    [N - horizon, L]: row i is about record i + horizon.

  Raises:
    ValueError: there are no records so far apart.
  """
  if not 1 <= horizon < len(loads_NxLxE):
    raise ValueError(
      f'horizon={horizon}: must be from 1 to {len(loads_NxLxE) - 1}, as there '
      f'are {len(loads_NxLxE)} records'
    )
  later = loads_NxLxE[horizon:]
  wrong = np.abs(predict(loads_NxLxE, horizon)[:-horizon] - later).sum(-1)
  return wrong / np.maximum(later.sum(-1), 1)


def drift(loads_NxLxE: np.ndarray, window: int = WINDOW) -> np.ndarray:
  """Computes the share of tokens that changed experts between two windows.

  That is half the sum over experts of |mean share in the last `window` records
  - mean share in as many before|. Balanced or not does not matter. Tokens that
  swap experts are not seen.

  Returns:
    [N, L]; NaN where there are less than two windows.
  """
  shares = loads_NxLxE / np.maximum(loads_NxLxE.sum(-1, keepdims=True), 1)
  means = _window_means(shares, window)
  drifts = np.full(shares.shape[:-1], np.nan)
  moved = np.abs(means[2 * window - 1 :] - means[window - 1 : -window])
  drifts[2 * window - 1 :] = moved.sum(-1) / 2
  return drifts


def settled_since(
  drift_NxL: np.ndarray, threshold: float = DRIFT
) -> list[int | None]:
  """Finds the record from which on the drift stays at or below the threshold.

  Returns:
    An index for each layer; None for one that has not settled.
  """
  found = []
  for drift_N in drift_NxL.T:
    above = np.flatnonzero(~(drift_N <= threshold))  # NaN counts as above.
    first = int(above[-1]) + 1 if len(above) else 0
    found.append(first if first < len(drift_N) else None)
  return found


def _window_means(x: np.ndarray, window: int) -> np.ndarray:
  """Averages over the last `window` rows; over fewer where there are not so
  many."""
  sums = np.cumsum(x, axis=0)
  sums[window:] = sums[window:] - sums[:-window]
  counts = np.minimum(np.arange(1, len(x) + 1), window)
  return sums / counts.reshape(-1, *[1] * (x.ndim - 1))


def _with_sum(x: np.ndarray, like: np.ndarray) -> np.ndarray:
  total = x.sum(-1, keepdims=True)
  return x * like.sum(-1, keepdims=True) / np.where(total > 0, total, 1.0)
