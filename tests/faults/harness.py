"""Real trainings in subprocesses, broken at chosen moments."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import select
import subprocess
import sys
import time
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from tests import several_processes
from tests.train import tiny

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 300.0  # Seconds; nothing here may take longer.
OPTIONS = {'steps': 12, 'eval_every': 4, 'checkpoint_every': 3}
# One device. Compiled in half the time; what was quickly compiled is also kept.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  'PYTHONPATH': str(ROOT),
  'XLA_FLAGS': ' '.join(
    (several_processes.flags(1), '--xla_backend_optimization_level=0')
  ),
}
# What a finished run may leave; TensorBoard's files besides.
EXPECTED = (
  'checkpoints',
  'config.json',
  'lock',
  'metrics.jsonl',
  'run.json',
  'tokenizer.json',
)


@dataclasses.dataclass
class Trial:
  """One command, to be given again and again.

  Args:
    place: a directory of its own: work directory, tokens, messages.
    text: the directory of the text.
    cache: XDG_CACHE_HOME, where compiled programs are.
    method: of balancing.
    options: of the config.
    prefix: a command that the program is an argument of.
    workdir: other than `place`/run.
  """

  place: pathlib.Path
  text: pathlib.Path
  cache: pathlib.Path
  method: str = 'bip'
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  prefix: Sequence[str] = ()
  workdir: pathlib.Path | None = None

  def __post_init__(self):
    self.place.mkdir(parents=True, exist_ok=True)
    self.workdir = self.workdir or self.place / 'run'
    self.starts = 0

  @contextlib.contextmanager
  def started(self, *faults: str) -> Iterator['Program']:
    """Gives the command, with faults of child.py; ends it with the block."""
    self.starts += 1
    options = OPTIONS | tiny.of_text(self.text)
    options |= {'data.cache_dir': self.place / 'tokens'} | self.options
    read, write = os.pipe()
    said = self.place / f'said_{self.starts:03d}'
    with said.open('wb') as output:
      process = subprocess.Popen(
        [
          *(*self.prefix, sys.executable, f'{ROOT}/tests/faults/child.py'),
          *(str(write), ','.join(faults), f'--workdir={self.workdir}'),
          f'--config={ROOT}/tests/train/tiny.py:{self.method}',
          *(f'--config.{name}={value}' for name, value in options.items()),
        ],
        env={**os.environ, **ENVIRONMENT, 'XDG_CACHE_HOME': str(self.cache)},
        cwd=ROOT,
        stdout=output,
        stderr=output,
        pass_fds=[write],
      )
    os.close(write)
    try:
      yield Program(process, read, said)
    finally:
      process.kill()
      process.wait()
      os.close(read)

  def run(self, *faults: str) -> 'Program':
    """Gives the command and waits for its end."""
    with self.started(*faults) as program:
      program.finish()
      return program

  def complete(self, *faults: str) -> str:
    """Runs to the end, which must be a good one; returns `digest`."""
    program = self.run(*faults)
    assert program.code == 0, program.tail()
    return digest(self.workdir, (OPTIONS | self.options)['steps'])

  def stop_in(self, phase: str, number: int = 1) -> 'Program':
    """Runs until a phase begins for the `number`th time, then SIGKILL."""
    with self.started() as program:
      assert program.reach(phase, number), program.tail()
      program.process.kill()
      program.finish()
      return program


class Program:
  """A command that is running, or has ended."""

  def __init__(self, process, pipe: int, said: pathlib.Path):
    self.process, self.pipe, self._said = process, pipe, said
    self.marks: list[tuple[float, str, str]] = []
    self._rest = b''

  @property
  def code(self) -> int:
    return self.process.returncode

  def said(self) -> str:
    return self._said.read_text(errors='replace')

  def tail(self) -> str:
    """Returns the exit code and what it said last, for messages."""
    lines = [line[:200] for line in self.said().splitlines()[-25:]]
    return '\n'.join([f'exit code {self.process.poll()}', *lines])

  def reach(self, phase: str, number: int = 1, what: str = 'begin') -> bool:
    """Waits for a mark; False if the program came to its end before it."""
    deadline = time.monotonic() + LIMIT
    while [m[1:] for m in self.marks].count((what, phase)) < number:
      if not self._read(deadline):
        return False
    return True

  def finish(self) -> None:
    """Waits for the end."""
    deadline = time.monotonic() + LIMIT
    while self._read(deadline):
      pass
    self.process.wait(max(1, deadline - time.monotonic()))

  def _read(self, deadline: float) -> bool:
    left = deadline - time.monotonic()
    if left <= 0 or not select.select([self.pipe], [], [], left)[0]:
      raise TimeoutError(f'after {self.marks[-1:]}: {self.tail()}')
    data = os.read(self.pipe, 1 << 16)
    *lines, self._rest = (self._rest + data).split(b'\n')
    for line in lines:
      seconds, what, phase = line.decode().split(' ', 2)
      self.marks.append((float(seconds), what, phase))
    return bool(data)

  def phase(self) -> str:
    """Returns the phase of the last mark: where a killed program was."""
    inside = []
    for _, what, phase in self.marks:
      if inside[-1:] == ['step']:
        inside.pop()
      if what == 'begin':
        inside.append(phase)
      else:
        inside.pop()
    return inside[-1] if inside else 'between' if self.marks else 'start'


def digest(workdir: pathlib.Path, steps: int) -> str:
  """Hashes what a finished run computed: last checkpoint and metrics.

  Raises:
    AssertionError: a step is missing or twice, or a line is not JSON.
  """
  found = records(workdir)
  assert [record['step'] for record in found] == list(range(1, steps + 1))
  last = contents(workdir / 'checkpoints' / str(steps))
  return hashlib.sha256(
    f'{last}{json.dumps(found, sort_keys=True)}'.encode()
  ).hexdigest()


def contents(checkpoint: pathlib.Path) -> str:
  """Hashes the arrays and the data state of a checkpoint."""
  hashed = hashlib.sha256((checkpoint / 'data' / 'metadata').read_bytes())
  for item in ('params', 'optimizer', 'router'):
    handler = ocp.PyTreeCheckpointHandler()
    path = epath.Path(checkpoint / item)
    arguments = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
      handler.metadata(path).tree,
    )
    arrays = handler.restore(
      path, args=ocp.args.PyTreeRestore(restore_args=arguments)
    )
    for name, array in jax.tree.leaves_with_path(arrays):
      hashed.update(f'{item}{name}{array.dtype}{array.shape}'.encode())
      hashed.update(array.tobytes())
  return hashed.hexdigest()


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Reads all metrics but times, strictly."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith('time/')}
    for line in lines
  ]


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps of all whole checkpoints, ascending."""
  found = (workdir / 'checkpoints').glob('*')
  return sorted(int(path.name) for path in found if path.name.isdigit())


def lost_steps(workdir: pathlib.Path) -> int:
  """Returns how many steps were recorded but not saved."""
  metrics = workdir / 'metrics.jsonl'
  lines = metrics.read_bytes().count(b'\n') if metrics.exists() else 0
  return max(0, lines - max(saved_steps(workdir), default=0))


def leftovers(workdir: pathlib.Path) -> list[str]:
  """Returns what a finished run should not have left."""
  inside = [path.name for path in workdir.iterdir()]
  return [
    *(n for n in inside if n not in EXPECTED and 'tfevents' not in n),
    *(p.name for p in (workdir / 'checkpoints').iterdir() if not
      p.name.isdigit()),
  ]  # fmt: skip


def generator(*seed: object) -> random.Random:
  """Returns random numbers that can be had again; prints how."""
  print('seed', *seed, flush=True)
  return random.Random(repr(seed))
