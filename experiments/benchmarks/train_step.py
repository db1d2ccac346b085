"""Times the train step of paper_16e's model, if asked beside MiniMind's own.

  python -m experiments.benchmarks.train_step [--steps=5] [--breakdown] \\
      [--minimind=DIR] [--method=loss_controlled] [--config.OPTION=VALUE ...]

One step is 4 sequences of 512 tokens in float32: forward, backward, clipping
and AdamW. With --minimind, a checkout of github.com/jingyaogong/minimind at
commit 04b56ea and an environment with torch and transformers, both models
take turns, step by step, on the same tokens, MiniMind in a process of its own;
the ratio is the median of the pairs. --breakdown profiles one step and says
where its time went.

Run it with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 on Linux, as `make` does.
"""

import argparse
import collections
from collections.abc import Callable
import contextlib
import functools
import glob
import gzip
import json
import multiprocessing
import re
import resource
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

from moe_jax import config as config_lib
from moe_jax import main as command_line
from moe_jax.parallel import mesh as meshes
from moe_jax.train import batches
from moe_jax.train import state as state_lib
from moe_jax.train import step as step_lib

# Scope in the program -> row of the breakdown; the first that fits counts.
PARTS = ('optimizer', 'experts', 'dispatch', 'router', 'attention')


def our_step(
  config: config_lib.Config, tokens_BxS: np.ndarray
) -> tuple[Callable[[], None], str]:
  """Returns a function that trains one step, and its compiled program."""
  mesh = meshes.make_mesh()
  training = state_lib.make_training(config, mesh)
  state = training.init()
  batch = batches.to_devices(
    mesh, {'inputs': tokens_BxS[:, :-1], 'targets': tokens_BxS[:, 1:]}
  )
  compiled = (
    step_lib.make_train_step(config, training).lower(state, batch).compile()
  )

  def step():
    nonlocal state
    state, *told = compiled(state, batch)
    jax.block_until_ready((state, told))

  return step, compiled.as_text()


def minimind_step(
  checkout: str, config: config_lib.Config, tokens_BxS: np.ndarray
) -> Callable[[], None]:
  """Returns a function that trains MiniMind's model one step, as it does."""
  sys.path.insert(0, checkout)
  from model.LMConfig import LMConfig
  from model.model import MiniMindLM
  import torch

  model = MiniMindLM(
    LMConfig(
      dim=config.model.width,
      n_layers=config.model.layers,
      n_heads=config.model.heads,
      n_kv_heads=config.model.kv_heads,
      vocab_size=config.data.vocabulary,
      hidden_dim=config.model.hidden,
      max_seq_len=config.sequence_length,
      use_moe=True,
      n_routed_experts=config.model.experts,
      num_experts_per_tok=config.model.experts_per_token,
      aux_loss_alpha=0.1,
    )
  ).train()
  adamw = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
  tokens = torch.from_numpy(tokens_BxS.astype(np.int64))

  def step():
    result = model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(
      result.logits.flatten(0, 1), tokens[:, 1:].flatten()
    )
    (loss + result.aux_loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    adamw.step()
    adamw.zero_grad(set_to_none=True)

  return step


def in_another_process(*arguments) -> Callable[[], float]:
  """Returns a function that has MiniMind's step timed where no JAX runs."""
  context = multiprocessing.get_context('spawn')
  here, there = context.Pipe()
  context.Process(target=_serve, args=(there, *arguments), daemon=True).start()

  def timed() -> float:
    here.send_bytes(b'step')
    return float(here.recv_bytes())

  return timed


def _serve(connection, *arguments) -> None:
  step = minimind_step(*arguments)
  with contextlib.suppress(EOFError):  # The other end is gone: done.
    while connection.recv_bytes():
      connection.send_bytes(str(seconds(step)).encode())


def seconds(step: Callable[[], None]) -> float:
  """Times one call."""
  started = time.perf_counter()
  step()
  return time.perf_counter() - started


def breakdown(step: Callable[[], None], program: str) -> dict[str, float]:
  """Profiles one step: seconds of the operations of each part.

  An operation's time is without that of the operations inside of it. On CPU,
  operations that do not depend on each other may overlap.
  """
  scopes = dict(re.findall(r'%?([\w.\-]+) = [^\n]*op_name="([^"]*)"', program))
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory, create_perfetto_trace=True):
      step()
    (path,) = glob.glob(
      f'{directory}/**/perfetto_trace.json.gz', recursive=True
    )
    with gzip.open(path) as file:
      events = json.load(file)['traceEvents']
  threads = collections.defaultdict(list)
  for event in events:
    if event.get('ph') == 'X':
      threads[event['pid'], event['tid']].append(event)
  parts = collections.Counter()
  for thread in threads.values():
    thread.sort(key=lambda event: (event['ts'], -event['dur']))
    enclosing = []
    for event in thread:
      while enclosing and enclosing[-1]['end'] <= event['ts']:
        enclosing.pop()
      name = event['name'].partition('.clone')[0]
      outer = enclosing[-1] if enclosing else None
      scope = scopes.get(name) or (outer['scope'] if outer else None)
      event.update(end=event['ts'] + event['dur'], scope=scope)
      part = _part(scope)
      parts[part] += event['dur'] / 1e6
      if outer:
        parts[_part(outer['scope'])] -= event['dur'] / 1e6
      enclosing.append(event)
  del parts['outside']
  return dict(parts)


def _part(scope: str | None) -> str:
  if scope is None:
    return 'outside'
  return next((p for p in PARTS if p in scope), 'the rest')


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--steps', type=int, default=5)
  parser.add_argument('--breakdown', action='store_true')
  parser.add_argument('--minimind', default='')
  parser.add_argument('--method', default='loss_controlled')
  options, rest = parser.parse_known_args(argv)
  experiment = f'--config=experiments/paper_16e.py:{options.method}'
  overrides = ['--config.batch_size=4', '--config.accumulation=1', *rest]
  config, _ = command_line.parse(['', experiment, *overrides])
  config = config_lib.freeze(config)
  shape = (config.batch_size, config.sequence_length + 1)
  tokens = np.random.default_rng(0).integers(
    config.data.vocabulary, size=shape, dtype=np.int32
  )
  step, program = our_step(config, tokens)
  timed = {'moe_jax': functools.partial(seconds, step)}
  if options.minimind:
    timed['MiniMind'] = in_another_process(options.minimind, config, tokens)
  for measure in timed.values():
    measure()  # The first one is slower.
  times = collections.defaultdict(list)
  for _ in range(options.steps):
    for name, measure in timed.items():
      times[name].append(measure())
  count = config.batch_size * config.sequence_length
  print(f'{count} tokens a step, {options.steps} steps after the first')
  for name, values in times.items():
    rates = sorted(count / value for value in values)
    print(
      f'{name:9s} {statistics.median(rates):6.1f} tokens/s '
      f'(from {rates[0]:.1f} to {rates[-1]:.1f})'
    )
  if options.minimind:
    pairs = zip(times['MiniMind'], times['moe_jax'], strict=True)
    ratios = sorted(theirs / ours for theirs, ours in pairs)
    print(
      f'moe_jax / MiniMind: {statistics.median(ratios):.2f} '
      f'(from {ratios[0]:.2f} to {ratios[-1]:.2f})'
    )
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f'peak memory of this process: {memory:.1f} GiB')
  if options.breakdown:
    parts = breakdown(step, program)
    total = sum(parts.values())
    for name, value in sorted(parts.items(), key=lambda item: -item[1]):
      print(f'{name:10s} {value:6.2f} s {value / total:5.0%}')


if __name__ == '__main__':
  main(sys.argv[1:])
