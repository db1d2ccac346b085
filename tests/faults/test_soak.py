"""Five thousand steps: nothing grows."""

import os
import pathlib

import numpy as np
import pytest

STEPS, EVERY = 5000, 50


@pytest.mark.long
def test_nothing_grows(trial):
  """Measured after each checkpoint: the first half is for caches to fill."""
  options = {'steps': STEPS, 'checkpoint_every': EVERY, 'eval_every': 100}
  found = []
  with trial(**options).started('count_compilations') as program:
    for i in range(1, STEPS // EVERY):
      assert program.reach('save', i, 'end'), program.tail()
      found.append(measure(program))
    program.finish()
  assert program.code == 0, program.tail()
  columns = dict(
    zip(found[0], np.array([[*f.values()] for f in found]).T, strict=True)
  )
  steps = EVERY * np.arange(1, len(found) + 1)
  half = len(found) // 2
  slopes = {
    name: np.polyfit(steps[half:], column[half:], 1)[0]
    for name, column in columns.items()
  }
  for name, column in columns.items():
    print(
      f'{name}: {column[0]} after {EVERY} steps, {column[half]} after '
      f'{steps[half]}, {column[-1]} after {steps[-1]}; {slopes[name]:+.4f} a '
      'step in the second half'
    )
  # Steps cost nothing. A checkpoint leaves about 100 KB: tensorstore forgets to
  # free the metrics of its own that orbax asks for (a reference count too high;
  # `ts.experimental_collect_matching_metrics` alone shows it).
  assert slopes['KB'] < 1 + 200 / EVERY
  assert abs(slopes['threads']) < 1e-3
  assert abs(slopes['files']) < 1e-3
  # After the first checkpoint and the first two evaluations.
  assert columns['compilations'][-1] == columns['compilations'][4]


def measure(program) -> dict[str, int]:
  process = pathlib.Path(f'/proc/{program.process.pid}')
  status = dict(
    line.split(':', 1) for line in (process / 'status').read_text().splitlines()
  )
  return {
    'KB': int(status['VmRSS'].split()[0]),
    'threads': int(status['Threads']),
    'files': len(os.listdir(process / 'fd')),
    'compilations': [m[1:] for m in program.marks].count(('begin', 'XLA')),
  }
