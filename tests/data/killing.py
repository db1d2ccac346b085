"""Starts preparations as processes, and kills them."""

import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

from tests.several_processes import PRINTS_MEMORY

# As the program, with parts that are small enough for a test.
PROGRAM = f"""
import sys
from moe_jax.data import parts, prepare
parts.PART_BYTES = int(sys.argv.pop())
code = prepare.main(sys.argv)
{PRINTS_MEMORY}
sys.exit(code)
"""


def start(source, tokenizer, out, part_bytes):
  flags = f'--source={source}', f'--tokenizer={tokenizer}', f'--out={out}'
  return subprocess.Popen(
    [sys.executable, '-c', PROGRAM, *flags, str(part_bytes)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )


def files(folder):
  return {
    path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()
  }


def kill_and_resume(folder, source, tokenizer, kills, part_bytes):
  """Kills a preparation anywhere, and compares it with an undisturbed one.

  In turns, a little after there is a file that is being written, and after one
  that is whole: the job, a shard, or the record of a part.

  Returns:
    How many were killed before they were done, and the most bytes of memory
    that the undisturbed one had.
  """
  undisturbed = start(source, tokenizer, folder / 'one', part_bytes)
  output, errors = undisturbed.communicate()
  assert undisturbed.returncode == 0, errors
  random = np.random.default_rng(0)
  killed, out = 0, folder / 'two'
  for kill in range(kills):
    before = _names(out, kill % 2 == 1)
    process = start(source, tokenizer, out, part_bytes)
    while process.poll() is None and _names(out, kill % 2 == 1) <= before:
      time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed += process.returncode == -signal.SIGKILL
  last = start(source, tokenizer, out, part_bytes)
  _, errors = last.communicate()
  assert last.returncode == 0, errors
  assert files(out) == files(folder / 'one')  # And nothing is left beside.
  return killed, int(output.splitlines()[-1])


def _names(folder, whole):
  names = {path.name for path in folder.glob('*')}
  return {x for x in names if not (whole and x.endswith('.incomplete'))}
