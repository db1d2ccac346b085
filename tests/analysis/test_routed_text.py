import dataclasses

import numpy as np
import pytest

from moe_jax.analysis import RoutedText


@pytest.fixture
def routed():
  """One layer, three tokens, two of four experts each."""
  scores = np.float32(
    [[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]]
  )
  return RoutedText(
    tokens=['a', ' b', 'a'],
    ids=np.int32([1, 2, 1]),
    experts=np.int32([[[1, 2], [3, 2], [0, 1]]]),
    gates=np.float32([[[0.3, 0.2], [0.4, 0.3], [0.7, 0.1]]]),
    scores=scores,
    q=np.float32([[0.25, 0.0, 0.0, 0.0]]),
  )


def test_load(routed):
  assert routed.load.tolist() == [[1, 2, 2, 1]]
  assert 'RoutedText(3 tokens, 1 layers, 2 of 4 experts' in repr(routed)


def test_margins(routed):
  """Of 0.15, 0.3, 0.2, 0.1 the second is 0.05 above the third; and so on."""
  np.testing.assert_allclose(routed.margins, [[0.05, 0.1, 0.0]], atol=1e-6)


def test_a_margin_tells_which_prices_change_nothing(routed):
  half = routed.margins[0, 0] / 2
  random = np.random.default_rng(0)

  def choice(shift_E):
    return set(np.argsort(routed.q[0] + shift_E - routed.scores[0, 0])[:2])

  shifts = random.uniform(-half, half, (99, 4))
  assert all(choice(shift) == {1, 2} for shift in shifts)
  assert choice(np.array([-1.2, 0, 1.2, 0]) * half) == {1, 0}


def test_no_margin_where_all_are_chosen(routed):
  everything = RoutedText(
    tokens=['a'],
    ids=np.int32([1]),
    experts=np.int32([[[0, 1, 2, 3]]]),
    gates=np.ones((1, 1, 4), np.float32),
    scores=routed.scores[:, :1],
    q=routed.q,
  )
  with pytest.raises(ValueError, match='goes to all 4 experts'):
    _ = everything.margins


def test_slots_that_are_not_used(routed):
  experts = np.int32([[[1, 2], [3, -1], [-1, -1]]])
  routed = dataclasses.replace(routed, experts=experts)
  assert routed.load.tolist() == [[0, 1, 1, 1]]
  assert routed.table()['expert'].tolist() == [1, 2, 3]
  assert routed.table()['position'].tolist() == [0, 0, 1]
  with pytest.raises(ValueError, match='margins: tokens did not go'):
    _ = routed.margins


def test_no_margin_where_something_else_decides(routed):
  """Prices of logits, groups of experts."""
  experts = np.int32([[[1, 3], [3, 2], [0, 1]]])
  with pytest.raises(ValueError, match='margins: tokens did not go'):
    _ = dataclasses.replace(routed, experts=experts).margins


def test_table(routed):
  table = routed.table()
  assert len(table) == 6
  assert table.iloc[3].to_dict() == {
    'layer': 0,
    'position': 1,
    'token': ' b',
    'rank': 1,
    'expert': 2,
    'gate': np.float32(0.3),
  }
