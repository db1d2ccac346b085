"""The launchers, with the programs that they call replaced by small ones."""

import os
import pathlib
import shlex
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'
# What a shell would split, expand or end, if it were let.
AWKWARD = '--config.data.files=a "b" \'c\' $HOME *.txt;\n&'


@pytest.fixture
def programs(tmp_path, monkeypatch):
  """Returns a function that puts a program of a Python text on the PATH."""
  directory = tmp_path / 'programs'
  directory.mkdir()
  monkeypatch.setenv('PATH', f'{directory}:{os.environ["PATH"]}')

  def write(name: str, text: str) -> pathlib.Path:
    path = directory / name
    path.write_text(f'#!{sys.executable}\n{text}\n')
    path.chmod(0o755)
    return path

  return write


def run(script, *arguments, **options) -> subprocess.CompletedProcess:
  return subprocess.run(
    [LAUNCH / script, *arguments],
    capture_output=True,
    text=True,
    timeout=60,
    **options,
  )


def python(programs, ending: str) -> dict[str, str]:
  """Returns an environment in which trainings only say how they were started.

  Args:
    programs: the fixture.
    ending: what a process does then; `i` is its number.
  """
  path = programs(
    'python_of_test',
    f"""
import os, sys, time
if sys.argv[1] == '-c':
  os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
names = 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'XLA_FLAGS'
line = ' '.join(map(str, [sys.argv[1:], *map(os.environ.get, names)]))
os.write(1, line.encode() + b'\\n')  # at once: others write as well
i = int(os.environ.get('JAX_PROCESS_ID', 0))
{ending}""",
  )
  return {**os.environ, 'PYTHON': str(path), 'XLA_FLAGS': '--before'}


def test_local_processes_meet_on_loopback_and_get_the_same_command(programs):
  env = python(programs, 'sys.exit(0)')
  done = run('local.sh', 'c.py:bip', 'my runs', '3x2', AWKWARD, env=env)
  assert done.returncode == 0
  started = done.stdout.splitlines()
  assert len(started) == 3
  command = ['-m', 'moe_jax.main', '--config=c.py:bip', '--workdir=my runs']
  assert started[0].startswith(f'{command + [AWKWARD]} 127.0.0.1:')
  count = '--xla_force_host_platform_device_count'
  assert started[0].endswith(f' 3 --before {count}=2')
  assert len(set(started)) == 1


def test_local_single_process_needs_no_coordinator(programs):
  env = python(programs, 'sys.exit(75)')
  done = run('local.sh', 'c.py', 'run', '--config.steps=3', env=env)
  assert done.returncode == 75
  assert done.stdout.endswith("'--config.steps=3'] None None --before\n")


@pytest.mark.parametrize(
  ('ending', 'code'),
  [
    ('time.sleep(i); sys.exit(2)', 2),
    ('sys.exit(3) if i == 1 else time.sleep(99)', 3),
    ('os.kill(os.getpid(), 9) if i == 1 else time.sleep(99)', 137),
    ('sys.exit(75) if i == 0 else (time.sleep(1), sys.exit(1))', 1),
    # Preempted: the one that writes the checkpoint ends later, undisturbed.
    ('time.sleep(2 * i); print("saved"); sys.exit(75)', 75),
  ],
)
def test_local_failure_ends_all_and_is_passed_on(ending, code, programs):
  done = run('local.sh', 'c.py', 'run', '2x1', env=python(programs, ending))
  assert done.returncode == code
  assert done.stdout.count('saved') == (2 if code == 75 else 0)


@pytest.mark.parametrize(
  ('reaction', 'signals', 'code'),
  [
    ('lambda *_: sys.exit(75)', 1, 75),
    ('lambda *_: os.write(1, b"ready")', 2, 137),
  ],
  ids=['asked', 'made'],
)
def test_local_stopped_processes_are_asked_then_made_to_end(
  reaction, signals, code, programs
):
  ending = f"""
import signal
signal.signal(signal.SIGTERM, {reaction})
os.write(1, b'ready')
while True: time.sleep(1)"""
  with subprocess.Popen(
    [LAUNCH / 'local.sh', 'c.py', 'run', '2x1'],
    env=python(programs, ending),
    stdout=subprocess.PIPE,
  ) as process:
    output = b''
    for count in range(signals):
      while output.count(b'ready') < 2 * (count + 1):
        output += os.read(process.stdout.fileno(), 1000)
      time.sleep(0.2 * count)  # bash forgets what comes while it answers one.
      process.terminate()
    assert process.wait(20) == code


@pytest.mark.parametrize('code', [0, 1, 2, 75])
def test_slurm_job_is_queued_again_if_preempted_only(code, programs, tmp_path):
  programs('srun', f'import sys; print(sys.argv[1:]); sys.exit({code})')
  programs('scontrol', 'import sys; print("scontrol", *sys.argv[1:])')
  env = {
    **os.environ,
    'SLURM_SUBMIT_DIR': str(LAUNCH.parent),
    'SLURM_JOB_ID': '17',
  }
  done = run('slurm.sbatch', 'c.py', 'run', AWKWARD, cwd=tmp_path, env=env)
  assert done.returncode == code
  expected = ['--config=c.py', '--workdir=run', AWKWARD]
  assert f'{expected}'[1:] in done.stdout
  assert ('scontrol requeue 17' in done.stdout) == (code == 75)


