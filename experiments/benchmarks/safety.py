"""Times what is done so that no run is lost, at the demo's size.

  python -m experiments.benchmarks.safety [--repeats=60] [--config.OPTION=VALUE]

A step with and without what skips it if it is not finite take turns, in random
order; the ratio is the median of the pairs. What is added once a step (asking
whether to stop), and once a checkpoint (checksums, waiting for the disk to have
the metrics), is timed alone and set against the steps between two checkpoints.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
from unittest import mock

import jax
import numpy as np

from experiments.benchmarks.train_step import our_step, seconds
from moe_jax import config as config_lib
from moe_jax import main as command_line
from moe_jax.parallel import mesh as meshes
from moe_jax.runs import checksums, preemption
from moe_jax.runs.checkpoints import items_of
from moe_jax.train import state as state_lib
from moe_jax.train import step as step_lib


def bare_step(config, tokens_BxS):
  """Builds the step that takes a result however it is."""
  with (
    mock.patch.object(
      step_lib, 'apply_if', lambda _, update, old: update(0, old)
    ),
    mock.patch.object(step_lib, 'squares_unless', lambda *arguments: {}),
  ):
    return our_step(config, tokens_BxS)[0]


def paired(one, other, repeats: int) -> tuple[list[float], list[float]]:
  """Times two functions in turns; returns the seconds of each."""
  times = [], []
  for _ in range(repeats):
    for i in random.sample((0, 1), 2):
      times[i].append(seconds((one, other)[i]))
  return times


def each_checkpoint(
  config: config_lib.Config, repeats: int
) -> dict[str, float]:
  """Times what a checkpoint costs beside being written: median seconds."""
  mesh = meshes.make_mesh()
  training = state_lib.make_training(config, mesh)
  state = training.init()
  arrays = items_of(state)
  jax.block_until_ready(arrays)
  times = {'checksums': [], 'metrics on the disk': []}
  with tempfile.NamedTemporaryFile() as file:

    def sync():
      file.write(bytes(1500 * config.checkpoint_every))  # Bytes of a record.
      file.flush()
      os.fsync(file.fileno())

    for _ in range(repeats + 1):
      times['checksums'].append(seconds(lambda: checksums.checksums(arrays)))
      times['metrics on the disk'].append(seconds(sync))
  return {name: statistics.median(values[1:]) for name, values in times.items()}


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--repeats', type=int, default=60)
  options, rest = parser.parse_known_args(argv)
  config, _ = command_line.parse(
    ['', '--config=experiments/demo.py:bip', *rest]
  )
  config = config_lib.freeze(config)
  shape = (config.batch_size, config.sequence_length + 1)
  tokens = np.random.default_rng(0).integers(
    config.data.vocabulary, size=shape, dtype=np.int32
  )
  guarded, bare = our_step(config, tokens)[0], bare_step(config, tokens)
  for step in (guarded, bare):
    step()
  with_it, without = paired(guarded, bare, options.repeats)
  step = statistics.median(without)
  ratios = [a / b for a, b in zip(with_it, without, strict=True)]
  ratio = statistics.median(ratios)
  low, _, high = statistics.quantiles(ratios, n=4)
  # Of a median of normal values: 1.25 deviations / sqrt(n); 1.35 of them lie
  # between the quartiles.
  error = 1.25 / 1.35 * (high - low) / len(ratios) ** 0.5
  print(f'step without: {1e3 * step:.1f} ms (median of {options.repeats})')
  print(
    f'step that may be skipped: {ratio:.4f} times that (median of the pairs, '
    f'standard error {error:.4f}; quartiles {low:.3f}, {high:.3f})'
  )
  with preemption.notice() as told:
    asking = seconds(lambda: [told() for _ in range(10_000)]) / 10_000
  print(f'asking for signals: {1e6 * asking:.2f} us a step')
  share = ratio - 1 + asking / step
  for name, value in each_checkpoint(config, options.repeats).items():
    part = value / (config.checkpoint_every * step)
    share += part
    print(
      f'{name}: {1e3 * value:.1f} ms a checkpoint, {part:.3%} of '
      f'{config.checkpoint_every} steps'
    )
  print(f'all of it: {share:.2%} of the time of a step')


if __name__ == '__main__':
  main(sys.argv[1:])
