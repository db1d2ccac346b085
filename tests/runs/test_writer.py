"""What a run says of its steps: when it is read, written, and taken back."""

import contextlib
import json
from unittest import mock
import weakref

from etils import epath
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from moe_jax import storage
from moe_jax.options import Refused
from moe_jax.runs import records
from moe_jax.runs import writer as writer_lib
from moe_jax.runs.checkpoints import Position, Saved

CONFIG = {
  'steps': 9,
  'batch_size': 10,
  'sequence_length': 10,
  'checkpoint_every': 3,
  'checkpoints_kept': 1,
  'checkpoints_kept_every': 0,
  'checkpoints_kept_best': 0,
  'skipped_steps': 1,
  'experts_every': 1,
  'tracker': '',
}
EVALUATED = {'eval/validation/perplexity': 7.0}
FACTS = {'run': 'name'}
FINE = {'infinite': np.zeros(2, int), 'squares': {}}


class OnDevice:
  """A metric that must not be read before the next step is dispatched."""

  def __init__(self, value):
    self._value, self.ready = value, False

  def __array__(self, dtype=None, copy=None):
    assert self.ready, 'the host waited for a step'
    return np.asarray(self._value, dtype)


class OnHost(OnDevice):
  def __init__(self, value):
    super().__init__(value)
    self.ready = True


def metrics(value=1.5, kind=OnHost):
  return {
    'train/loss': kind(value),
    'router/max_violation': kind(0.25),
    'router/load/layer': kind([[1, 2], [3, 4]]),
    'router/gates/layer': kind([[0.5, 1.5], [2.0, 0.0]]),
  }


@contextlib.contextmanager
def open_writer(workdir, step=0, record=None, facts=FACTS, **options):
  """Opens a writer that resumes from a step, of which `record` was saved."""
  config = CONFIG | options
  with writer_lib.open_writer(
    epath.Path(workdir), config, 'test', lambda: None
  ) as writer:
    saved = Saved({}, Position(step, 10 * step), config, record or {})
    writer.begin(saved if step else None, facts, {})
    writer.open()
    yield writer


def record_steps(workdir, numbers, **options):
  """Records some steps, from the first one on."""
  with open_writer(workdir, **options) as writer:
    for step in numbers:
      writer.record(step, metrics(float(step)), FINE)


def read(tmp_path):
  return records.read(tmp_path / 'metrics.jsonl')


def test_a_step_is_read_when_the_next_is_under_way(tmp_path):
  waiting = []
  with open_writer(tmp_path) as writer:
    for step in (1, 2, 3):
      new = metrics(kind=OnDevice)
      for metric in waiting:
        metric.ready = True
      writer.record(step, new, FINE)
      waiting = new.values()
    for metric in waiting:
      metric.ready = True
  assert [record['step'] for record in read(tmp_path)] == [1, 2, 3]


def test_the_probe_does_fail_when_read_early(tmp_path):
  with pytest.raises(AssertionError, match='the host waited'):
    with open_writer(tmp_path) as writer:
      writer.record(1, metrics(kind=OnDevice), FINE)


def test_record(tmp_path):
  with open_writer(tmp_path) as writer:
    writer.record(1, metrics(), FINE)
    assert not writer.add(lambda: None)
    assert writer.add(dict, EVALUATED)
  (record,) = read(tmp_path)
  assert record['router/load/layer_00'] == [1, 2]
  assert record['router/load/layer_01'] == [3, 4]
  assert record['router/gates/layer_00'] == [0.5, 1.5]
  assert record['eval/validation/perplexity'] == 7.0
  seconds = record['time/step_seconds']
  assert record['time/tokens_per_second'] == pytest.approx(100 / seconds)


def test_an_evaluation_takes_none_of_the_time_of_its_step(tmp_path):
  now = [0.0]

  def evaluate():
    now[0] += 100.0
    return EVALUATED

  with mock.patch.object(writer_lib.time, 'perf_counter', lambda: now[0]):
    with open_writer(tmp_path) as writer:
      for step in (1, 2):
        now[0] += 3.0
        writer.record(step, metrics(), FINE)
        writer.add(evaluate)
  assert [record['time/step_seconds'] for record in read(tmp_path)] == [3.0] * 2


def test_what_a_step_waits_for(tmp_path):
  now = [0.0]

  def batches():
    for seconds in (1.0, 2.0):
      now[0] += seconds
      yield seconds

  with mock.patch.object(writer_lib.time, 'perf_counter', lambda: now[0]):
    with open_writer(tmp_path) as writer:
      for step, _ in enumerate(writer.timed(batches()), start=1):
        now[0] += 10.0
        writer.record(step, metrics(), FINE)
      now[0] += 10.0
  waited = [record['time/data_seconds'] for record in read(tmp_path)]
  assert waited == [1.0, 2.0]


def test_no_step_is_missing_while_its_evaluation_is_written(
  tmp_path, monkeypatch
):
  """Of a checkpoint of an older version, which has no record of its step."""
  record_steps(tmp_path, [1, 2, 3])
  before = (tmp_path / 'metrics.jsonl').read_bytes()

  def killed(write, what):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt), open_writer(tmp_path, 3) as writer:
    monkeypatch.setattr(storage, 'patiently', killed)
    try:
      writer.add(dict, EVALUATED)
    finally:
      assert (tmp_path / 'metrics.jsonl').read_bytes() == before


