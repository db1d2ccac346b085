"""Measures what it takes to look at the prices of a large model.

  python -m experiments.benchmarks.inspection [--whole] [--repeats=3] \
      [--config=FILE.py:METHOD]

Writes a checkpoint of random parameters (without optimizer; paper_64e: 4.4 GB)
into a temporary directory. Then fresh processes open it: one imports
moe_jax.analysis only, one reads q, and, with --whole, one reads all parameters,
each with its time and peak memory, and how many times that of reading q.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import jax

from moe_jax import config as config_lib
from moe_jax import main as command_line
from moe_jax.parallel import mesh as meshes
from moe_jax.runs import files
from moe_jax.runs.checkpoints import Position, items_of
from moe_jax.runs.saver import Saver
from moe_jax.train import facts
from moe_jax.train import state as states

OPENS = r"""
import json, re, sys, time
began = time.perf_counter()
from moe_jax.analysis import Run
{what}
seconds = time.perf_counter() - began
# Of Linux. What getrusage gives is the parent's at first.
status = open('/proc/self/status').read()
peak = 1024 * int(re.search(r'VmHWM:\s*(\d+) kB', status)[1])
print(json.dumps([seconds, peak]))
"""
WHAT = {
  'import': '',
  'q': 'Run(sys.argv[1]).restore().q',
  'whole model': 'Run(sys.argv[1]).restore().model',
}


def write(config: config_lib.Config, directory: pathlib.Path) -> None:
  """Leaves what a run would, but for metrics and the optimizer's state."""
  mesh = meshes.make_mesh()
  training = states.make_training(config, mesh)

  @jax.jit
  def init():
    state = training.init()
    return state._replace(optimizer={'none': state.step})

  state = init()
  options = config_lib.to_dict(config)
  files.write_json(directory / 'config.json', options)
  files.write_json(
    directory / 'run.json', {'run': 'random', 'versions': facts.versions()}
  )
  with Saver(
    directory / 'checkpoints',
    options,
    'random',
    losses={},
    largest=max(x.nbytes for x in jax.tree.leaves(state)),
  ) as saver:
    items = items_of(state)
    saver.save(items, Position(1), record={}, wait=True)


def opened(directory: pathlib.Path, what: str) -> tuple[float, float]:
  """Returns seconds, without the start of Python, and peak bytes."""
  code = OPENS.format(what=WHAT[what])
  done = subprocess.run(
    [sys.executable, '-c', code, directory],
    stdout=subprocess.PIPE,
    check=True,
  )
  return tuple(json.loads(done.stdout))


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--whole', action='store_true')
  parser.add_argument('--repeats', type=int, default=3)
  options, rest = parser.parse_known_args(argv)
  config, _ = command_line.parse(
    ['', '--config=experiments/paper_64e.py:bip', *rest]
  )
  whats = [what for what in WHAT if options.whole or what != 'whole model']
  with tempfile.TemporaryDirectory() as directory:
    directory = pathlib.Path(directory)
    print('writing a checkpoint', file=sys.stderr)
    write(config_lib.freeze(config), directory)
    size = sum(file.stat().st_size for file in directory.rglob('*'))
    print(f'{size / 1e9:.2f} GB on the disk')
    for number in range(options.repeats):
      found = {what: opened(directory, what) for what in whats}
      of_q = found['q']
      for what, (seconds, peak) in found.items():
        print(
          f'{number + 1}: {what}: {seconds:.2f} s ({seconds / of_q[0]:.2f}), '
          f'peak {peak / 1e9:.2f} GB ({peak / of_q[1]:.2f})'
        )


if __name__ == '__main__':
  main(sys.argv[1:])
