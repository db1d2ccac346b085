"""Tables of stored plans: right, and those of the results are current."""

import shlex

import pytest

from launch import plans as stored
from launch import table
from tests.launch.test_commands import DOCUMENTS, ROOT, commands

README = (ROOT / stored.FOLDER / 'README.md').read_text()


@pytest.fixture(scope='module')
def plans():
  return stored.read()


def test_the_tables_of_the_results_are_those_of_the_plans(plans):
  assert stored.written(README, plans) == README
  assert stored.written(README, {}) != README


def test_every_plan_fits_and_is_that_of_its_command(plans):
  assert plans.keys() == stored.PLANS.keys()
  for name, plan in plans.items():
    assert plan['fits'], name
    assert plan['command'] == shlex.join(stored.command(name))


def test_documents_name_no_machine_without_a_plan():
  planned = [set(stored.command(name)) for name in stored.PLANS]
  named = [
    set(command.flags)
    for path in DOCUMENTS
    for command in commands(path, (ROOT / path).read_text())
    if command.module == 'launch.plan'
  ]
  assert len(named) > 8
  for flags in named:
    assert any(flags <= plan for plan in planned), sorted(flags)


def test_a_row_by_hand():
  plan = {
    'mesh': {'data': 2, 'expert': 4},
    'config': {
      'batch_size': 16,
      'accumulation': 2,
      'sequence_length': 128,
      'capacity_factor': 0.0,
      'model': {'round_to_capacity': True},
    },
    'memory': {'needed': 1.26e9, 'limit': 16e9},
    'step_seconds': [0.01, 0.02],
    'evaluation': {'memory': {'needed': 0.5e9}, 'step_seconds': [1.0, 2.0]},
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
    '| p | 2, 4 | 16 / 2 | rounded | 1.3, 0.5 of 16.0 | 10 .. 20 '
    '| 1000 .. 2000 | 50.0 .. 25.0 | 4.0 (20.0) |'
  )
  assert table.balancing({'p': plan}).splitlines()[-1] == (
    '| p | 2,048 | 4 | 1,234 | 4.0 (20.0) | 3.0 (15.0) |'
  )
