"""Arms of the study: trains them, and keeps one file of each run.

An arm is a method with its options; with a seed it is a run. Runs of one
experiment and seed share initial weights, batches, tokens and evaluation.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
import dataclasses
import json
import math
import pathlib
import shlex
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd

from experiments.study import step_times
from moe_jax import analysis
from moe_jax.analysis.placement_policies import contiguous

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / 'experiments' / 'results' / 'study'
# Of every step, for curves; all else is summed up.
CURVES = (
  'train/loss',
  'router/max_violation',
  'router/worst_max_violation',
  'router/sequence_violation',
)
# Of validation, q frozen, nats a token; of a mixture the mean over its texts.
LOSS = 'validation_loss'
DEVICES = 4  # That share the experts of a layer, in order.
SPIKE = 0.2  # Nats a token.
# Other things run beside the study, so its times say nothing.
_TIMES = (
  'step_seconds',
  'step_seconds_25',
  'step_seconds_75',
  'tokens_per_second',
)


@dataclasses.dataclass(frozen=True)
class Arm:
  """One method of one experiment.

  Attributes:
    name: of the arm; unique within the experiment.
    method: what follows the colon of `--config`.
    options: flags `--config.NAME=VALUE`.
    seeds: of the runs.
    experiment: the file in `experiments` that has all other options.
    minutes: of one run, an estimate, on two cores that do nothing else.
  """

  name: str
  method: str
  options: Mapping[str, Any]
  seeds: Collection[int] = (0,)
  experiment: str = 'mini_16e'
  minutes: float = 4.5

  def command(self, seed: int, workdir: pathlib.Path | str) -> list[str]:
    """Returns the arguments of the Python that trains a run."""
    options = {'seed': seed, **self.options}
    return [
      *('-m', 'moe_jax.main'),
      f'--config=experiments/{self.experiment}.py:{self.method}',
      *(f'--config.{name}={value}' for name, value in options.items()),
      f'--workdir={workdir}',
    ]

  def path(self, seed: int, results: pathlib.Path = RESULTS) -> pathlib.Path:
    """Returns the file of a run."""
    name = f'{self.name}.seed_{seed}'
    return results / 'runs' / self.experiment / f'{name}.json'

  def stored(self, results: pathlib.Path = RESULTS) -> dict[int, dict]:
    """Returns what is stored of the runs, by their seeds."""
    paths = {seed: self.path(seed, results) for seed in self.seeds}
    return {
      seed: json.loads(path.read_text())
      for seed, path in paths.items()
      if path.exists()
    }


def train(arm: Arm, seed: int, workdir: pathlib.Path) -> pathlib.Path:
  """Trains a run, or continues it; returns its work directory.

  Raises:
    SystemExit: it was preempted or failed; with its exit code.
  """
  directory = workdir / arm.experiment / f'{arm.name}.seed_{seed}'
  if not (begun := _commit_file(directory)).exists():
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(_commit())
  command = [sys.executable, *arm.command(seed, directory)]
  # It handles Ctrl-C and SIGTERM itself, and says so by its exit code.
  code = subprocess.run(command, cwd=ROOT, check=False).returncode
  if code:
    raise SystemExit(code)
  return directory


def run(
  arm: Arm, seed: int, workdir: pathlib.Path, results: pathlib.Path = RESULTS
) -> None:
  """Trains a run and stores what it left."""
  directory = train(arm, seed, workdir)
  write(record(arm, seed, directory), arm.path(seed, results))


def record(arm: Arm, seed: int, directory: pathlib.Path) -> dict[str, Any]:
  """Sums up what a run left: where it comes from, its results and curves."""
  run = analysis.Run(directory)
  worst = run.layer_max_violation.max(axis='columns')
  metrics = run.metrics.assign(**{'router/worst_max_violation': worst})
  summary = analysis.summarize(run)
  return {
    **origin(arm, seed, directory),
    'config': run.config,
    'facts': run.facts,
    'summary': {
      **{k: v for k, v in summary.items() if k not in _TIMES},
      **_of_layers(run),
    },
    'curves': {
      name: [
        float(f'{value:.5g}') if math.isfinite(value) else None
        for value in metrics[name]
      ]
      for name in CURVES
    },
  }


def _of_layers(run: analysis.Run) -> dict[str, float]:
  """Sums up loads of devices, prices and losses, step by step.

  Shape letters: L layers, N steps, E experts, P devices.
  """
  model = run.config['model']
  layers = range(model['layers'] - model['dense_layers'])
  loads_LxNxE = np.stack([run.loads(layer) for layer in layers])
  share_ExP = contiguous(model['experts'], DEVICES)
  loads_LxNxP = loads_LxNxE @ share_ExP
  fullest_LxN = loads_LxNxP.max(axis=-1) / loads_LxNxP.mean(axis=-1)
  prices_LxNxE = np.stack([run.prices(layer) for layer in layers])
  moves_LxNxE = np.abs(np.diff(prices_LxNxE, axis=1))
  loss_N = run.metrics['train/loss']
  before_N = loss_N.shift().rolling(5).max()
  return {
    'device_load_4': float(fullest_LxN.mean()),
    'price_change': float(moves_LxNxE[:, len(loss_N) // 2 :].mean()),
    # Above all five before; comparisons with the first, NaN, are false.
    'loss_spikes': int((loss_N > before_N + SPIKE).sum()),
  }


def origin(arm: Arm, seed: int, directory: pathlib.Path) -> dict[str, str]:
  """Tells the command of a run, and the commit that it was begun with."""
  return {
    'command': shlex.join(['python', *arm.command(seed, 'DIR')]),
    'commit': _commit_file(directory).read_text(),
  }


def _commit_file(directory: pathlib.Path) -> pathlib.Path:
  return directory.with_name(f'{directory.name}.commit')


def _commit() -> str:
  """Returns the commit that is checked out, marked if files have changed."""
  command = ['git', 'describe', '--always', '--dirty', '--abbrev=40']
  found = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )
  return found.stdout.strip() or 'unknown'


def write(found: Mapping[str, Any], path: pathlib.Path) -> None:
  """Writes a JSON file: a line a key, and a line for each curve."""
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = []
  for key, value in found.items():
    if key == 'curves':
      inner = ',\n'.join(
        f'  {json.dumps(k)}: {json.dumps(v)}' for k, v in value.items()
      )
      lines.append(f'"curves": {{\n{inner}\n}}')
    else:
      lines.append(f'{json.dumps(key)}: {json.dumps(value)}')
  partial = path.with_suffix('.partial')
  partial.write_text('{\n' + ',\n'.join(lines) + '\n}\n')
  partial.replace(path)


def complete(arms: Iterable[Arm], results: pathlib.Path = RESULTS) -> bool:
  """Tells whether all runs of some arms are stored."""
  return all(
    arm.path(seed, results).exists() for arm in arms for seed in arm.seeds
  )


def frame(arms: Sequence[Arm], results: pathlib.Path = RESULTS) -> pd.DataFrame:
  """Returns the summaries of stored runs, `LOSS` and planned times of steps.

  `planned_4`, `planned_16` and, of the last fifth of the steps,
  `planned_16_late` are times by `step_times`, where all runs have 16 experts.

  Returns:
    A row a run; the index is (`arm`, `seed`).
  """
  stored = {
    (arm.name, seed): run
    for arm in arms
    for seed, run in arm.stored(results).items()
  }
  rows = {key: run['summary'] for key, run in stored.items()}
  table = pd.DataFrame.from_dict(rows, orient='index')
  if rows:
    table.index = pd.MultiIndex.from_tuples(rows, names=['arm', 'seed'])
    perplexities = table.filter(regex='^eval/validation[^/]*/perplexity$')
    table[LOSS] = np.log(perplexities.astype(float)).mean(axis='columns')
    # The paper's model has 16 experts: one for each of 16 devices.
    if all(_experts(run) == 16 for run in stored.values()):
      fullest = {
        'planned_4': (4, table['device_load_4']),
        'planned_16': (16, 1 + table['average_max_violation']),
        'planned_16_late': (16, 1 + table['last_max_violation']),
      }
      for key, (devices, load) in fullest.items():
        table[key] = step_times.over_even(devices, load)
  return table


def _experts(run: Mapping[str, Any]) -> int:
  return run['config']['model']['experts']


def run_all(
  arms: Sequence[Arm], workdir: pathlib.Path, results: pathlib.Path = RESULTS
) -> None:
  """Trains every run that has no file yet, seed after seed.

  An interruption leaves all methods at the same seeds, so that what is stored
  can be compared.
  """
  missing = [
    (arm, seed)
    for seed in sorted({seed for arm in arms for seed in arm.seeds})
    for arm in arms
    if seed in arm.seeds and not arm.path(seed, results).exists()
  ]
  for number, (arm, seed) in enumerate(missing, 1):
    print(f'{number} of {len(missing)}: {arm.path(seed, results).stem}')
    run(arm, seed, workdir, results)
