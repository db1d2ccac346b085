"""The comparison with MaxText's measurements: its arithmetic, by hand."""

import pytest

from experiments.maxtext import compare, deep_708b, wide_754b
from launch import hlo
from moe_jax import config as config_lib
from tests.launch.test_hlo import MODULE


@pytest.mark.parametrize(
  ('experiment', 'active', 'mfu', 'seconds'),
  [
    # 3 x (2 x 1.23e11 + 56 x 4 x 8192 x 32768) x 8192 FLOPs, 918e12 a second.
    (wide_754b, 1.23e11, 0.498, 16.4),
    (deep_708b, 9.96e10, 0.431, 13.6),
  ],
)
def test_measured_steps(experiment, active, mfu, seconds):
  config = config_lib.freeze(experiment.get_config())
  ideal = compare.flops(config, active) / (256 * 918e12)
  found = compare.beside(
    {'experts': 8.0, 'waited': 1.0, 'overlapped': 1.0}, ideal, mfu
  )
  assert found['measured_seconds'] == pytest.approx(seconds, abs=0.1)
  assert found['estimated_seconds'] == [9.0, 10.0]
  assert found['estimated_mfu'][1] == pytest.approx(ideal / 9)
  assert found['error'][1] == pytest.approx(10 / found['measured_seconds'] - 1)


def test_few_layers_stand_for_many():
  program = hlo.parse(MODULE.replace('constant(7)', 'constant(4)'))
  assert hlo.collectives(program)[0].count == 4
  calls = hlo.collectives(compare.with_layers(program, 56))
  assert [call.count for call in calls] == [56, 56, 1, 1, 1, 1]
  # The loop of another length is none over layers.
  assert compare.with_layers(hlo.parse(MODULE), 56) == hlo.parse(MODULE)
  times = {
    'compute_seconds': {'experts': 5.0, 'optimizer': 1.0, 'scores': 7.0},
    'collectives': [{'seconds': 2.0}, {'seconds': 0.5}],
    'waited_seconds': 0.5,
  }
  assert compare.of_all_layers(times, layers=56) == {
    'experts': 5.0,
    'optimizer': 14.0,
    'scores': 7.0,
    'waited': 0.5,
    'overlapped': 2.0,
  }


def test_tables_and_ratios():
  rows = [
    {'model': model, 'capacity_factor': factor}
    | compare.beside(
      {'experts': 8.0 * factor, 'waited': 0.0, 'overlapped': 2.0}, 5.0, mfu
    )
    for model, factor, mfu in compare.MEASURED
  ]
  assert compare.ratios(rows) == {
    'measured': [pytest.approx(0.498 / 0.381)],
    'estimated': [1.5, 1.4],
  }
  assert compare.markdown(rows).splitlines()[2] == (
    '| wide_754b | 1.0 | 10.0 | 49.8 | 8.0 .. 10.0 | 62.5 .. 50.0 | -20 .. -0 |'
  )
