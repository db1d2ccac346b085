"""Runs as they are watched: what is read, what is shown, when it ends."""

import io
import json
import math
import os
import time

import pytest
from rich.console import Console

from moe_jax.analysis import follow
from moe_jax.analysis import watch
from moe_jax.analysis.follow import Followed


def json_lines(records):
  return ''.join(json.dumps(record) + '\n' for record in records)


def append(workdir, text):
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write(text)


def followed(workdir):
  run = Followed(workdir, os.path.basename(workdir))
  run.look()
  return run


def shown(runs, width=80, height=24, encoding='utf-8', now=0.0):
  """What a terminal of that size shows."""
  file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
  console = Console(file=file, width=width, height=height)
  console.print(watch.view(runs, console, now))
  file.seek(0)
  return file.read()


def test_sparkline():
  def line(values, top=8.0, width=9):
    return watch.sparkline(values, top=top, width=width, blocks='01234567')

  assert line([0.0, 1.0, 4.5, 7.9, 8.0, 9.0]) == '014777'
  assert line([1.0, math.nan, 2.0]) == '1?2'
  assert line([1.0, 3.0, 5.0, 7.0], width=2) == '26'
  assert line([0.0, 0.0], top=0.0) == '00'
  assert line([]) == ''


def test_reads_a_run_that_goes_on(write_run, records):
  workdir = write_run(records=records[:1])
  run = followed(workdir)
  assert (run.step, run.total, run.finished) == (1, 3, False)
  assert run.layers == {'layer_00': [1.5], 'layer_01': [0.5]}
  second, third = map(json.dumps, records[1:])
  append(workdir, second + '\n' + third[:50])
  run.look()
  assert run.step == 2  # The third is being written.
  append(workdir, third[50:] + '\n')
  run.look()
  assert (run.step, run.finished) == (3, True)
  assert run.layers['layer_01'] == [0.5, 1.0, 0.5]
  assert run.evaluations == {'validation': (3, 20.125)}
  assert not any(isinstance(v, list) for v in run.last.values())


def test_nothing_is_read_twice(write_run, records):
  """What was read is damaged then, in place; it would be an error."""
  workdir = write_run(records=records[:1])
  run = followed(workdir)
  path = workdir / 'metrics.jsonl'
  with path.open('r+b') as file:
    file.write(b'damage')
  append(workdir, json_lines(records[1:2]))
  run.look()
  assert run.step == 2
  with pytest.raises(ValueError, match=r'metrics\.jsonl: line 1 is damaged'):
    followed(workdir)


def test_a_file_that_was_cut_back_is_read_anew(write_run, records):
  workdir = write_run(records=records)
  run = followed(workdir)
  # As a run does that resumes from its checkpoint of step 1.
  anew = workdir / 'metrics.tmp'
  anew.write_text(json_lines(records[:1]))
  os.replace(anew, workdir / 'metrics.jsonl')
  run.look()
  assert run.step == 1
  again = [r | {'train/loss': 3.0} for r in records[1:]]
  append(workdir, json_lines(again))
  run.look()
  assert [r['train/loss'] for r in run.steps] == [8.0, 3.0, 3.0]
  # In place, and longer than before when it is looked at.
  more = [
    records[0] | {'step': step, 'train/loss': 2.0} for step in range(1, 9)
  ]
  (workdir / 'metrics.jsonl').write_text(json_lines(more))
  run.look()
  assert [r['step'] for r in run.steps] == list(range(1, 9))
  assert {r['train/loss'] for r in run.steps} == {2.0}


def test_the_last_steps_are_kept(write_run, records, monkeypatch):
  long = [records[0] | {'step': step} for step in range(1, 101)]
  monkeypatch.setattr(follow, '_STEPS', 3)
  run = followed(write_run(records=long, steps=100))
  assert [r['step'] for r in run.steps] == [98, 99, 100]
  assert run.layers['layer_00'] == [1.5] * 3


def test_states(write_run, records, tmp_path):
  run = followed(tmp_path / 'to_come')
  assert run.state(0.0) == 'no step yet'
  assert watch.line(run, 0.0) == 'to_come: no step yet'
  assert followed(write_run('begun', records=[])).state(0.0) == 'no step yet'
  for record in records:
    record['time/step_seconds'] = 10.0
  workdir = write_run('going', records=records[:2])
  os.utime(workdir / 'metrics.jsonl', (1000, 1000))
  run = followed(workdir)
  # A step of 10 s: after 20 of them one may wonder.
  assert run.state(1199.0) == 'running'
  assert watch.line(run, 1199.0).endswith('  0:00:10 left')
  assert run.state(1210.0) == 'silent'
  assert watch.line(run, 1210.0).endswith('  silent 0:03:30')
  (workdir / 'not_finite_step_00000002.json').write_text('{}')
  assert run.state(1000.0) == 'gave up'
  assert followed(write_run('whole')).state(1e9) == 'finished'


def test_line(write_run, records):
  records[1]['train/skipped_steps'] = 4
  run = followed(write_run(records=records[:2]))
  assert watch.line(run, time.time()) == (
    'bip: step 2/3  loss 7.000  MaxVio 0.500  tokens/s 16  skipped 4  '
    'validation perplexity 40.000 (step 2)  0:01:00 left'
  )


