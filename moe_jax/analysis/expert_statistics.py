"""What the experts of a layer do, in numbers; nothing is drawn here.

Shape letters: S tokens, E experts, K chosen; P pairs of a row and an expert.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.cluster import hierarchy
from scipy.spatial import distance

from moe_jax.analysis.routed_text import RoutedText

QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95]
_TOLERANCE = 1e-9  # of the null model's loads, as shares of the tokens


def check_layer(layer: int, layers: int) -> None:
  """Raises a ValueError unless there is such a layer."""
  if not 0 <= layer < layers:
    raise ValueError(f'layer={layer}: must be from 0 to {layers - 1}')


def chosen(routed: RoutedText, layer: int) -> np.ndarray:
  """Tells which token chose which expert of a layer; bool [S, E].

  Raises:
    ValueError: there is no such layer.
  """
  check_layer(layer, len(routed.q))
  experts_SxK = routed.experts[layer]
  token, slot = np.nonzero(experts_SxK >= 0)
  chosen_SxE = np.zeros(routed.scores.shape[1:], bool)
  chosen_SxE[token, experts_SxK[token, slot]] = True
  return chosen_SxE


def saturation(routed: RoutedText, last: RoutedText) -> np.ndarray:
  """Computes the share of a text's routes that another model has as well.

  Router saturation, where `last` is of the last checkpoint of a run.

  Returns:
    float64 [L]; with all loads even, routes by chance have k / E.

  Raises:
    ValueError: they are not of the same tokens, layers and experts.

  References:
    Muennighoff et al., arXiv 2409.02060, section 5.1.
  """
  if not (
    np.array_equal(routed.ids, last.ids) and routed.q.shape == last.q.shape
  ):
    raise ValueError(
      f'{routed} and {last}: must be of one text, with as many layers and '
      'experts'
    )
  return np.array(
    [
      (chosen(routed, layer) & chosen(last, layer)).sum()
      / max(1, (routed.experts[layer] >= 0).sum())
      for layer in range(len(routed.q))
    ]
  )


def domain_shares(
  domains: Mapping[str, RoutedText], *, layer: int
) -> pd.DataFrame:
  """Computes the share of each domain's tokens that an expert gets.

  Domain specialization: an expert that does not mind the domain has the same
  share of all, k / E where loads are even. A column adds up to k.

  Args:
    domains: a text of each, routed by one checkpoint.
    layer: which MoE layer.

  Returns:
    A row an expert, a column a domain.

  Raises:
    ValueError: there is no domain, or no such layer.

  References:
    Muennighoff et al., arXiv 2409.02060, section 5.3.
  """
  if not domains:
    raise ValueError('domains: must have one text at least')
  return pd.DataFrame(
    {
      name: chosen(routed, layer).mean(axis=0)
      for name, routed in domains.items()
    }
  ).rename_axis('expert')


def score_quantiles(routed: RoutedText, *, layer: int) -> pd.DataFrame:
  """Sums up the scores of the tokens that chose an expert, and of the others.

  Returns:
    A row an expert. Columns: ('price', ''), and
    ('chosen', p) and ('others', p) for the quantiles p of `QUANTILES`; NaN
    where an expert has no such tokens.

  Raises:
    ValueError: there is no such layer.
  """
  chosen_SxE = chosen(routed, layer)
  scores_SxE = pd.DataFrame(routed.scores[layer])
  parts = {
    'chosen': scores_SxE.where(chosen_SxE),
    'others': scores_SxE.mask(chosen_SxE),
  }
  table = pd.concat(
    {name: part.quantile(QUANTILES).T for name, part in parts.items()},
    axis='columns',
  )
  table['price', ''] = routed.q[layer]
  return table


def typical_tokens(
  routed: RoutedText,
  *,
  layer: int,
  count: int = 8,
  minimum: int = 3,
  smoothing: float = 1.0,
) -> pd.DataFrame:
  """Finds the tokens that each expert gets more often than others do.

  Lift is P(token | expert) / P(token), that is, how often the token went to the
  expert over how often it would have, were it spread over the experts in
  proportion to their loads. `smoothing` is added to both numbers: it draws the
  lift of rare tokens, which chance makes large, towards 1.

  Args:
    routed: the text.
    layer: which MoE layer.
    count: tokens of an expert, at most.
    minimum: times that a token must have gone to the expert.
    smoothing: 0 for the plain ratio.

  Returns:
    Rows by expert, the highest lift first, only lifts above 1. Columns:
    `expert`, `id`, `token`, `lift`, `times` (it went to the expert) and
    `occurrences` (of it in the text).

  Raises:
    ValueError: there is no such layer, or an option is out of its range.
  """
  for name, value, least in (
    ('count', count, 1),
    ('minimum', minimum, 1),
    ('smoothing', smoothing, 0),
  ):
    if value < least:
      raise ValueError(f'{name}={value}: must be at least {least}')
  chosen_SxE = chosen(routed, layer)
  ids, first, kind_S, occurrences = np.unique(
    routed.ids, return_index=True, return_inverse=True, return_counts=True
  )
  times = np.zeros((len(ids), chosen_SxE.shape[1]), np.int64)
  np.add.at(times, kind_S, chosen_SxE)
  expected = occurrences[:, None] * chosen_SxE.mean(axis=0)
  # Nobody asks for the lift of a token that an expert never got.
  lift = np.divide(
    times + smoothing, expected + smoothing, where=times > 0, out=0.0 * expected
  )
  kind, expert = np.nonzero((times >= minimum) & (lift > 1))
  table = pd.DataFrame(
    {
      'expert': expert,
      'id': ids[kind],
      'token': np.array(routed.tokens, object)[first[kind]],
      'lift': lift[kind, expert],
      'times': times[kind, expert],
      'occurrences': occurrences[kind],
    }
  ).sort_values(
    ['expert', 'lift', 'times', 'id'], ascending=[True, False, False, True]
  )
  return table.groupby('expert').head(count).reset_index(drop=True)


def cosine_similarity(vectors_ExN: np.ndarray) -> np.ndarray:
  """Cosine of the angle between any two of E vectors, [E, E]; NaN for zeros."""
  return 1 - distance.cdist(vectors_ExN, vectors_ExN, 'cosine')


def cluster_order(similarity_ExE: np.ndarray) -> np.ndarray:
  """Orders experts so that alike ones are neighbours; int [E].

  Hierarchical clustering, average linkage, leaves in optimal order. NaN counts
  as the mean of what is known, the diagonal as most alike.
  """
  if len(similarity_ExE) < 3:
    return np.arange(len(similarity_ExE))
  off = ~np.eye(len(similarity_ExE), dtype=bool)
  known = off & np.isfinite(similarity_ExE)
  mean = similarity_ExE[known].mean() if known.any() else 0.0
  filled = np.where(known, similarity_ExE, mean)
  apart = np.where(off, filled.max() - filled, 0.0)
  condensed = distance.squareform((apart + apart.T) / 2, checks=False)
  tree = hierarchy.linkage(condensed, 'average', optimal_ordering=True)
  return hierarchy.leaves_list(tree)


def coactivation(
  routed: RoutedText, *, layer: int
) -> tuple[np.ndarray, np.ndarray]:
  """Counts how often two experts share a token, and how often by chance.

  By chance: tokens choose independently of each other, a set A of K experts
  with a probability in proportion to the product of w_e over e in A. The w are
  such that every expert has its observed load in expectation. Of all rules with
  these loads, this is the one of highest entropy; with equal loads, all sets
  are equally likely.

  Returns:
    Observed int [E, E] and expected float [E, E] numbers of tokens that chose
    both; on the diagonal, the loads.

  Raises:
    ValueError: there is no such layer, a token goes to one expert only, or
      tokens go to different numbers of experts.

  References:
    Chen, Dempster and Liu, Biometrika 81 (1994), for the w.
  """
  k = routed.experts.shape[2]
  if k < 2:
    raise ValueError(f'k={k}: a token must go to two experts at least')
  if (routed.experts < 0).any():
    raise ValueError(
      'tokens go to different numbers of experts: by chance is not defined'
    )
  chosen_SxE = chosen(routed, layer).astype(np.int64)
  observed_ExE = chosen_SxE.T @ chosen_SxE
  return observed_ExE, _expected_pairs(np.diag(observed_ExE), len(chosen_SxE))


def _expected_pairs(load_E: np.ndarray, tokens: int) -> np.ndarray:
  share_E = load_E / tokens
  # An expert that all tokens or none chose leaves no choice.
  pairs_ExE = np.outer(share_E, share_E)
  open_E = (load_E > 0) & (load_E < tokens)
  k = round(share_E[open_E].sum())
  if k:
    share = share_E[open_E]
    weights = _weights(share, k)
    others = np.tile(weights, (len(weights), 1))
    np.fill_diagonal(others, 0.0)
    # Given that a row's expert is chosen, k - 1 of the others are.
    pairs = share[:, None] * _inclusion(others, k - 1)
    np.fill_diagonal(pairs, share)
    pairs_ExE[np.ix_(open_E, open_E)] = pairs
  return tokens * pairs_ExE


def _weights(share_E: np.ndarray, k: int) -> np.ndarray:
  """Finds w for which experts are chosen as often as they were."""
  odds_E = share_E / (1 - share_E)
  weights_E = odds_E.copy()
  for _ in range(10_000):
    got_E = _inclusion(weights_E[None], k)[0]
    if abs(got_E - share_E).max() < _TOLERANCE:
      return weights_E
    # Half of the way in logarithms: of two experts, the other moves as much.
    weights_E *= np.sqrt(odds_E * (1 - got_E) / got_E)
    weights_E /= np.exp(np.log(weights_E).mean())
  raise ArithmeticError(f'the null model of loads {share_E} was not found')


def _inclusion(weights_PxE: np.ndarray, k: int) -> np.ndarray:
  """Probability of each expert to be among k, by sets' products of weights."""
  rows, experts = weights_PxE.shape
  if k == 0:
    return np.zeros((rows, experts))
  # Elementary symmetric polynomials of degrees 0 to k - 1, of the weights
  # before (and behind) each expert; their products leave out just that one.
  before = np.zeros((experts + 1, rows, k))
  before[0, :, 0] = 1.0
  behind = before.copy()
  for e in range(experts):
    for sums, weight in (
      (before, weights_PxE[:, e]),
      (behind, weights_PxE[:, experts - 1 - e]),
    ):
      sums[e + 1] = sums[e]
      sums[e + 1, :, 1:] += weight[:, None] * sums[e, :, :-1]
  without_PxE = np.einsum('epd,epd->pe', before[:-1], behind[-2::-1, :, ::-1])
  included_PxE = weights_PxE * without_PxE
  # The probabilities of a row add up to k.
  return k * included_PxE / included_PxE.sum(axis=1, keepdims=True)
