"""Remote work directories, in a bucket that is kept in memory."""

import collections
import dataclasses
import itertools
import json

from etils import epath
import fsspec
import pytest

from moe_jax import config as config_lib
from moe_jax import storage
from moe_jax.options import Refused
from moe_jax.runs import checkpoints, files, records, writer
from moe_jax.train import loop
from tests.train import tiny


def push(directory, step):
  file = records.Writer(directory / 'metrics.jsonl', step - 1)
  file.show({'step': step})
  file.close()


def steps(path):
  lines = path.read_text().splitlines()
  return [json.loads(line)['step'] for line in lines]


def test_metrics_go_on_from_what_was_uploaded(bucket):
  with files.local_log(bucket, lambda: None) as (first, upload):
    push(first, 1)
    assert not (bucket / 'metrics.jsonl').exists()
    upload()
    assert steps(bucket / 'metrics.jsonl') == [1]
  assert not first.exists()
  with files.local_log(bucket, lambda: None) as (second, _):
    push(second, 2)
    assert steps(bucket / 'metrics.jsonl') == [1]
  assert steps(bucket / 'metrics.jsonl') == [1, 2]


def test_who_lost_the_directory_leaves_it_alone(bucket, capsys):
  def check():
    raise RuntimeError('taken over')

  with files.local_log(bucket, check) as (directory, _):
    push(directory, 1)
  assert not (bucket / 'metrics.jsonl').exists()
  assert 'not uploaded: taken over' in capsys.readouterr().err


def test_steps_without_a_checkpoint_are_not_thrown_away(text, tmp_path):
  config = tiny.tiny_config(text, checkpoint_every=2)
  (tmp_path / 'run').mkdir()
  lines = ''.join(f'{{"step": {i}}}\n' for i in range(1, 6))
  (tmp_path / 'run' / 'metrics.jsonl').write_text(lines)
  with pytest.raises(Refused, match='has 5 steps, but there is no'):
    tiny.run(config, tmp_path / 'run')
  assert (tmp_path / 'run' / 'metrics.jsonl').read_text() == lines


@pytest.mark.long
def test_the_bound_on_what_may_be_lost_is_that_of_the_steps(text, tmp_path):
  """Killed at step 9 before its first checkpoint; saved more often since."""
  rare = tiny.tiny_config(text, steps=10, checkpoint_every=100)
  (tmp_path / 'run').mkdir()
  lines = ''.join(f'{{"step": {i}}}\n' for i in range(1, 10))
  (tmp_path / 'run' / 'metrics.jsonl').write_text(lines)
  options = config_lib.to_dict(rare)
  files.write_json(epath.Path(tmp_path / 'run' / 'config.json'), options)
  often = dataclasses.replace(rare, checkpoint_every=2)
  tiny.run(often, tmp_path / 'run')
  assert steps(tmp_path / 'run' / 'metrics.jsonl') == list(range(1, 11))


def test_a_fault_loses_no_metrics(bucket):
  with (
    pytest.raises(KeyError),
    files.local_log(bucket, lambda: None) as (directory, _),
  ):
    push(directory, 1)
    raise KeyError
  assert steps(bucket / 'metrics.jsonl') == [1]


def test_json_in_a_bucket(bucket):
  for value in ({'steps': 1}, {'steps': 2}):
    files.write_json(bucket / 'config.json', value)
    assert files.read_json(bucket / 'config.json') == value
  assert [path.name for path in bucket.iterdir()] == ['config.json']


def test_a_bucket_is_asked_again_what_is_in_it(bucket):
  directory = files.absolute(bucket / 'checkpoints')
  for name in ('1', '2'):
    (directory / name).write_text('whole')
    assert name in [path.name for path in directory.iterdir()]


def test_a_local_directory_holds_the_log_itself(tmp_path):
  workdir = files.open_workdir(tmp_path)
  with files.local_log(workdir, lambda: None) as (directory, upload):
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
    files.open_workdir(path)


@pytest.mark.long
def test_a_run_in_a_bucket_goes_on(text, tmp_path, bucket, monkeypatch):
  """Killed in step 4; checkpoints apart: they have a client of their own."""

  def local(module, name):
    of_gs = getattr(module, name)
    monkeypatch.setattr(
      module,
      name,
      lambda path, *args, **named: of_gs(tmp_path / path.name, *args, **named),
    )

  local(writer, 'Saver')
  local(checkpoints, 'restore_newest')
  local(checkpoints, 'steps')
  config = tiny.tiny_config(text, steps=4, checkpoint_every=2)
  training_batches = loop.training_batches
  with monkeypatch.context() as patch, pytest.raises(StopIteration):
    patch.setattr(
      loop,
      'training_batches',
      lambda *args: itertools.islice(training_batches(*args), 3),
    )
    tiny.run(config, bucket)
  assert steps(bucket / 'metrics.jsonl') == [1, 2, 3]
  tiny.run(config, 'gs://bucket/run')
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
    files.shutil, 'disk_usage', lambda path: usage(10**9, 0, 10**5)
  )
  with pytest.raises(Refused, match='0.0 GB are free, but 3 more'):
    tiny.run(tiny.tiny_config(text), tmp_path / 'run')
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_file_system_is_asked_three_times(monkeypatch, capsys):
  monkeypatch.setattr(storage, 'PAUSES', (0.0, 0.0))
  answers = iter(
    [OSError('full'), KeyError('odd'), None, *[OSError('gone')] * 3]
  )

  def write():
    if answer := next(answers):
      raise answer

  storage.patiently(write, 'upload')
  assert capsys.readouterr().err.count('warning: upload: ') == 2
  with pytest.raises(OSError, match='gone'):
    storage.patiently(write, 'upload')
