"""Starts the processes of one run, with eight CPU devices between them."""

from collections.abc import Callable, Sequence
import os
import pathlib
import re
import socket
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
# Code that prints a process's greatest memory, in bytes, as Linux has it: what
# getrusage gives is at first that of the process that started it.
PRINTS_MEMORY = r"""
import re
status = open('/proc/self/status').read()
print(1024 * int(re.search(r'VmHWM:\s*(\d+) kB', status)[1]))
"""


def flags(devices: int) -> str:
  """Returns the XLA_FLAGS of these tests, with fewer devices for a process."""
  given = os.environ.get('XLA_FLAGS', '')
  return re.sub(r'(?<=device_count=)\d+', str(devices), given)


def run(
  *commands: Sequence[Any],
  during: Callable[[list[subprocess.Popen]], None] | None = None,
  timeout: float = 400,
) -> list[subprocess.CompletedProcess]:
  """Runs Python once for each command, all at the same time.

  Args:
    commands: arguments of Python. If there are several, `processes.start` will
      find the others, on loopback.
    during: called with the processes as soon as they are started.
    timeout: seconds after which all are ended.
  """
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': flags(8 // len(commands)),
  }
  if len(commands) > 1:
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    environment['JAX_COORDINATOR_ADDRESS'] = f'127.0.0.1:{port}'
    environment['JAX_NUM_PROCESSES'] = str(len(commands))
  running = []
  for i, command in enumerate(commands):
    if len(commands) > 1:
      environment['JAX_PROCESS_ID'] = str(i)
    running.append(
      subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  try:
    if during:
      during(running)
    outputs = [process.communicate(timeout=timeout) for process in running]
  finally:
    for process in running:
      process.kill()
  return [
    subprocess.CompletedProcess(process.args, process.returncode, *output)
    for process, output in zip(running, outputs, strict=True)
  ]
