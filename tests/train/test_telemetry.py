import json

import numpy as np
import pytest

from moe_jax.train import telemetry as telemetry_lib


class OnDevice:
  """A metric that must not be read before the next step is dispatched."""

  def __init__(self, value):
    self._value, self.ready = value, False

  def __array__(self, dtype=None, copy=None):
    assert self.ready, 'the host waited for a step'
    return np.asarray(self._value, dtype)

  __float__ = __array__


def metrics(value=1.5):
  return {
    'train/loss': OnDevice(value),
    'router/max_violation': OnDevice(0.25),
    'router/load/layer': OnDevice([[1, 2], [3, 4]]),
  }


def open_telemetry(workdir, step=0, **options):
  return telemetry_lib.Telemetry(
    workdir,
    label='test',
    step=step,
    steps=9,
    tokens_per_step=100,
    quiet=True,
    **options,
  )


def test_a_step_is_read_when_the_next_is_under_way(tmp_path):
  waiting = []
  with open_telemetry(tmp_path) as telemetry:
    for step in (1, 2, 3):
      new = metrics()
      for metric in waiting:
        metric.ready = True
      telemetry.push(step, new, {})
      waiting = new.values()
    for metric in waiting:
      metric.ready = True
  records = telemetry_lib.read_steps(tmp_path / 'metrics.jsonl')
  assert [record['step'] for record in records] == [1, 2, 3]


def test_the_probe_does_fail_when_read_early(tmp_path):
  telemetry = open_telemetry(tmp_path)
  telemetry.push(1, metrics(), {})
  with pytest.raises(AssertionError, match='the host waited'):
    telemetry.flush()


def ready(value=1.5):
  return {name: np.asarray(m._value) for name, m in metrics(value).items()}


def test_record(tmp_path):
  with open_telemetry(tmp_path) as telemetry:
    telemetry.push(1, ready(), {})
    telemetry.wait()
    telemetry.add({'eval/validation/perplexity': 7.0})
  (record,) = telemetry_lib.read_steps(tmp_path / 'metrics.jsonl')
  assert record['router/load/layer_00'] == [1, 2]
  assert record['router/load/layer_01'] == [3, 4]
  assert record['eval/validation/perplexity'] == 7.0
  seconds = record['time/step_seconds']
  assert record['time/tokens_per_second'] == pytest.approx(100 / seconds)


def test_records_of_experts_may_be_rarer(tmp_path):
  with open_telemetry(tmp_path, experts_every=2) as telemetry:
    for step in (1, 2, 3):
      telemetry.push(step, ready(), {})
  first, second, third = telemetry_lib.read_steps(tmp_path / 'metrics.jsonl')
  assert set(second) - set(first) == {
    'router/load/layer_00',
    'router/load/layer_01',
  }
  assert set(first) == set(third)


def test_not_a_number_is_null_in_json(tmp_path):
  with open_telemetry(tmp_path) as telemetry:
    telemetry.push(1, ready(float('nan')), {'squares': {}})
    with pytest.raises(FloatingPointError, match='step 1: train/loss'):
      telemetry.flush()
  line = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(line)['train/loss'] is None
  assert 'NaN' not in line


def test_steps_after_the_checkpoint_and_half_lines_are_removed(tmp_path):
  with open_telemetry(tmp_path) as telemetry:
    for step in (1, 2, 3, 4):
      telemetry.push(step, ready(), {})
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes() + b'{"step": 5, "train/lo')
  with pytest.raises(ValueError, match='must have every step'):
    open_telemetry(tmp_path, step=5)
  with open_telemetry(tmp_path, step=2) as telemetry:
    telemetry.push(3, ready(9.0), {})
  records = telemetry_lib.read_steps(path)
  assert [r['step'] for r in records] == [1, 2, 3]
  assert records[-1]['train/loss'] == 9.0


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
  with telemetry_lib.Telemetry(
    tmp_path, label='bip', step=0, steps=2, tokens_per_step=10
  ) as telemetry:
    telemetry.push(1, ready(), {})
    telemetry.push(2, ready(), {})
  err = capsys.readouterr().err
  assert 'bip: step 2/2  loss 1.500  MaxVio 0.250' in err
  assert '\x1b' not in err
