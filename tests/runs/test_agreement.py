"""What starts several processes, and what they say when they disagree."""

import jax
import pytest

from moe_jax import jax_privates
from moe_jax.options import Refused
from moe_jax.runs import processes

EXPLICIT = {
  'JAX_COORDINATOR_ADDRESS': 'localhost:1234',
  'JAX_NUM_PROCESSES': '4',
  'JAX_PROCESS_ID': '3',
}
SLURM = {
  'SLURM_JOB_ID': '4097',
  'SLURM_STEP_NODELIST': 'node[07-08]',
  'SLURM_STEP_NUM_NODES': '2',
  'SLURM_NTASKS': '16',
  'SLURM_PROCID': '9',
  'SLURM_LOCALID': '1',
}


@pytest.fixture
def started(monkeypatch):
  """Calls `start` in an environment; returns what it asks of jax."""
  for name in {**EXPLICIT, **SLURM}:
    monkeypatch.delenv(name, raising=False)
  calls, loopback = [], []
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda **options: calls.append(options)
  )
  monkeypatch.setattr(
    jax_privates, 'exchange_on_loopback', lambda: loopback.append(True)
  )

  def start(environment):
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    processes.start()
    return calls, loopback

  return start


def test_one_process_starts_nothing(started):
  assert started({}) == ([], [])


@pytest.mark.parametrize(
  'environment',
  [
    EXPLICIT | {'JAX_NUM_PROCESSES': '1', 'JAX_PROCESS_ID': '0'},
    SLURM | {'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'},
    {'SLURM_JOB_ID': '4097', 'SLURM_NTASKS': '16'},  # salloc, without srun
  ],
)
def test_one_of_one_starts_nothing(started, environment):
  assert started(environment) == ([], [])


@pytest.mark.parametrize('host', ['localhost', '127.0.0.1', '[::1]'])
def test_a_local_coordinator_listens_on_loopback_only(started, host):
  address = f'{host}:1234'
  (call,), loopback = started(EXPLICIT | {'JAX_COORDINATOR_ADDRESS': address})
  assert call['coordinator_address'] == address
  assert call['coordinator_bind_address'] == address
  assert (call['num_processes'], call['process_id']) == (4, 3)
  assert loopback


def test_a_remote_coordinator_is_left_to_jax(started):
  address = 'node07:1234'
  (call,), loopback = started(EXPLICIT | {'JAX_COORDINATOR_ADDRESS': address})
  assert call['coordinator_address'] == address
  assert call['coordinator_bind_address'] is None
  assert not loopback


def test_tasks_of_slurm(started):
  (call,), loopback = started(SLURM)
  assert (call['num_processes'], call['process_id']) == (16, 9)
  assert 'coordinator_address' not in call and not loopback


def test_tasks_of_slurm_on_one_node_stay_on_loopback(started):
  (call,), loopback = started(SLURM | {'SLURM_STEP_NUM_NODES': '1'})
  # The port that jax makes of the job's number.
  assert call['coordinator_address'] == f'127.0.0.1:{65535 - 4096 + 1 + 1}'
  assert call['coordinator_bind_address'] == call['coordinator_address']
  assert loopback


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'JAX_PROCESS_ID': ''}, '^JAX_PROCESS_ID: missing'),
    (
      {'JAX_NUM_PROCESSES': '', 'JAX_PROCESS_ID': ''},
      '^JAX_NUM_PROCESSES, JAX_PROCESS_ID: missing',
    ),
    ({'JAX_PROCESS_ID': '4'}, 'JAX_PROCESS_ID=4: must be 0 to 3'),
    ({'JAX_PROCESS_ID': '-1'}, 'JAX_PROCESS_ID=-1'),
    ({'JAX_NUM_PROCESSES': 'all'}, 'JAX_NUM_PROCESSES=all'),
    ({'JAX_COORDINATOR_ADDRESS': '1234'}, 'must be HOST:PORT'),
    ({'JAX_COORDINATOR_ADDRESS': 'localhost'}, 'must be HOST:PORT'),
  ],
)
def test_half_an_environment_is_refused(started, change, message):
  with pytest.raises(ValueError, match=message):
    started(EXPLICIT | change)


def test_agreement_of_one_process_changes_nothing():
  with processes.agreement() as facts:
    facts['step'] = 3
  with pytest.raises(KeyError), processes.agreement():
    raise KeyError


def test_differences_are_named_with_their_processes():
  answers = [{'facts': {'step': 3, 'text': 'a', 'jax': '1'}} for _ in range(6)]
  assert processes._judge(answers) == ('', False)
  answers[4]['facts']['step'] = 0
  answers[5]['facts'] |= {'text': 'b', 'jax': '2'}
  assert processes._judge(answers) == (
    'processes disagree on jax: 1 in processes 0-4 and 2 in process 5; '
    'step: 3 in processes 0-3, 5 and 0 in process 4; '
    'text: a in processes 0-4 and b in process 5',
    False,
  )


@pytest.mark.parametrize('passing', [False, True])
def test_errors_come_before_differences(passing):
  answers = [
    {'facts': {'step': 3}},
    {'error': 'OSError: disk full', 'passing': passing},
    {'facts': {'step': 0}},
    {'error': 'OSError: disk full', 'passing': False},
  ]
  told = 'processes 1, 3: OSError: disk full'
  assert processes._judge(answers) == (told, passing)


@pytest.mark.parametrize(
  ('error', 'raised'),
  [
    (ValueError('wrong'), Refused),
    (PermissionError('denied'), Refused),
    (ConnectionResetError('reset'), ConnectionResetError),
    (RuntimeError('a bug'), RuntimeError),
  ],
)
def test_what_may_pass_is_not_refused(error, raised):
  with pytest.raises(raised) as found, processes.agreement():
    raise error
  assert type(found.value) is raised
