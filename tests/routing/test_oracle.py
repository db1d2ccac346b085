"""The linear programs: against enumeration, golden optima and weak duality."""

import functools
import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from tests import golden_data
from tests.routing import rules

TOKENS, EXPERTS = 7, 4
SCORES = arrays.arrays(
  np.float32,
  (TOKENS, EXPERTS),
  elements=st.one_of(
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.floats(-1, 1, width=32, allow_subnormal=False),
  ),
)
PRICES = arrays.arrays(np.float32, EXPERTS, elements=st.floats(-1, 1, width=32))
PROPERTY = settings(deadline=None, max_examples=10)
# HiGHS calls a solution feasible and optimal within 1e-7.
TOLERANCE = 1e-6

# Two tokens, two experts, k = 1: one token each.
PAIR = np.array([[0.9, 0.6], [0.8, 0.1]], np.float32)


# By hand and by enumeration


def test_by_hand():
  """Both want expert 0; token 1 loses .7 without it, token 0 only .3."""
  found = routing.optimality(PAIR, np.zeros(2), 1)
  assert found.objective == pytest.approx(0.9 + 0.8)
  assert found.max_violation == 1
  assert found.lp_optimum == pytest.approx(0.6 + 0.8)
  assert found.lp_rows_equal_optimum == pytest.approx(0.6 + 0.8)
  # Prices of 0 prove no more than what choice attains without capacities.
  assert found.dual_value == pytest.approx(1.7)
  assert found.duality_gap == pytest.approx(0.3)
  # A difference of .3 to .7 parts the tokens, and proves the optimum:
  # .4 + max(.9 - .4, .6) + max(.8 - .4, .1).
  found = routing.optimality(PAIR, np.array([0.4, 0.0]), 1)
  assert found.objective == pytest.approx(1.4)
  assert found.max_violation == 0
  assert found.dual_value == pytest.approx(1.4)
  assert found.duality_gap == pytest.approx(0, abs=1e-7)
  # So it does with a negative price; a shift changes neither.
  found = routing.optimality(PAIR, np.array([0.1, -0.3]), 1)
  assert found.duality_gap == pytest.approx(0, abs=1e-7)
  assert found.rows_equal_gap == pytest.approx(0, abs=1e-7)


def test_a_token_may_be_better_off_with_fewer_experts():
  """Where an expert is worth less than nothing to anybody."""
  scores = np.array([[1.0, -0.5], [1.0, -0.2]], np.float32)
  # C = 1: one of two tokens has expert 0; nobody wants expert 1.
  assert routing.lp_optimum(scores, 1).value == pytest.approx(1)
  best = routing.lp_optimum(scores, 1, rows_equal=True)
  assert best.value == pytest.approx(0.8)
  np.testing.assert_array_equal(best.assignment, [[1, 0], [0, 1]])


@PROPERTY
@given(scores=SCORES, k=st.integers(1, 3), rows_equal=st.booleans())
def test_optimum_is_that_of_all_assignments(scores, k, rows_equal):
  """Of the first four tokens: all rows of k (or fewer) ones, tried in turn."""
  scores = scores[:4]
  capacity = math.ceil(4 * k / EXPERTS)
  sizes = [k] if rows_equal else range(k + 1)
  rows = [
    [j in chosen for j in range(EXPERTS)]
    for size in sizes
    for chosen in itertools.combinations(range(EXPERTS), size)
  ]
  tables = np.array(list(itertools.product(rows, repeat=4)))
  tables = tables[np.all(tables.sum(axis=1) <= capacity, axis=1)]
  best = np.max(np.sum(tables * scores.astype(np.float64), axis=(1, 2)))
  found = routing.lp_optimum(scores, k, rows_equal=rows_equal)
  assert found.value == pytest.approx(best, abs=TOLERANCE)


