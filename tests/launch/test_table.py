"""Tables of stored plans: right, and those of the results are current."""

import json
import pathlib

import pytest

from launch import table

PLANS = pathlib.Path(__file__).parents[2] / 'experiments/results/plans'


@pytest.fixture(scope='module')
def plans():
  return {
    path.stem: json.loads(path.read_text())
    for path in sorted(PLANS.glob('*.json'))
  }


def test_the_tables_of_the_results_are_those_of_the_plans(plans):
  text = (PLANS / 'README.md').read_text()
  assert table.estimates(plans) in text
  assert table.balancing(plans) in text
  for plan in plans.values():
    assert plan['command'] in text


def test_every_plan_fits(plans):
  assert len(plans) > 10
  assert all(plan['fits'] for plan in plans.values())


def test_a_row_by_hand():
  plan = {
    'mesh': {'data': 2, 'expert': 4},
    'config': {
      'batch_size': 16,
      'accumulation': 2,
      'sequence_length': 128,
      'capacity_factor': 0.0,
      'model': {'ragged_exchange': False},
    },
    'memory': {'needed': 1.26e9, 'limit': 16e9},
    'step_seconds': [0.01, 0.02],
    'mfu': [0.25, 0.5],
    'routing': {'seconds': 0.004, 'share': 0.2},
    'balancing': {'seconds': 0.003, 'share': 0.15},
    'collectives': [
      {'part': 'router', 'count': 3, 'bytes': 1000},
      {'part': 'router', 'count': 1, 'bytes': 234},
      {'part': 'experts', 'count': 9, 'bytes': 9},
    ],
  }
  assert table.estimates({'p': plan}).splitlines()[-1] == (
    '| p | 2, 4 | 16 / 2 | dropless, padded | 1.3 of 16.0 | 10 .. 20 '
    '| 50.0 .. 25.0 | 4.0 (20.0) |'
  )
  assert table.balancing({'p': plan}).splitlines()[-1] == (
    '| p | 2,048 | 4 | 1,234 | 4.0 (20.0) | 3.0 (15.0) |'
  )