def test_a_run_without_a_name(tmp_path):
  """An older version gave it none."""
  with mock.patch.object(writer_lib, 'Saver') as saver:
    with open_writer(tmp_path, facts={}):
      assert saver.call_args.args[2] == ''


def test_events_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
  def fail(*args, **kwargs):
    raise PermissionError('events')

  monkeypatch.setattr(writer_lib.events, 'Events', fail)
  with pytest.raises(Refused, match='events'), open_writer(tmp_path):
    pass


@pytest.mark.parametrize(
  'losses',
  [{'validation': 2.0}, {'validation_a': 1.5, 'validation_b': 2.5}],
  ids=['one', 'mixture'],
)
def test_the_best_are_known_to_a_run_that_resumes(tmp_path, bucket, losses):
  """In a bucket, where the first run has no metrics to read."""
  losses = losses | {'shakespeare': 9.0}
  loss = {f'eval/{name}/bits_per_byte': loss for name, loss in losses.items()}
  saver = mock.patch.object(writer_lib, 'Saver')
  with saver, open_writer(bucket, checkpoints_kept_best=1) as writer:
    writer.record(1, metrics(), FINE)
    writer.add(dict, loss)
  with saver as opened:
    with open_writer(bucket, 1, checkpoints_kept_best=1):
      assert opened.call_args.kwargs['losses'] == {1: 2.0}


def test_records_of_experts_may_be_rarer(tmp_path):
  record_steps(tmp_path, [1, 2, 3], experts_every=2)
  first, second, third = read(tmp_path)
  lists = ('load/layer_00', 'load/layer_01', 'gates/layer_00', 'gates/layer_01')
  assert set(second) - set(first) == {f'router/{name}' for name in lists}
  assert set(first) == set(third)


def test_not_a_number_is_null_in_json(tmp_path):
  with pytest.raises(FloatingPointError, match='step 1: train/loss'):
    with open_writer(tmp_path) as writer:
      writer.record(1, metrics(float('nan')), FINE)
  line = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(line)['train/loss'] is None
  assert 'NaN' not in line
  (record,) = read(tmp_path)
  assert np.isnan(record['train/loss'])


def test_steps_after_the_checkpoint_and_half_lines_are_removed(tmp_path):
  record_steps(tmp_path, [1, 2, 3, 4])
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes() + b'{"step": 5, "train/lo')
  assert [record['step'] for record in read(tmp_path)] == [1, 2, 3, 4]
  with pytest.raises(ValueError, match='must have every step'):
    records.Writer(path, 6)
  writer = records.Writer(path, 2)
  writer.show({'step': 3, 'train/loss': 9.0})
  writer.close()
  assert [record['step'] for record in read(tmp_path)] == [1, 2, 3]
  assert read(tmp_path)[-1]['train/loss'] == 9.0


def test_a_run_that_resumes_holds_one_record_at_a_time(tmp_path, monkeypatch):
  """100k steps with lists of experts take gigabytes."""
  record_steps(tmp_path, range(1, 9))
  held, seen = [], []

  class Counted(dict):
    pass

  def parse(path, lines):
    for record in parse_all(path, lines):
      record = Counted(record)
      seen.append(weakref.ref(record))
      held.append(sum(found() is not None for found in seen))
      yield record

  parse_all = records._parse
  monkeypatch.setattr(records, '_parse', parse)
  records.Writer(tmp_path / 'metrics.jsonl', 8).close()
  assert len(seen) == 8 and max(held) <= 3


def test_the_checkpoint_brings_the_record_of_its_step(tmp_path):
  """Killed after a save, before the evaluation of that step was written."""
  record_steps(tmp_path, [1, 2, 3])
  path = tmp_path / 'metrics.jsonl'
  *lines, last = path.read_text().splitlines(keepends=True)
  for left in (lines, [*lines, last]):
    path.write_text(''.join(left))
    with open_writer(tmp_path, 3, json.loads(last)) as writer:
      assert not writer.evaluated
      writer.add(dict, EVALUATED)
    assert read(tmp_path)[-1] == json.loads(last) | EVALUATED
    assert len(read(tmp_path)) == 3
    # TensorBoard gets both: nobody knows whether the first was written.
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    for name, value in (('train/loss', 3.0), *EVALUATED.items()):
      event = events.Scalars(name)[-1]
      assert (event.step, event.value) == (3, value)
  with open_writer(tmp_path, 3) as writer:
    assert writer.evaluated


def test_a_line_in_the_middle_that_is_damaged_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  for damaged in ('{"step": 2', '[]', '{}', '{"step": 1}'):
    path.write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match='metrics.jsonl: line 2'):
      records.read(path)


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
  record_steps(tmp_path, [1, 2], steps=2)
  err = capsys.readouterr().err
  assert 'test: step 0/2  compiling' in err
  assert 'test: step 2/2  loss 2.000  MaxVio 0.250' in err
  assert '\x1b' not in err
