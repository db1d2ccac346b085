"""Numbers about experts: by hand, and by looking at every set of experts."""

import dataclasses
import itertools

import numpy as np
import pytest

from moe_jax.analysis import (
  coactivation,
  domain_shares,
  saturation,
  typical_tokens,
)
from moe_jax.analysis.expert_statistics import (
  cluster_order,
  cosine_similarity,
  score_quantiles,
)


def of_sets(route, sets, experts):
  """A text whose tokens chose these sets of experts."""
  scores = np.zeros((1, len(sets), experts))
  for token, chosen in enumerate(sets):
    scores[0, token, list(chosen)] = 1.0
  return route(scores, k=len(sets[0]))


def test_score_quantiles(route):
  scores = [[[0.9, 0.1], [0.7, 0.3], [0.5, 0.6], [0.2, 0.8]]]
  routed = route(scores, k=1, q=[[0.25, 0.0]])
  table = score_quantiles(routed, layer=0)
  # Less 0.25, expert 0 has 0.65, 0.45, 0.25, -0.05: it wins tokens 0 and 1.
  assert table['price'].tolist() == [0.25, 0.0]
  np.testing.assert_allclose(table['chosen', 0.5], [0.8, 0.7], rtol=1e-6)
  np.testing.assert_allclose(table['others', 0.5], [0.35, 0.2], rtol=1e-6)
  np.testing.assert_allclose(table['chosen', 0.25], [0.75, 0.65], rtol=1e-6)
  with pytest.raises(ValueError, match='layer=1: must be from 0 to 0'):
    score_quantiles(routed, layer=1)


def test_an_expert_that_nobody_chose_has_no_quantiles(route):
  table = score_quantiles(route([[[0.9, 0.1]] * 3], k=1), layer=0)
  assert np.isfinite(table.loc[0, ('chosen', 0.5)])
  assert np.isnan(table.loc[0, ('others', 0.5)])
  assert np.isnan(table.loc[1, ('chosen', 0.5)])


def test_typical_tokens(route):
  tokens = ['a'] * 4 + ['b'] * 4
  chosen = [0, 0, 0, 1, 1, 1, 1, 0]
  routed = route(np.eye(2)[None, chosen], k=1, tokens=tokens)
  table = typical_tokens(routed, layer=0, smoothing=0.0)
  # 'a' is half of the text and 3 of 4 tokens of expert 0: lift 1.5.
  assert table['expert'].tolist() == [0, 1]
  assert table['token'].tolist() == ['a', 'b']
  assert table['lift'].tolist() == [1.5, 1.5]
  assert table['times'].tolist() == [3, 3]
  assert table['occurrences'].tolist() == [4, 4]
  # 3 of 2 expected: with 1 more of each, 4 of 3.
  smooth = typical_tokens(routed, layer=0)
  np.testing.assert_allclose(smooth['lift'], [4 / 3, 4 / 3])
  assert typical_tokens(routed, layer=0, minimum=4).empty


def test_typical_tokens_are_the_ratio_of_probabilities(route):
  random = np.random.default_rng(0)
  tokens = [f'{i}' for i in random.integers(12, size=300)]
  routed = route(random.random((1, 300, 6)), k=2, tokens=tokens)
  table = typical_tokens(routed, layer=0, count=3, minimum=1, smoothing=0.0)
  assert table.groupby('expert').size().tolist() == [3] * 6
  long = routed.table()
  for row in table.itertuples():
    here = long[long['expert'] == row.expert]['token']
    share = (here == row.token).mean() / (np.array(tokens) == row.token).mean()
    assert row.lift == pytest.approx(share)
  for _, of_expert in table.groupby('expert'):
    assert of_expert['lift'].is_monotonic_decreasing


@pytest.mark.parametrize(
  'option', [{'count': 0}, {'minimum': 0}, {'smoothing': -1.0}]
)
def test_typical_tokens_refuses(route, option):
  (name,) = option
  with pytest.raises(ValueError, match=f'{name}='):
    typical_tokens(route([[[0.9, 0.1]]], k=1), layer=0, **option)


def test_cosine_similarity():
  similarity = cosine_similarity(np.array([[1, 0], [3, 3], [-2, 0], [0, 0]]))
  half = np.sqrt(0.5)
  np.testing.assert_allclose(
    similarity[:3, :3], [[1, half, -1], [half, 1, -half], [-1, -half, 1]]
  )
  assert np.isnan(similarity[3]).all()


@pytest.mark.parametrize('blank', [False, True])
def test_clusters_are_neighbours(blank):
  kind = np.random.default_rng(0).permutation(np.arange(12) % 3)
  similarity = (kind[:, None] == kind).astype(float)
  if blank:
    np.fill_diagonal(similarity, np.nan)
    similarity[0, 1] = similarity[1, 0] = np.nan
  order = cluster_order(similarity)
  assert sorted(order) == list(range(12))
  assert (np.diff(kind[order]) != 0).sum() == 2


def test_few_experts_keep_their_order():
  assert cluster_order(np.ones((2, 2))).tolist() == [0, 1]