@PROPERTY
@given(scores=SCORES, k=st.integers(1, EXPERTS), rows_equal=st.booleans())
def test_assignment_is_feasible_and_worth_its_value(scores, k, rows_equal):
  found = routing.lp_optimum(scores, k, rows_equal=rows_equal)
  rows, columns = (found.assignment.sum(axis=axis) for axis in (1, 0))
  assert np.all(rows == k) if rows_equal else np.all(rows <= k)
  assert np.all(columns <= math.ceil(TOKENS * k / EXPERTS))
  assert scores[found.assignment].sum(dtype=np.float64) == pytest.approx(
    found.value, abs=TOLERANCE
  )
  assert found.q.shape == (EXPERTS,) and np.all(found.q >= 0)


# Group limits


def test_group_limits_by_hand():
  """Each token wants one expert of either group; C = 1, k = 2."""
  scores = np.array([[0.9, 0.1, 0.8, 0.1], [0.1, 0.7, 0.1, 0.6]], np.float32)
  solve = functools.partial(
    routing.lp_optimum, scores, 2, rows_equal=True, groups=2
  )
  assert solve(groups_per_token=2).value == pytest.approx(3.0)
  # 1.0 + 0.7 or 0.9 + 0.8.
  found = solve(groups_per_token=1)
  assert found.value == pytest.approx(1.7)
  assert found.q.shape == (4,) and found.assignment.shape == (2, 4)


@PROPERTY
@given(scores=SCORES, k=st.integers(1, 2), rows_equal=st.booleans())
def test_group_limits_bound_all_assignments_within_them(scores, k, rows_equal):
  """Of three tokens, two groups of two, one a token: tried in turn."""
  scores = scores[:3]
  sizes = [k] if rows_equal else range(k + 1)
  rows = [
    [j in chosen for j in range(EXPERTS)]
    for size in sizes
    for group in ((0, 1), (2, 3))
    for chosen in itertools.combinations(group, size)
  ]
  tables = np.array(list(itertools.product(rows, repeat=3)))
  tables = tables[np.all(tables.sum(axis=1) <= math.ceil(3 * k / 4), axis=1)]
  values = np.sum(tables * scores.astype(np.float64), axis=(1, 2))
  free = routing.lp_optimum(scores, k, rows_equal=rows_equal).value
  try:
    bound = routing.lp_optimum(
      scores, k, rows_equal=rows_equal, groups=2, groups_per_token=1
    ).value
  except RuntimeError:  # No fractions do, either.
    assert not len(values)
    return
  assert bound <= free + TOLERANCE
  assert not len(values) or np.max(values) <= bound + TOLERANCE


def test_prices_under_group_limits_are_near_the_bound():
  scores = rules.skewed_scores(192, 16, 3)
  limits = {'groups': 4, 'groups_per_token': 2}
  bound = routing.lp_optimum(scores, 2, rows_equal=True, **limits).value
  solve = functools.partial(
    routing.dual_iterations, k=2, clip=False, cutoff='midpoint', iterations=12
  )
  q = jax.jit(functools.partial(solve, **limits))(scores, jnp.zeros(16))
  choice = routing.choose(scores, q, k=2, **limits)
  assert routing.max_violation(choice.load) < 0.15
  assert 0.97 < float(jnp.sum(choice.gates)) / bound < 1.01


def test_groups_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='groups=3: must divide'):
    routing.lp_optimum(PAIR, 1, groups=3)


# Duality


@functools.cache
def _rounded(k, capacity):
  return jax.jit(
    functools.partial(routing.round_to_capacity, k=k, capacity=capacity)
  )


@pytest.mark.long
@PROPERTY
@given(scores=SCORES, q=PRICES, k=st.integers(1, EXPERTS))
def test_prices_bound_the_optimum(scores, q, k):
  found = routing.optimality(scores, q, k)
  assert found.duality_gap >= -TOLERANCE
  assert found.rows_equal_gap >= -TOLERANCE
  # Fewer constraints, a greater optimum; any feasible choice is below it.
  assert found.lp_optimum >= found.lp_rows_equal_optimum - TOLERANCE
  capacity = math.ceil(TOKENS * k / EXPERTS)
  rounded = _rounded(k, capacity)(scores, q).gates
  objective = np.asarray(rounded, np.float64).sum()
  assert objective <= found.lp_rows_equal_optimum + TOLERANCE