@pytest.mark.parametrize('given', [{}, {'XLA_CLIENT_MEM_FRACTION': '0.5'}])
def test_slurm_tasks_get_most_of_the_memory_of_a_gpu(given, programs):
  programs('srun', 'import os; print(os.environ["XLA_CLIENT_MEM_FRACTION"])')
  env = {**os.environ, 'SLURM_SUBMIT_DIR': str(LAUNCH.parent), **given}
  done = run('slurm.sbatch', 'c.py', 'run', env=env)
  assert done.stdout.split() == [given.get('XLA_CLIENT_MEM_FRACTION', '0.92')]


def test_slurm_job_from_elsewhere_is_refused(tmp_path):
  env = {**os.environ, 'SLURM_SUBMIT_DIR': str(tmp_path)}
  done = run('slurm.sbatch', 'c.py', 'run', env=env)
  assert done.returncode == 2
  assert 'In the repository' in done.stderr


def dry_run(*arguments) -> list[list[str]]:
  """Returns the commands that tpu_vm.sh prints, as a shell understands them."""
  done = run('tpu_vm.sh', '--dry-run', *arguments)
  assert done.returncode == 0, done.stderr
  commands = []
  for line in done.stdout.splitlines():
    words = subprocess.check_output(
      ['bash', '-c', f"printf '%s\\0' {line}"], text=True
    )
    commands.append(words.split('\0')[:-1])
  return commands


def test_tpu_life_of_a_slice_in_commands():
  gcloud = 'gcloud compute tpus tpu-vm'
  assert dry_run('create', 's', 'z', 'v5litepod-256', '--spot') == [
    f'{gcloud} create s --zone=z --accelerator-type=v5litepod-256 '
    '--version=v2-alpha-tpuv5-lite --spot'.split()
  ]
  archive, send, remove, install = dry_run('setup', 's', 'z')
  name = archive[3].removeprefix('--output=')
  assert archive[:2] == ['git', 'archive']
  assert send[:6] == [*gcloud.split(), 'scp', name]
  assert send[6:] == [f's:{name}', '--zone=z', '--worker=all']
  assert remove == ['rm', name]
  assert '--worker=all' in install
  assert install[-1].endswith('-r requirements.txt -r requirements-tpu.txt')
  ((*_, worker, follow),) = dry_run('tail', 's', 'z')
  assert worker == '--worker=0'
  assert follow.endswith('train.log')
  assert dry_run('delete', 's', 'z') == [
    f'{gcloud} delete s --zone=z --quiet'.split()
  ]


def test_tpu_run_gets_any_value_through_two_shells(tmp_path, programs):
  values = ['e.py:bip', 'gs://b/a run', AWKWARD, '']
  ((*_, worker, command),) = dry_run('run', 's', 'z', *values)
  assert worker == '--worker=all'
  # What the remote shell would do, in a home directory like that of a slice.
  binaries = tmp_path / 'moe_jax/.venv/bin'
  binaries.mkdir(parents=True)
  programs('python', 'import sys; print(sys.argv[1:]); sys.exit(75)').rename(
    binaries / 'python'
  )
  command = command.removeprefix('--command=')
  subprocess.run(['bash', '-c', f'{command} wait'], cwd=tmp_path, check=True)
  log = (tmp_path / 'train.log').read_text()
  flags = ['--config=e.py:bip', '--workdir=gs://b/a run', AWKWARD, '']
  assert log == f'{["-m", "moe_jax.main", *flags]}\nexit code 75\n'


def test_tpu_processes_share_what_they_compile(monkeypatch):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'gs://b/a cache')
  ((*_, command),) = dry_run('run', 's', 'z', 'e.py:bip', 'gs://b/run')
  command = command.removeprefix('--command=')
  assert ' env JAX_COMPILATION_CACHE_DIR=gs://b/a\\ cache .venv' in command


def test_tpu_commands_run_in_order_up_to_the_first_that_fails(programs):
  programs('git', '')
  programs('gcloud', 'import sys; sys.exit(7)')
  done = run('tpu_vm.sh', 'setup', 's', 'z')
  assert done.returncode == 7
  assert [line.split()[0] for line in done.stdout.splitlines()] == [
    'git',
    'gcloud',
  ]


@pytest.mark.parametrize(
  'arguments',
  ['', 'create s z', 'run s z e.py', 'delete s', 'delete s z y', 'rm s z'],
)
def test_tpu_wrong_arguments_run_nothing(arguments, programs):
  programs('gcloud', 'raise AssertionError')
  done = run('tpu_vm.sh', *shlex.split(arguments))
  assert done.returncode == 2
  assert 'launch/tpu_vm.sh [--dry-run] create NAME ZONE TYPE' in done.stderr
  done = run('tpu_vm.sh', 'create', 's', 'z', 'h100-8')
  assert done.returncode == 2
  assert 'TYPE=h100-8' in done.stderr
