"""A work directory is read whole, or the error says what is wrong with it."""

import numpy as np
import pytest

from moe_jax.analysis import Run


def test_reads_what_the_run_left(write_run):
  run = Run(write_run())
  assert run.config['balancer']['iterations'] == 4
  assert run.facts['parameters'] == 12345
  assert run.metrics.index.tolist() == [1, 2, 3]
  assert run.metrics['train/loss'].tolist() == [8.0, 7.0, 6.0]
  perplexity = run.metrics['eval/validation/perplexity']
  np.testing.assert_array_equal(perplexity, [np.nan, 40.0, 20.125])
  assert run.evaluation_sets == ['validation']
  assert run.tokens_per_step == 8


def test_tokens_are_those_of_batches_that_changed(write_run):
  changes = {
    '2': {'sequence_length': {'from': 3, 'to': 4}},
    '1': {'batch_size': {'from': 1, 'to': 2}, 'steps': {'from': 1, 'to': 3}},
  }
  run = Run(write_run(facts={'config_changes': changes}))
  assert run.tokens.tolist() == [3, 9, 17]


def test_layers(write_run):
  run = Run(write_run())
  assert list(run.layer_max_violation) == ['layer_00', 'layer_01']
  assert run.layer_max_violation['layer_01'].tolist() == [0.5, 1.0, 0.5]
  loads = run.loads(0)
  assert loads.index.tolist() == [1, 2, 3]
  assert all(np.issubdtype(dtype, np.integer) for dtype in loads.dtypes)
  np.testing.assert_array_equal(
    loads, [[10, 4, 2, 0], [4, 4, 4, 4], [4, 4, 4, 4]]
  )
  with pytest.raises(ValueError, match=r'layer 2: .*layer_00.*layer_01'):
    run.loads(2)
  with pytest.raises(ValueError, match='layer 0: .*no router/q/layer_00'):
    run.prices(0)
  with pytest.raises(ValueError, match='layer 0: .*no router/gates/layer_00'):
    run.gates(0)


def test_gates(write_run, spread):
  run = Run(write_run(records=spread))
  assert run.gates(1).loc[2].tolist() == [3.0, 1.0, 0.0, 0.0]


def test_prices_of_the_steps_that_have_them(write_run, records):
  del records[1]['router/load/layer_01']
  records[0]['router/q/layer_01'] = [0.0, 1.0, 2.0, 3.0]
  records[2]['router/q/layer_01'] = [4.0, 5.0, 6.0, 7.0]
  run = Run(write_run(records=records))
  assert run.prices(1).loc[3, 2] == 6
  assert run.prices(1).index.tolist() == [1, 3]
  assert run.loads(1).index.tolist() == [1, 3]


def test_finished_is_the_last_configured_step(write_run, records):
  assert Run(write_run('whole')).finished
  assert not Run(write_run('part', records=records[:2])).finished
  assert not Run(write_run('begun', records=[])).finished


@pytest.mark.parametrize('kept', [1, 40, -2])
def test_a_half_written_last_line_is_ignored(write_run, kept):
  path = write_run() / 'metrics.jsonl'
  *lines, last = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b''.join(lines) + last[:kept])
  assert Run(path.parent).metrics.index.tolist() == [1, 2]


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (b'{"step": 2, "train/l', 'line 2 is damaged'),
    (b'', 'line 2 is damaged'),
    (b'{"step": 2, "a": "\xff"}', 'line 2 is damaged'),
    (b'[2]', 'line 2 is damaged'),
    (b'{"train/loss": 1.0}', 'line 2 is damaged'),
    (b'{"step": 1}', 'line 2: step 1 after 1'),
  ],
)
def test_any_other_malformed_line_is_named(write_run, line, message):
  path = write_run() / 'metrics.jsonl'
  first, _, third = path.read_bytes().splitlines()
  path.write_bytes(b'\n'.join([first, line, third, b'']))
  with pytest.raises(ValueError, match=rf'metrics\.jsonl: {message}'):
    _ = Run(path.parent).metrics


@pytest.mark.parametrize(
  ('name', 'attribute'),
  [
    ('metrics.jsonl', 'metrics'),
    ('config.json', 'config'),
    ('run.json', 'facts'),
  ],
)
def test_a_missing_file_is_named(write_run, name, attribute):
  workdir = write_run()
  (workdir / name).unlink()
  with pytest.raises(FileNotFoundError, match=name):
    getattr(Run(workdir), attribute)


def test_a_value_that_was_not_finite_is_nan(write_run, records):
  for record in records:
    record['train/loss'] = None
  loss = Run(write_run(records=records)).metrics['train/loss']
  assert loss.dtype == np.float64
  assert loss.isna().all()
