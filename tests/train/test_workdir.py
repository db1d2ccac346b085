"""Remote work directories, in a bucket that is kept in memory."""

import collections
import itertools
import json

from etils import epath
import fsspec
import numpy as np
import pytest

from moe_jax.parallel import processes
from moe_jax.train import loop
from moe_jax.train import telemetry as telemetry_lib
from moe_jax.train import workdir as workdirs
from tests.train import tiny


def push(directory, step):
  with telemetry_lib.Telemetry(
    directory, label='', step=step - 1, steps=9, tokens_per_step=1, quiet=True
  ) as telemetry:
    telemetry.push(step, {'train/loss': np.float32(step)}, {})


def steps(path):
  lines = path.read_text().splitlines()
  return [json.loads(line)['step'] for line in lines]


def test_metrics_go_on_from_what_was_uploaded(bucket):
  with workdirs.local_log(bucket, lambda: None) as (first, upload):
    push(first, 1)
    assert not (bucket / 'metrics.jsonl').exists()
    upload()
    assert steps(bucket / 'metrics.jsonl') == [1]
  assert not first.exists()
  with workdirs.local_log(bucket, lambda: None) as (second, _):
    push(second, 2)
    assert steps(bucket / 'metrics.jsonl') == [1]
  assert steps(bucket / 'metrics.jsonl') == [1, 2]
  assert any('tfevents' in path.name for path in bucket.iterdir())


def test_who_lost_the_directory_leaves_it_alone(bucket, capsys):
  def check():
    raise RuntimeError('taken over')

  with workdirs.local_log(bucket, check) as (directory, _):
    push(directory, 1)
  assert not (bucket / 'metrics.jsonl').exists()
  assert 'not uploaded: taken over' in capsys.readouterr().err


def test_steps_without_a_checkpoint_are_not_thrown_away(text, tmp_path):
  config = tiny.tiny_config(text, checkpoint_every=2)
  (tmp_path / 'run').mkdir()
  lines = ''.join(f'{{"step": {i}}}\n' for i in range(1, 6))
  (tmp_path / 'run' / 'metrics.jsonl').write_text(lines)
  with pytest.raises(processes.Refused, match='has 5 steps, but there is no'):
    loop.Run(config, tmp_path / 'run').train()
  assert (tmp_path / 'run' / 'metrics.jsonl').read_text() == lines


def test_a_fault_loses_no_metrics(bucket):
  with (
    pytest.raises(KeyError),
    workdirs.local_log(bucket, lambda: None) as (directory, _),
  ):
    push(directory, 1)
    raise KeyError
  assert steps(bucket / 'metrics.jsonl') == [1]


def test_json_in_a_bucket(bucket):
  for value in ({'steps': 1}, {'steps': 2}):
    workdirs.write_json(bucket / 'config.json', value)
    assert workdirs.read_json(bucket / 'config.json') == value
  assert [path.name for path in bucket.iterdir()] == ['config.json']


def test_a_local_directory_holds_the_log_itself(tmp_path):
  workdir = workdirs.open_workdir(tmp_path)
  with workdirs.local_log(workdir, lambda: None) as (directory, upload):
    upload()
    assert directory == tmp_path
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('gs://bucket/run', 'pip install gcsfs'),
    ('ftp://host/run', 'must be a local directory or gs://'),
  ],
)
def test_a_place_that_cannot_be_reached_is_refused(path, message, monkeypatch):
  def missing(name):
    raise ImportError(name)

  monkeypatch.setattr(fsspec, 'get_filesystem_class', missing)
  with pytest.raises(ValueError, match=message):
    workdirs.open_workdir(path)


@pytest.mark.long
def test_a_run_in_a_bucket_goes_on(text, tmp_path, bucket, monkeypatch):
  """Killed in step 4; checkpoints apart: they have a client of their own."""

  def local(name):
    of_gs = getattr(loop, name)
    return lambda path, *args: of_gs(tmp_path / path.name, *args)

  for name in ('Checkpoints', 'restore_newest', 'steps'):
    monkeypatch.setattr(loop, name, local(name))
  config = tiny.tiny_config(text, steps=4, checkpoint_every=2)
  run = loop.Run(config, bucket)
  batches = itertools.islice(run.training_batches(0), 3)
  monkeypatch.setattr(run, 'training_batches', lambda _: batches)
  with pytest.raises(StopIteration):
    run.train()
  assert steps(bucket / 'metrics.jsonl') == [1, 2, 3]
  loop.Run(config, 'gs://bucket/run').train()
  assert steps(bucket / 'metrics.jsonl') == [1, 2, 3, 4]
  assert {path.name for path in epath.Path(bucket).iterdir()} > {
    'config.json',
    'run.json',
  }


def test_room_for_checkpoints_is_asked_for_before_the_first_step(
  text, tmp_path, monkeypatch
):
  usage = collections.namedtuple('usage', 'total used free')
  monkeypatch.setattr(
    workdirs.shutil, 'disk_usage', lambda path: usage(10**9, 0, 10**5)
  )
  run = loop.Run(tiny.tiny_config(text), tmp_path / 'run')
  with pytest.raises(processes.Refused, match='0.0 GB are free, but 3 more'):
    run.train()
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_file_system_is_asked_three_times(monkeypatch, capsys):
  monkeypatch.setattr(workdirs, 'PAUSES', (0.0, 0.0))
  answers = iter(
    [OSError('full'), KeyError('odd'), None, *[OSError('gone')] * 3]
  )

  def write():
    if answer := next(answers):
      raise answer

  workdirs.patiently(write, 'upload')
  assert capsys.readouterr().err.count('warning: upload: ') == 2
  with pytest.raises(OSError, match='gone'):
    workdirs.patiently(write, 'upload')
