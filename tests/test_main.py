"""The command line: what is wrong is said in one line, before any work."""

import pytest

from moe_jax import main as command_line
from moe_jax.train import loop
from tests.train import tiny

DEMO = '--config=experiments/demo.py:bip'


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--config=FILE.py:METHOD: missing'),
    ([DEMO], '--workdir=DIR: missing'),
    (['--config=nope.py:bip'], '--config=nope.py: no such file'),
    (['--config=Makefile'], '--config=Makefile: SyntaxError'),
    (['--config=experiments/demo.py:bipp'], 'did you mean bip?'),
    ([DEMO, '--workdri=x'], 'did you mean workdir'),
    ([DEMO, 'steps=3'], 'steps=3: unexpected'),
    ([DEMO, '--config.stepz=3'], '--config.stepz: unknown; did you mean steps'),
    ([DEMO, '--config.model.headz=3'], 'did you mean heads'),
    ([DEMO, '--config.steps.more=3'], '--config.steps.more: unknown'),
    ([DEMO, '--config.steps=many'], '--config.steps=many'),
    ([DEMO, '--config.steps=1.5'], '--config.steps=1.5'),
    ([DEMO, '--config.steps'], 'write --config.steps=VALUE'),
    ([DEMO, '--config.model=3'], 'a group of options'),
    ([DEMO, '--config.balancer.rate=1.0'], '--config.balancer.rate: unknown'),
    ([DEMO, '--config.model.experts_per_token=17'], 'must be at most'),
    ([DEMO, '--config.mesh.data=77'], 'mesh.data=77'),
    ([DEMO, '--config.mesh.expert=3'], 'mesh.expert=3'),
    ([DEMO, '--config.batch_size=9', '--config.mesh.data=8'], 'batch_size=9'),
    ([DEMO, '--config.data.dataset=sotoo'], 'sotu'),
  ],
)
def test_refused_in_one_line_with_nothing_left_behind(
  flags, message, tmp_path, capsys
):
  workdir = tmp_path / 'run'
  if flags != [DEMO] and flags:
    flags = [*flags, f'--workdir={workdir}']
  assert command_line.main(['main', *flags]) == 2
  captured = capsys.readouterr()
  assert message in captured.err
  assert captured.err.count('\n') == 1
  assert not workdir.exists()


def test_overrides_keep_their_type():
  options, values = command_line.parse(
    [
      'main',
      DEMO,
      '--workdir=somewhere',
      '--config.steps=7',
      '--config.learning_rate=1',
      '--config.balancer.clip=false',
      '--config.data.files=a,b',
    ]
  )
  assert values.workdir == 'somewhere'
  assert options.steps == 7
  assert options.learning_rate == 1.0
  assert options.balancer.clip is False
  assert options.data.files == 'a,b'


@pytest.fixture
def arguments(tmp_path):
  """Of a run that could begin at once."""
  (tmp_path / 'text').mkdir()
  options = tiny.of_text(tiny.write_text(tmp_path / 'text'))
  flags = [f'--config.{name}={value}' for name, value in options.items()]
  experiment = f'--config={tiny.__file__}:bip'
  return ['main', experiment, f'--workdir={tmp_path / "run"}', *flags]


def test_too_big_a_model_is_refused_before_it_is_made(
  arguments, tmp_path, capsys
):
  sizes = {'width': 2**17, 'hidden': 2**20, 'experts': 2**14}
  flags = [f'--config.model.{name}={value}' for name, value in sizes.items()]
  assert command_line.main([*arguments, *flags]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: model: parameters, optimizer and router take')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('error', 'said'),
  [
    (
      RuntimeError('RESOURCE_EXHAUSTED: Out of memory'),
      'batch_size',
    ),
    (OSError('No space left'), 'resumes from the last checkpoint'),
  ],
)
def test_what_ends_a_run_is_told_in_a_line(
  arguments, capsys, monkeypatch, error, said
):
  def fail(plan, preempted):
    raise error

  monkeypatch.setattr(loop, 'train', fail)
  assert command_line.main(arguments) == 1
  output = capsys.readouterr().err
  assert f'error: {" ".join(str(error).split())}' in output and said in output


def test_help_shows_worked_examples(capsys):
  assert command_line.main(['main', '--help']) == 0
  assert '--config=experiments/demo.py:bip' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('x = 1', 'get_config'),
    ('def (', 'SyntaxError'),
    ('import nothing_of_that_name', 'ModuleNotFoundError'),
    ('def get_config(method): return {}[method]', 'KeyError'),
  ],
)
def test_experiment_file_without_get_config(content, message, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(content)
  with pytest.raises(ValueError, match=message):
    command_line.load_experiment(f'{path}:bip')


def test_print_sharding_lists_every_array_and_trains_nothing(capsys):
  flags = ['--config.mesh.data=2', '--config.mesh.expert=4']
  fsdp = ['--config.mesh.fsdp=true', '--config.model.remat=true']
  totals = []
  for more in ([], fsdp):
    arguments = ['main', DEMO, '--print_sharding', *flags, *more]
    assert command_line.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    gate = [line for line in lines if 'feed_forward.gate' in line]
    assert len(gate) == 3  # The parameter and two moments.
    spec = (
      '(None, expert, data, None)' if more else '(None, expert, None, None)'
    )
    assert all(spec in line for line in gate)
    totals.append(int(lines[-1].split()[-1].replace(',', '')))
  assert totals[1] < 0.7 * totals[0]
