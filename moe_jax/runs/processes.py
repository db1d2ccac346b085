"""Several processes that run one program: how they meet, and that they agree.

A launched process needs nothing but its environment, and the command is the
same as for one process: SLURM's variables, a TPU slice, or, anywhere,

    JAX_COORDINATOR_ADDRESS=HOST:PORT   where process 0 is found
    JAX_NUM_PROCESSES=N
    JAX_PROCESS_ID=0                    to N-1

JAX_LOCAL_DEVICE_IDS=0,1,... names the GPUs of a process. Without it, processes
under SLURM have one each, others all that they see.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import itertools
import json
import logging
import os
import sys
import time
import traceback
from typing import Any, NoReturn

import jax

from moe_jax import jax_privates
from moe_jax.options import Refused

_VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_LOOPBACK = ('localhost', '127.0.0.1', '[::1]')

# By default 300, which some machines of a pod take to load their image alone.
_SECONDS_TO_MEET = 1800
# For a process that hangs; one that died is missed after 100 s without it.
# Long, as a large text may be tokenized meanwhile.
_SECONDS_TO_AGREE = 3600

# Errors that come again until somebody does something.
_REFUSALS = (
  ValueError,
  FileNotFoundError,
  FileExistsError,
  IsADirectoryError,
  NotADirectoryError,
  PermissionError,
)

_agreements = itertools.count()


def start() -> None:
  """Joins this process to the others of its run; does nothing if it is alone.

  Call it once, before anything touches a device. On one machine, everything
  listens on the loopback interface only.

  Raises:
    Refused: some of the three variables are missing or impossible.
  """
  arguments = _explicit() or _detected()
  if not arguments:
    return
  address = arguments.get('coordinator_address', 'the coordinator')
  host, _, _ = address.rpartition(':')
  local = host in _LOOPBACK
  print(
    f'{_names([arguments["process_id"]])} of {arguments["num_processes"]}: '
    f'waiting for the others at {address}',
    file=sys.stderr,
    flush=True,
  )
  # By default process 0 listens on all interfaces.
  jax.distributed.initialize(
    **arguments,
    coordinator_bind_address=address if local else None,
    initialization_timeout=_SECONDS_TO_MEET,
  )
  if local and jax.config.jax_cpu_collectives_implementation == 'gloo':
    jax_privates.exchange_on_loopback()


def _explicit() -> dict[str, Any]:
  """Reads the three variables; jax itself would read but the first."""
  given = {name: os.environ.get(name, '') for name in _VARIABLES}
  if not any(given.values()):
    return {}
  missing = [name for name, value in given.items() if not value]
  if missing:
    raise Refused(
      f'{", ".join(missing)}: missing in the environment; several processes '
      f'need all of {", ".join(_VARIABLES)}, one process none of them'
    )
  address, count, index = given.values()
  if not address.rpartition(':')[2].isdecimal() or ':' not in address:
    raise Refused(f'JAX_COORDINATOR_ADDRESS={address}: must be HOST:PORT')
  if not count.isdecimal() or int(count) < 1:
    raise Refused(f'JAX_NUM_PROCESSES={count}: must be 1 or more')
  if not index.isdecimal() or int(index) >= int(count):
    raise Refused(
      f'JAX_PROCESS_ID={index}: must be 0 to {int(count) - 1}, as '
      f'JAX_NUM_PROCESSES={count}'
    )
  if int(count) == 1:
    return {}
  return {
    'coordinator_address': address,
    'num_processes': int(count),
    'process_id': int(index),
    # Or it would restrict the GPUs by what it finds of a cluster.
    'cluster_detection_method': 'deactivate',
  }


def _detected() -> dict[str, Any]:
  """Asks jax for SLURM's tasks or a TPU slice's hosts."""
  cluster = jax_privates.cluster()
  if cluster is None or cluster.get_process_count() == 1:
    return {}
  arguments = {
    'num_processes': cluster.get_process_count(),
    'process_id': cluster.get_process_id(),
  }
  if os.environ.get('SLURM_STEP_NUM_NODES') == '1':
    address = cluster.get_coordinator_address(
      0, os.environ.get('JAX_COORDINATOR_PORT')
    )
    port = address.rpartition(':')[2]
    arguments['coordinator_address'] = f'127.0.0.1:{port}'
  return arguments


@contextlib.contextmanager
def agreement() -> Iterator[dict[str, Any]]:
  """Ends well in all processes or in none, before they compute together.

  What happens in the `with` block may fail in any process. That one raises its
  own error, all the others raise one that names the process and the error,
  rather than to wait for it. All processes must come through the same
  agreements in the same order; one must not be inside another.

  Yields:
    A dict to be filled with facts: numbers and strings that must be the same
    in all processes.

  Raises:
    Refused: a ValueError of this process, or a file that is missing or not
      permitted; or such of another one, or the facts differ: the message says
      which, and in which processes.
    OSError: another process failed otherwise; the same command may succeed.
  """
  facts: dict[str, Any] = {}
  try:
    yield facts
  except Exception as error:
    refused = isinstance(error, _REFUSALS)
    first_error(error, passing=not refused)
    if refused:
      raise Refused(str(error)) from error
    raise
  text, passing = _verdict({'facts': facts})
  if text:
    raise (OSError if passing else Refused)(text)


def first_error(error: Exception | None, passing: bool) -> tuple[str, bool]:
  """Tells all processes what one came to, and returns what any came to.

  All processes must call it at the same place.

  Args:
    error: of this process.
    passing: whether it may not come another time.

  Returns:
    What the errors say, '' if all gave None; and whether one of them may pass.
  """
  if error is None:
    return _verdict({'facts': {}})
  return _verdict({'error': _in_a_line(error), 'passing': passing})


def _in_a_line(error: Exception) -> str:
  text = ' '.join(''.join(traceback.format_exception_only(error)).split())
  return text if len(text) <= 250 else f'{text[:250]} ...'


def end(main: Callable[[Sequence[str]], int]) -> NoReturn:
  """Calls a program and ends the process with its exit code.

  After a failure, at once: a thread may wait for what will never come, and an
  ordinary exit would wait 300 s for the other processes to come to theirs. They
  end as soon as this one is missed: at once if it was process 0, else after 100
  s.
  """
  # orbax raises the error that many of its background tasks end with: pages of
  # what they have to say would hide the line that explains it.
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  sys.unraisablehook = lambda unraisable: None
  try:
    code = main(sys.argv)
  except Exception:
    traceback.print_exc()
    code = 1
  sys.stdout.flush()
  sys.stderr.flush()
  if code == 1:
    os._exit(code)
  sys.exit(code)


def _verdict(answer: dict[str, Any]) -> tuple[str, bool]:
  """Tells process 0 an answer; returns what `_judge` has to say about all.

  By the coordination service's store, which needs no device.
  """
  service = jax_privates.coordination()
  client, index = service.client, service.process_id
  if client is None:
    return _judge([answer])
  place = f'moe_jax/agreement_{next(_agreements)}'
  deadline = time.monotonic() + _SECONDS_TO_AGREE

  def read(key: str, seconds: float) -> dict[str, Any]:
    try:
      value = client.blocking_key_value_get(
        f'{place}/{key}', max(1, int(1000 * seconds))
      )
    except jax.errors.JaxRuntimeError as error:
      return {'error': f'no answer: {error}', 'passing': True}
    return json.loads(value)

  client.key_value_set(f'{place}/{index}', json.dumps(answer))
  if index:
    verdict = read('verdict', 2 * _SECONDS_TO_AGREE)
    if 'error' in verdict:
      return f'process 0: {verdict["error"]}', True
    return verdict['text'], verdict['passing']
  answers = [
    read(f'{i}', deadline - time.monotonic())
    for i in range(service.num_processes)
  ]
  text, passing = _judge(answers)
  verdict = {'text': text, 'passing': passing}
  client.key_value_set(f'{place}/verdict', json.dumps(verdict))
  return text, passing


def _judge(answers: Sequence[dict[str, Any]]) -> tuple[str, bool]:
  """Returns what is wrong with the answers of all processes; '' if nothing.

  Args:
    answers: of each process, either `facts`, or `error` and `passing`.

  Returns:
    The text, and whether an error in it is passing.
  """
  errors = _by_value([answer.get('error') for answer in answers])
  errors.pop(None, None)
  if errors:
    told = (f'{_names(who)}: {what}' for what, who in errors.items())
    return '; '.join(told), any(answer.get('passing') for answer in answers)
  differences = []
  for name in sorted({name for answer in answers for name in answer['facts']}):
    values = _by_value([answer['facts'].get(name) for answer in answers])
    if len(values) > 1:
      sides = [f'{value} in {_names(who)}' for value, who in values.items()]
      differences.append(f'{name}: {" and ".join(sides)}')
  if not differences:
    return '', False
  return f'processes disagree on {"; ".join(differences)}', False


def _by_value(values: Sequence[Any]) -> dict[Any, list[int]]:
  """Returns which processes have each value."""
  places: dict[Any, list[int]] = {}
  for i, value in enumerate(values):
    places.setdefault(value, []).append(i)
  return places


def _names(processes: Sequence[int]) -> str:
  """Writes ascending numbers as 'process 3' or 'processes 0-2, 5'."""
  runs: list[list[int]] = []
  for i in processes:
    if runs and runs[-1][-1] == i - 1:
      runs[-1][1:] = [i]
    else:
      runs.append([i])
  text = ', '.join('-'.join(map(str, run)) for run in runs)
  return f'process {text}' if len(processes) == 1 else f'processes {text}'