def test_the_table(write_run, records, tmp_path):
  whole = followed(write_run('whole'))
  records[1]['train/loss'] = None
  going = followed(write_run('going', records=records[:2]))
  runs = [whole, going, followed(tmp_path / 'to_come')]
  head, first, second, third, *rest = shown(runs, now=time.time()).splitlines()
  headings = 'run step loss MaxVio tokens/s skipped state'
  assert head.split() == headings.split()
  assert first.split() == 'whole 3/3 6.000 0.250 24 0 finished'.split()
  assert second.split()[:4] == ['going', '2/3', 'not', 'finite']
  assert second.rstrip().endswith(' 0  0:01:00 left')
  assert third.split() == ['to_come', 'no', 'step', 'yet']
  text = '\n'.join(rest)
  assert 'whole: steps 1 to 3, MaxVio 0 to 1.500' in text
  assert 'validation perplexity 20.125 (step 3)' in text
  # 1.5, 0, 0 and 0.5, 1, 0.5 of 1.5; the loss from 8 down to 6.
  assert 'layer_00   0.000 █▁▁' in text
  assert 'layer_01   0.500 ▃▆▃' in text
  assert 'loss       6.000 █▅▁' in text


@pytest.mark.parametrize('size', [(80, 24), (40, 10), (200, 50)])
@pytest.mark.parametrize('count', [1, 3])
def test_fits_the_terminal(write_run, records, size, count):
  width, height = size
  for record in records:
    for layer in range(61):
      record[f'router/max_violation/layer_{layer:02d}'] = float(layer)
  runs = [
    followed(write_run(f'{"long_" * 20}{i}', records=records))
    for i in range(count)
  ]
  lines = shown(runs, width, height).splitlines()
  assert len(lines) <= height
  assert max(map(len, lines)) <= width
  if size == (80, 24) and count == 1:  # 18 rows of two, with the loss.
    assert 'worst 35 of 61 layers' in lines[3]
    assert 'layer_26' in '\n'.join(lines)
    assert 'layer_25' not in '\n'.join(lines)


def test_what_is_not_finite_has_no_height(write_run, records):
  for record in records[1:]:
    record['train/loss'] = record['router/max_violation/layer_00'] = None
  text = shown([followed(write_run(records=records))])
  assert 'layer_00 not finite █??' in text
  assert 'loss     not finite ▁??' in text


def test_terminals_of_few_characters(write_run):
  text = shown([followed(write_run())], encoding='latin-1')
  assert text.isascii()
  assert 'layer_00   0.000 @__' in text


@pytest.fixture
def clock(monkeypatch):
  """Time that passes in sleeps only, and what is done in each of them."""

  class Clock:
    def __init__(self):
      self.now, self.tasks = 1e9, []

    def time(self):
      return self.now

    def sleep(self, seconds):
      self.now += seconds
      if self.tasks:
        self.tasks.pop(0)()

  monkeypatch.setattr(watch, 'time', Clock())
  return watch.time


def test_lines_until_the_end(write_run, records, clock, capsys):
  """A line at once, then the news every ten seconds."""
  workdir = write_run(records=[])

  def write(record):
    return lambda: append(workdir, json_lines([record]))

  def nothing():
    pass

  first, second, third = map(write, records)
  clock.tasks += [first, nothing, second, third]
  assert watch.main([str(workdir)]) == 0
  assert clock.tasks == []
  lines = capsys.readouterr().out.splitlines()
  assert [text.split('  ')[0] for text in lines] == [
    'bip: no step yet',
    'bip: step 1/3',
    'bip: step 2/3',
    'bip: step 3/3',
  ]
  assert lines[-1].endswith('  finished')


def test_ctrl_c(write_run, records, clock, capsys):
  def interrupt():
    raise KeyboardInterrupt

  clock.tasks.append(interrupt)
  assert watch.main([str(write_run(records=records[:1]))]) == 0
  out, err = capsys.readouterr()
  assert out.startswith('bip: step 1/3') and err == ''


def test_once(write_run, records, tmp_path, clock, capsys):
  workdirs = [write_run(records=records[:1]), tmp_path / 'to_come']
  assert watch.main(['--once', *map(str, workdirs)]) == 0
  first, second = capsys.readouterr().out.splitlines()
  assert first.startswith('bip: step 1/3')
  assert second == 'to_come: no step yet'


@pytest.mark.parametrize('term', ['xterm', 'dumb'])
def test_a_table_where_the_terminal_can(
  write_run, clock, capsys, monkeypatch, term
):
  file = io.StringIO()

  def console():
    return Console(
      file=file, force_terminal=True, width=80, _environ={'TERM': term}
    )

  monkeypatch.setattr(watch, 'Console', console)
  assert watch.main([str(write_run())]) == 0
  table, lines = file.getvalue(), capsys.readouterr().out
  if term == 'dumb':
    assert table == '' and lines.startswith('bip: step 3/3')
    assert '\x1b' not in lines
  else:
    assert 'skipped' in table and '▃▆▃' in table and lines == ''


def test_names_send_nothing_to_the_terminal(write_run, capsys):
  assert watch.main([str(write_run('a\x1b[2Jb\nc'))]) == 0
  assert capsys.readouterr().out.startswith('a?[2Jb?c: step 3/3')


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda w: 'gs://bucket/run', 'watch a copy'),
    (lambda w: w / 'run.json', 'Not a directory'),
    (
      lambda w: append(w, '{"step": 4}\n') or w,
      "'time/step_seconds' is missing",
    ),
    (lambda w: append(w, '[]\n') or w, 'no record of a step'),
    (lambda w: (w / 'config.json').unlink() or w, 'config.json is missing'),
  ],
)
def test_errors_are_one_line(write_run, capsys, damage, message):
  assert watch.main(['--once', str(damage(write_run()))]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert message in error
