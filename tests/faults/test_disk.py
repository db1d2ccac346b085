"""Full and read-only disks, damaged checkpoints, two runs in one directory."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.faults import harness

KEPT = {'checkpoints_kept': 3}


@pytest.fixture(scope='module')
def expected(tmp_path_factory, text, cache):
  place = tmp_path_factory.mktemp('alone')
  return harness.Trial(place, text, cache, options=KEPT).complete()


@pytest.fixture(scope='module')
def stopped(tmp_path_factory, text, cache):
  """The work directory of a run killed in step 11, of 12."""
  place = tmp_path_factory.mktemp('stopped')
  trial = harness.Trial(place, text, cache, options=KEPT)
  trial.stop_in('step', 10)  # That of step 9 is recorded.
  assert harness.saved_steps(trial.workdir) == [3, 6, 9]
  return trial.workdir


@pytest.fixture
def again(trial, stopped):
  """A command that is to resume in a copy of `stopped`."""
  command = trial(**KEPT)
  shutil.copytree(stopped, command.workdir)
  return command


def assert_refused(program):
  """Exit code 2, and why in a line, not in a page."""
  assert program.code == 2, program.tail()
  assert 'Traceback' not in program.said(), program.tail()
  assert program.said().splitlines()[-1].startswith('error: ')


def assert_says(what, program):
  """There is a line that says why, whatever libraries say besides."""
  lines = program.said().splitlines()
  print(f'{len(lines)} lines about {what}')
  assert any(re.search(f'error: .*{what}', line) for line in lines), (
    program.tail()
  )


# A disk of 16 MB, mounted in a namespace of its own: no trace is left.


class Disk:
  def __init__(self, path: pathlib.Path):
    path.mkdir()
    mount = 'mount -t tmpfs -o size=16m none "$0"'
    script = f'{mount} && echo ready && exec sleep 3600'
    self.process = subprocess.Popen(
      ['unshare', '-rm', 'sh', '-c', script, path], stdout=subprocess.PIPE
    )
    assert self.process.stdout.readline() == b'ready\n', 'needs user namespaces'
    self.inside = path
    self.path = pathlib.Path(f'/proc/{self.process.pid}/root{path}')

  def fill(self, *, free: int) -> None:
    with (self.path / 'ballast').open('wb', buffering=0) as file:
      try:
        while True:
          file.write(bytes(4096))
      except OSError:
        file.truncate(file.tell() - free)

  def empty(self) -> None:
    (self.path / 'ballast').unlink()

  def make_read_only(self) -> None:
    namespace = f'nsenter -t {self.process.pid} -U -m --preserve-credentials'
    subprocess.run(
      [*namespace.split(), 'mount', '-o', 'remount,ro', self.inside],
      check=True,
    )


@pytest.fixture
def disk(tmp_path):
  disk = Disk(tmp_path / 'disk')
  yield disk
  disk.process.kill()
  disk.process.communicate()


@pytest.mark.long
@pytest.mark.parametrize('free', [32768, 0], ids='{}_bytes_free'.format)
def test_full_disk(trial, disk, expected, free):
  """Room for lines but not for a checkpoint; then for nothing at all."""
  command = trial(workdir=disk.path / 'run', **KEPT)
  with command.started() as program:
    assert program.reach('save', 1, 'end'), program.tail()
    disk.fill(free=free)
    program.finish()
  assert program.code == 1, program.tail()
  assert harness.saved_steps(command.workdir) == [3]
  disk.empty()
  assert command.complete() == expected
  assert not harness.leftovers(command.workdir)
  assert_says('No space left', program)


@pytest.mark.long
def test_a_disk_that_is_full_for_a_moment(trial, disk, expected):
  command = trial(workdir=disk.path / 'run', **KEPT)
  with command.started() as program:
    assert program.reach('save', 1, 'end'), program.tail()
    disk.fill(free=32768)
    assert program.reach('save', 2), program.tail()
    time.sleep(0.5)
    disk.empty()
    program.finish()
  assert program.code == 0, program.tail()
  assert harness.digest(command.workdir, 12) == expected
  assert not harness.leftovers(command.workdir)


@pytest.mark.long
def test_files_that_cannot_grow(trial, expected):
  """The limit of a quota or of ulimit -f, met in C++: EFBIG."""
  command = trial(**KEPT)
  program = command.run('small_files')
  assert program.code == 1, program.tail()
  assert harness.saved_steps(command.workdir) == [3]
  assert command.complete() == expected
  assert not harness.leftovers(command.workdir)
  assert_says('[Ff]ile too large', program)


@pytest.mark.long
def test_read_only_disk(trial, disk, stopped):
  command = trial(workdir=disk.path / 'run', **KEPT)
  shutil.copytree(stopped, command.workdir)
  disk.make_read_only()
  assert_refused(command.run())
  command.workdir = disk.path / 'another'
  assert_refused(command.run())


def without_permission(command):
  """Root may do everything, unless that is taken from it."""
  if os.geteuid() == 0:
    command.prefix = ('setpriv', '--bounding-set=-dac_override')
  return command.run()


def test_a_directory_that_is_not_ours(trial):
  command = trial()
  command.workdir.mkdir(mode=0o555)
  assert_refused(without_permission(command))
  assert not list(command.workdir.iterdir())


@pytest.mark.long
@pytest.mark.parametrize('name', ['.', 'checkpoints'])
def test_a_run_that_is_not_ours(again, expected, name):
  """Known at once, or when there is something to save; but it does end."""
  path = again.workdir / name
  mode = path.stat().st_mode
  path.chmod(0o555)
  program = without_permission(again)
  path.chmod(mode)
  assert program.code in (1, 2), program.tail()
  assert again.complete() == expected
  assert_says('[Pp]ermission', program)


@pytest.mark.long
def test_two_runs_in_one_directory(trial, expected):
  """The second comes while the first one is held in the middle of it."""
  command = trial(**KEPT)
  with command.started() as first:
    assert first.reach('save', 1, 'end'), first.tail()
    first.process.send_signal(signal.SIGSTOP)
    second = command.run()
    first.process.send_signal(signal.SIGCONT)
    first.finish()
  assert_refused(second)
  assert str(command.workdir) in second.said()
  assert first.code == 0, first.tail()
  assert harness.digest(command.workdir, 12) == expected


# Damages. Each takes the directory of a checkpoint.


def files(path):
  """Returns all files, the largest first."""
  found = [file for file in sorted(path.rglob('*')) if file.is_file()]
  return sorted(found, key=lambda file: -file.stat().st_size)


def truncate(path):
  file = files(path / 'params')[0]
  os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(path, part=0.5):
  file = files(path)[0]
  data = bytearray(file.read_bytes())
  data[int(part * len(data))] ^= 16
  file.write_bytes(data)


def flip_a_bit_of(item, part):
  return lambda path: flip_a_bit(path / item, part)


def delete_half(path):
  for file in files(path)[::2]:
    file.unlink()


def empty_files(path):
  for file in files(path):
    os.truncate(file, 0)


def empty_directory(path):
  shutil.rmtree(path)
  path.mkdir()


def lose_router(path):
  shutil.rmtree(path / 'router')


def other_sequence(path):
  """As JSON it is well."""
  file = path / 'data' / 'metadata'
  file.write_text(file.read_text().replace('72', '64'))


DAMAGES = {
  function.__name__: function
  for function in (truncate, flip_a_bit, delete_half, empty_files)
  + (empty_directory, lose_router, other_sequence)
} | {
  f'flip_a_bit_of_{item}_at_{part}': flip_a_bit_of(item, part)
  for item in ('params', 'optimizer', 'router', 'meta')
  for part in (0.05, 0.4, 0.75)
}


def assert_skipped(command, expected):
  """Named in a warning, moved aside, the one before taken."""
  program = command.run()
  assert program.code == 0, program.tail()
  assert harness.digest(command.workdir, 12) == expected
  warning = [x for x in program.said().splitlines() if ' moved to ' in x]
  assert len(warning) == 1 and re.search(r'\b9\b', warning[0]), program.tail()
  assert 'Traceback' not in program.said(), program.tail()
  assert len(list((command.workdir / 'damaged').iterdir())) == 1
  assert harness.leftovers(command.workdir) == ['damaged']


@pytest.mark.long
@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint(again, expected, damage):
  DAMAGES[damage](again.workdir / 'checkpoints' / '9')
  if 'flip' in damage:  # Not every bit is used, but one that is is missed.
    assert again.complete() == expected
  else:
    assert_skipped(again, expected)


@pytest.mark.long
@pytest.mark.parametrize('option', ['seed=1', 'model.width=32', 'steps=11'])
def test_a_checkpoint_of_another_run(trial, again, expected, option):
  name, value = option.split('=')
  other = trial('other', **KEPT, **{name: value})
  other.stop_in('step', 9)
  shutil.rmtree(again.workdir / 'checkpoints' / '9')
  shutil.copytree(
    other.workdir / 'checkpoints' / '9', again.workdir / 'checkpoints' / '9'
  )
  assert_skipped(again, expected)


@pytest.mark.long
@pytest.mark.parametrize('damage', ['truncate', 'empty_files', 'flip_a_bit'])
def test_nothing_but_damaged_checkpoints(again, damage):
  for step in (3, 6, 9):
    DAMAGES[damage](again.workdir / 'checkpoints' / str(step))
  metrics = harness.records(again.workdir)
  assert_refused(again.run())
  assert harness.records(again.workdir) == metrics


@pytest.mark.long
def test_no_checkpoint_where_there_were_some(again):
  """Steps that are recorded are not thrown away without a word."""
  shutil.rmtree(again.workdir / 'checkpoints')
  metrics = harness.records(again.workdir)
  program = again.run()
  if program.code == 0:
    assert 'metrics.jsonl' in program.said()
  else:
    assert_refused(program)
    assert harness.records(again.workdir) == metrics


# metrics.jsonl, and the clock.


@pytest.mark.long
@pytest.mark.parametrize('tail', ['half a line', 'twice after', 'twice before'])
def test_the_tail_of_the_metrics(again, expected, tail):
  """Before or after the checkpoint of step 9."""
  path = again.workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(
    {
      'half a line': ''.join(lines) + lines[-1][:100],
      'twice after': ''.join(lines[:9] + [lines[8].replace(' 9,', ' 10,')] * 2),
      'twice before': ''.join(lines[:9] + lines[7:9]),
    }[tail]
  )
  program = again.run()
  if tail == 'twice before' and program.code:
    assert_refused(program)
    assert 'metrics.jsonl' in program.said()
  else:
    assert program.code == 0, program.tail()
    assert harness.digest(again.workdir, 12) == expected


@pytest.mark.long
def test_a_clock_that_goes_backwards(trial, again, expected):
  assert trial('another', **KEPT).complete('clock') == expected
  assert again.complete('clock') == expected