@pytest.mark.long
@PROPERTY
@given(
  scores=SCORES, q=PRICES, k=st.integers(1, EXPERTS), shift=st.floats(-2, 2)
)
def test_a_shift_of_all_prices_leaves_the_bound(scores, q, k, shift):
  """Where each token has exactly k experts, prices are relative."""
  q = q.astype(np.float64)
  values = [
    routing.optimality(scores, prices, k).rows_equal_dual_value
    for prices in (q, q + shift)
  ]
  assert values[0] == pytest.approx(values[1], abs=1e-9)


@PROPERTY
@given(scores=SCORES, k=st.integers(1, EXPERTS))
def test_optimal_prices_leave_no_gap(scores, k):
  first = routing.optimality(scores, np.zeros(EXPERTS), k)
  found = routing.optimality(scores, first.lp_q, k)
  assert found.duality_gap == pytest.approx(0, abs=TOLERANCE)
  found = routing.optimality(scores, first.lp_rows_equal_q, k)
  assert found.rows_equal_gap == pytest.approx(0, abs=TOLERANCE)


def test_scores_of_zero_have_no_gap():
  found = routing.optimality(np.zeros((4, 2)), np.zeros(2), 1)
  assert found.duality_gap == found.rows_equal_gap == 0


# Golden


@pytest.mark.parametrize(
  'index',
  [
    i if i in (0, 3) else pytest.param(i, marks=pytest.mark.long)
    for i in range(7)
  ],
)
def test_golden_optima_prices_and_objectives(index):
  golden = golden_data.load('assignment')
  name = str(golden['instances'][index])
  field = {
    key.removeprefix(f'{name}__'): value
    for key, value in golden.items()
    if key.startswith(f'{name}__')
  }
  scores, k = field['scores'], int(field['k'])
  found = routing.optimality(scores, field['lp_q'], k)
  for optimum in ('lp_optimum', 'lp_rows_equal_optimum'):
    assert getattr(found, optimum) == pytest.approx(field[optimum], rel=1e-6)
  assert found.dual_value == pytest.approx(field['lp_optimum'], rel=1e-9)
  assert abs(found.duality_gap) < 1e-9 * found.lp_optimum
  found = routing.optimality(scores, field['lp_rows_equal_q'], k)
  assert found.rows_equal_dual_value == pytest.approx(
    field['lp_rows_equal_optimum'], rel=1e-9
  )
  # What a rule's prices choose.
  row = list(golden['iterations']).index(4)
  found = routing.optimality(scores, field['midpoint__q'][row], k)
  assert found.objective == pytest.approx(
    field['midpoint__objective'][row], rel=1e-12
  )
  assert found.max_violation == pytest.approx(field['midpoint__max_vio'][row])
  assert found.rows_equal_gap >= -1e-9


# Arguments


def test_scores_and_prices_may_be_of_jax():
  """bfloat16 scores too, as the float32 numbers they are compared as."""
  scores = jnp.asarray(PAIR, jnp.bfloat16)
  found = routing.optimality(scores, jnp.zeros(2), 1)
  expected = routing.optimality(np.asarray(scores, np.float32), np.zeros(2), 1)
  assert found.lp_optimum == expected.lp_optimum
  assert found.dual_value == expected.dual_value


@pytest.mark.parametrize(
  ('scores', 'q', 'k', 'words'),
  [
    (PAIR, np.zeros(2), 3, ['k=3', '2']),
    (PAIR, np.zeros(2), 0, ['k=0', '2']),
    (PAIR, np.zeros(3), 1, ['q=', '2 finite prices']),
    (PAIR, np.array([np.nan, 0]), 1, ['q=[nan', '2 finite prices']),
    (np.array([[1, 2], [3, np.nan]]), np.zeros(2), 1, ['[1, 1]=nan', 'finite']),
    (np.array([[-np.inf, 2]]), np.zeros(2), 1, ['[0, 0]=-inf', 'finite']),
    (np.zeros(2), np.zeros(2), 1, ['shape (2,)', '[tokens, experts]']),
  ],
)
def test_errors_name_option_value_and_what_would_work(scores, q, k, words):
  with pytest.raises(ValueError) as error:
    routing.optimality(scores, q, k)
  assert all(word in str(error.value) for word in words), error.value
