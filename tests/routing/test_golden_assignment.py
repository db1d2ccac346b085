"""q, loads and measures equal a reference, bit for bit, on seven instances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from tests import golden_data

RULES = {
  'bip': {},
  'quantile': {'clip': False},
  'midpoint': {'clip': False, 'cutoff': 'midpoint'},
}


@functools.cache
def _golden():
  return golden_data.load('assignment')


@functools.cache
def _solver(rule, k):
  """One program per shape: the number of iterations is traced."""

  @jax.jit
  def solve(scores, q, iterations):
    q = routing.dual_iterations(
      scores, q, k=k, iterations=iterations, **RULES[rule]
    )
    return q, routing.choose(scores, q, k=k)

  return solve


# Plain, skewed, tied; the others are of the long suite.
@pytest.fixture(
  scope='module',
  params=[
    i if i in (0, 3, 4) else pytest.param(i, marks=pytest.mark.long)
    for i in range(7)
  ],
)
def instance(request):
  name = str(_golden()['instances'][request.param])
  field = {
    key.removeprefix(f'{name}__'): value
    for key, value in _golden().items()
    if key.startswith(f'{name}__')
  }
  return field | {'k': int(field['k'])}


def _assert_same_bits(actual, expected):
  # Adding 0 forgives the sign of a zero, nothing else.
  np.testing.assert_array_equal(
    (np.asarray(actual) + 0).view(np.uint32), (expected + 0).view(np.uint32)
  )


def test_golden_set_is_what_these_tests_expect():
  assert len(_golden()['instances']) == 7
  assert set(_golden()['rules']) == set(RULES)


@pytest.mark.parametrize('rule', RULES)
def test_golden_q_loads_measures_and_warm_start(instance, rule):
  scores, k = instance['scores'], instance['k']
  start = jnp.zeros(scores.shape[1])
  for row, iterations in enumerate(_golden()['iterations']):
    q, choice = _solver(rule, k)(scores, start, iterations)
    expected = {
      name: instance[f'{rule}__{name}'][row]
      for name in ('q', 'loads', 'max_vio', 'min_vio', 'objective')
    }
    _assert_same_bits(q, expected['q'])
    np.testing.assert_array_equal(choice.load, expected['loads'])
    for measure, name in [
      (routing.max_violation, 'max_vio'),
      (routing.min_violation, 'min_vio'),
    ]:
      np.testing.assert_allclose(
        measure(choice.load), expected[name], rtol=1e-6, atol=1e-6
      )
    objective = np.asarray(choice.gates).sum(dtype=np.float64)
    np.testing.assert_allclose(objective, expected['objective'], rtol=1e-12)

  # Warm start: twice two iterations are four.
  q = start
  for _ in range(2):
    q, _ = _solver(rule, k)(scores, q, 2)
  four = list(_golden()['iterations']).index(4)
  _assert_same_bits(q, instance[f'{rule}__q'][four])


def test_golden_number_of_iterations_may_be_static():
  name = str(_golden()['instances'][0])
  scores, k = (_golden()[f'{name}__{field}'] for field in ('scores', 'k'))
  q = routing.dual_iterations(
    scores, jnp.zeros(scores.shape[1]), k=int(k), iterations=4
  )
  four = list(_golden()['iterations']).index(4)
  _assert_same_bits(q, _golden()[f'{name}__bip__q'][four])
