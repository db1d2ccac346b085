"""How good prices are: against linear programs, on the host, in float64.

The one file here that computes with NumPy and SciPy instead of jax.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .selection import check_groups, check_k, choose


class Optimum(NamedTuple):
  """The solution of an assignment program with integral capacities.

  Attributes:
    value: the greatest sum of scores.
    q: float64 [E], optimal prices, 0 or more; often one choice of many.
    assignment: bool [T, E]. Without group limits, the constraint matrix is
      totally unimodular, so that a vertex of the relaxation is integral. With
      them, these are the choices made by more than half, feasible or not.
  """

  value: float
  q: np.ndarray
  assignment: np.ndarray


class Optimality(NamedTuple):
  """Attained by the choice by s - q, and attainable.

  With capacity C = ceil(T k / E), a program allows no expert more than C
  tokens, and a token k experts at most (`lp`) or exactly (`lp_rows_equal`). The
  dual value of any prices is at or above the optimum.

  Attributes:
    objective: sum of the scores chosen. Choice knows no capacity, so it can
      exceed both optima.
    max_violation: greatest load over the even load T k / E, minus 1.
    lp_optimum: the greatest sum of scores.
    lp_q: float64 [E], prices that prove it.
    dual_value: the bound that the prices given prove.
    lp_rows_equal_optimum: the greatest sum of scores where every token takes
      exactly k experts.
    lp_rows_equal_q: float64 [E], prices that prove that.
    rows_equal_dual_value: the bound on it that the prices given prove.
  """

  objective: float
  max_violation: float
  lp_optimum: float
  lp_q: np.ndarray
  dual_value: float
  lp_rows_equal_optimum: float
  lp_rows_equal_q: np.ndarray
  rows_equal_dual_value: float

  @property
  def duality_gap(self) -> float:
    """How far the prices are from proving the optimum; 0 if they do."""
    return self.dual_value - self.lp_optimum

  @property
  def rows_equal_gap(self) -> float:
    """The gap of the program that gives every token all its k experts."""
    return self.rows_equal_dual_value - self.lp_rows_equal_optimum


def optimality(scores: ArrayLike, q: ArrayLike, k: int) -> Optimality:
  """Compares the choice by s - q with the best balanced assignment.

  For analysis: it solves two linear programs of T x E variables, which takes
  seconds for 1024 x 64.

  Args:
    scores: router scores [tokens, experts], finite; taken as float32.
    q: price of each expert, finite [experts]. Choice takes it as float32, the
      dual value as float64.
    k: experts per token.

  Returns:
    See `Optimality`.

  Raises:
    ValueError: for scores or prices of other shapes or not finite, or k out of
      range.

  References:
    Sun, arXiv 2502.15451, problems (BIP) and (D-LP).
  """
  scores_TxE = _check_scores(scores, k)
  tokens, experts = scores_TxE.shape
  q_E = np.asarray(q, np.float64)
  if q_E.shape != (experts,) or not np.all(np.isfinite(q_E)):
    raise ValueError(f'q={q}: must be {experts} finite prices')
  choice = choose(scores_TxE, np.float32(q_E), k=k)
  best = lp_optimum(scores_TxE, k)
  rows_equal = lp_optimum(scores_TxE, k, rows_equal=True)
  return Optimality(
    objective=float(np.asarray(choice.gates, np.float64).sum()),
    max_violation=float(np.max(choice.load)) * experts / (tokens * k) - 1,
    lp_optimum=best.value,
    lp_q=best.q,
    dual_value=dual_value(scores_TxE, q_E, k, rows_equal=False),
    lp_rows_equal_optimum=rows_equal.value,
    lp_rows_equal_q=rows_equal.q,
    rows_equal_dual_value=dual_value(scores_TxE, q_E, k, rows_equal=True),
  )


def lp_optimum(
  scores: ArrayLike,
  k: int,
  *,
  rows_equal: bool = False,
  groups: int = 1,
  groups_per_token: int = 1,
) -> Optimum:
  """Solves for the assignment of the greatest sum of scores.

  With groups, a token may use experts of so many of them only: x_ij <= y_ig for
  each expert j of group g, and sum_g y_ig <= groups_per_token. y may be a
  fraction here, so the value is an upper bound: nothing that picks whole groups
  and keeps within capacity exceeds it.

  Args:
    scores: router scores [tokens, experts], finite; taken as float32.
    k: experts per token. An expert takes ceil(tokens * k / experts) at most.
    rows_equal: whether each token gets exactly k experts, or at most k. The
      optima differ where scores are so skewed that k experts of a token cost
      others more than it gains.
    groups: equal, consecutive parts of the experts.
    groups_per_token: groups that a token may use.

  Returns:
    Its value, prices that prove it, and the assignment.

  Raises:
    ValueError: for scores that are no matrix of finite numbers, k out of range,
      or no token could have k experts of so many groups.
  """
  # Only where it is used: it takes a good part of a second to import.
  from scipy import optimize, sparse

  scores_TxE = _check_scores(scores, k)
  tokens, experts = scores_TxE.shape
  check_groups(k, experts, groups, groups_per_token)
  # Variables are in the order of the rows of x_TxE, then of y_TxG.
  rows = sparse.kron(sparse.eye(tokens), np.ones((1, experts)), format='csr')
  columns = sparse.kron(np.ones((1, tokens)), sparse.eye(experts), format='csr')
  at_most = [(columns, np.full(experts, _capacity(scores_TxE, k)))]
  exactly = [(rows, np.full(tokens, k))]
  if not rows_equal:
    at_most, exactly = at_most + exactly, []
  if groups > 1:
    at_most += _group_limits(tokens, experts, groups, groups_per_token)
  costs = np.zeros(max(matrix.shape[1] for matrix, _ in at_most))
  # HiGHS takes costs below an absolute 1e-7 for 0.
  scale = np.abs(scores_TxE).max(initial=0) or 1.0
  costs[: scores_TxE.size] = -scores_TxE.ravel() / scale
  limits = _joined(at_most, 'ub', costs.size)
  limits |= _joined(exactly, 'eq', costs.size)
  result = optimize.linprog(costs, bounds=(0, 1), method='highs', **limits)
  if not result.success:
    raise RuntimeError(f'HiGHS: {result.message}')
  return Optimum(
    value=-float(result.fun) * scale,
    q=-result.ineqlin.marginals[:experts] * scale,
    assignment=result.x[: scores_TxE.size].reshape(tokens, experts) > 0.5,
  )


def _group_limits(tokens, experts, groups, groups_per_token):
  """Returns the rows x_ij - y_ig <= 0 and sum_g y_ig <= groups_per_token."""
  from scipy import sparse

  size = tokens * experts
  member = np.ones((experts // groups, 1))
  group_of = sparse.kron(sparse.eye(tokens * groups), member)
  number = sparse.kron(sparse.eye(tokens), np.ones((1, groups)))
  nothing = sparse.csr_matrix((tokens, size))
  return [
    (sparse.hstack([sparse.eye(size), -group_of]), np.zeros(size)),
    (sparse.hstack([nothing, number]), np.full(tokens, groups_per_token)),
  ]


def _joined(limits, kind: str, variables: int) -> dict:
  """Returns the arguments of `linprog`; later variables are in no early row."""
  from scipy import sparse

  if not limits:
    return {}
  matrices, bounds = zip(*limits, strict=True)
  for matrix in matrices:
    matrix.resize(matrix.shape[0], variables)
  return {
    f'A_{kind}': sparse.vstack(matrices, format='csr'),
    f'b_{kind}': np.concatenate(bounds),
  }


def _check_scores(scores, k: int) -> np.ndarray:
  """Returns the numbers that a router has, in float64."""
  scores_TxE = np.asarray(scores).astype(np.float32).astype(np.float64)
  if scores_TxE.ndim != 2:
    raise ValueError(
      f'scores of shape {scores_TxE.shape}: must be [tokens, experts]'
    )
  check_k(k, scores_TxE.shape[1])
  bad = np.argwhere(~np.isfinite(scores_TxE))
  if len(bad):
    token, expert = bad[0]
    raise ValueError(
      f'scores[{token}, {expert}]={scores_TxE[token, expert]}: must be finite'
    )
  return scores_TxE


def _capacity(scores_TxE: np.ndarray, k: int) -> int:
  tokens, experts = scores_TxE.shape
  return -(-tokens * k // experts)


def dual_value(
  scores_TxE: np.ndarray, q_E: np.ndarray, k: int, *, rows_equal: bool
) -> float:
  """Returns the bound of the optimum that prices prove, for any prices.

  It is C sum_j q_j + sum_i (the k largest of s_i - q), with C = ceil(T k / E)
  and q shifted to 0 or more. Where a token may have fewer experts than k, only
  positive ones of them count.
  """
  # A shift changes no choice. Prices below 0 become valid by one. With equal
  # rows, C E >= T k makes the bound the better the lower all prices are.
  scores_TxE, q_E = np.float64(scores_TxE), np.float64(q_E)
  q_E = q_E - (q_E.min() if rows_equal else min(q_E.min(), 0.0))
  best_TxK = np.sort(scores_TxE - q_E, axis=1)[:, -k:]
  if not rows_equal:
    best_TxK = np.maximum(best_TxK, 0.0)
  return float(_capacity(scores_TxE, k) * q_E.sum() + best_TxK.sum())