def test_saturation_is_the_share_of_common_routes(route):
  early = of_sets(route, [(0, 1), (0, 1), (2, 3), (0, 3)], 4)
  late = of_sets(route, [(0, 1), (0, 2), (0, 1), (2, 3)], 4)
  # 2, 1, 0 and 1 of 2 experts each.
  assert saturation(early, late).tolist() == [0.5]
  assert saturation(late, late).tolist() == [1.0]
  with pytest.raises(ValueError, match='must be of one text'):
    saturation(early, of_sets(route, [(0, 1)] * 3, 4))


def test_saturation_where_tokens_have_different_numbers_of_experts(route):
  early = of_sets(route, [(0, 1), (0, 1)], 3)
  early = dataclasses.replace(early, experts=np.int32([[[0, 1], [0, -1]]]))
  late = of_sets(route, [(0, 2), (1, 2)], 3)
  # Of the three routes of the first, the second has one.
  assert saturation(early, late).tolist() == [1 / 3]


def test_shares_of_domains(route):
  domains = {
    'code': of_sets(route, [(0, 1), (0, 1), (0, 2), (0, 3)], 4),
    'verse': of_sets(route, [(2, 3), (1, 3)], 4),
  }
  table = domain_shares(domains, layer=0)
  assert table['code'].tolist() == [1.0, 0.5, 0.25, 0.25]
  assert table['verse'].tolist() == [0.0, 0.5, 0.5, 1.0]
  with pytest.raises(ValueError, match='layer=1'):
    domain_shares(domains, layer=1)
  with pytest.raises(ValueError, match='one text at least'):
    domain_shares({}, layer=0)


def test_two_of_three_experts_leave_nothing_to_chance(route):
  """Who is not chosen tells the pair, so the loads tell all the pairs."""
  sets = [(0, 1)] * 5 + [(0, 2)] * 3 + [(1, 2)] * 2
  observed, expected = coactivation(of_sets(route, sets, 3), layer=0)
  assert observed.tolist() == [[8, 5, 3], [5, 7, 2], [3, 2, 5]]
  np.testing.assert_allclose(expected, observed, rtol=1e-6)


def test_equal_loads_make_all_pairs_equally_likely(route):
  sets = [(0, 1), (2, 3)] * 6
  observed, expected = coactivation(of_sets(route, sets, 4), layer=0)
  off = ~np.eye(4, dtype=bool)
  # A pair has 2/4 x 1/3 of 12 tokens.
  np.testing.assert_allclose(expected[off], 2.0)
  assert observed[0, 1] == 6 and observed[0, 2] == 0


@pytest.mark.parametrize('k', [2, 3, 5])
def test_expected_pairs_are_those_of_all_sets(route, k):
  """Draws each set as often as its product of weights says, times 60."""
  weights = [1, 1, 2, 3, 1, 2]
  sets = [
    chosen
    for chosen in itertools.combinations(range(6), k)
    for _ in range(np.prod([weights[e] for e in chosen]))
  ]
  observed, expected = coactivation(of_sets(route, sets, 6), layer=0)
  np.testing.assert_allclose(expected, observed, rtol=1e-6)


def test_experts_that_all_or_no_tokens_chose(route):
  sets = [(0, 1, 2)] * 4 + [(0, 2, 3)] * 4
  observed, expected = coactivation(of_sets(route, sets, 5), layer=0)
  assert observed[0].tolist() == [8, 4, 8, 4, 0]
  # 0 and 2 are certain: only whether 1 or 3 comes along is open.
  np.testing.assert_allclose(expected, observed)


@pytest.mark.parametrize(('experts', 'k'), [(2, 1), (5, 4), (64, 6), (256, 8)])
def test_expected_pairs_of_random_loads_add_up(route, experts, k):
  random = np.random.default_rng(0)
  scores = random.random((1, 400, experts)) ** random.uniform(1, 9, experts)
  routed = route(scores, k=k)
  if k == 1:
    with pytest.raises(ValueError, match='k=1'):
      coactivation(routed, layer=0)
    return
  observed, expected = coactivation(routed, layer=0)
  load = routed.load[0]
  np.testing.assert_array_equal(np.diag(observed), load)
  np.testing.assert_allclose(np.diag(expected), load)
  # A token that an expert has is shared with k - 1 others.
  np.testing.assert_allclose(expected.sum(axis=1), k * load, atol=1e-4)
  np.testing.assert_allclose(expected, expected.T, atol=1e-4)
  assert (expected >= 0).all()
  assert (expected <= np.minimum.outer(load, load) + 1e-4).all()


def test_choices_by_chance_have_ratio_one(route):
  """Scores without a pattern, and an expert that is taken twice as often."""
  random = np.random.default_rng(0)
  scores = random.gumbel(size=(1, 20_000, 8)) + np.log([4, 3, 2, 1, 1, 1, 1, 1])
  observed, expected = coactivation(route(scores, k=2), layer=0)
  off = ~np.eye(8, dtype=bool)
  # Drawn one after another in proportion: close to, not just, the null model.
  np.testing.assert_allclose(observed[off], expected[off], rtol=0.15)
