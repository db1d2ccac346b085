"""Runs moe_jax.main with marks of what it does, and with faults on request.

  python tests/faults/child.py FD FAULT,FAULT FLAGS...

FD is a pipe. Marks are lines `SECONDS begin|end PHASE`, by the monotonic clock,
which all processes of a machine share.
"""

import functools
import hashlib
import os
import runpy
import sys
import time

# What is marked: where its caller finds it. A step has no end but what follows,
# as the program does not wait until it is computed.
PHASES = {
  'data preparation': ('moe_jax.data', 'load_text'),
  'restore': ('moe_jax.runs.checkpoints', 'restore_newest'),
  'evaluation': ('moe_jax.train.evaluate', '_add_up'),
  'save': ('moe_jax.runs.saver', 'Saver.save'),
}


def mark(what, phase):
  os.write(FD, f'{time.monotonic()} {what} {phase}\n'.encode())


def marked(phase, function):
  @functools.wraps(function)
  def call(*args, **kwargs):
    mark('begin', phase)
    result = function(*args, **kwargs)
    mark('end', phase)
    return result

  return call


def place(module, path):
  """Returns the object that holds a function, and the function's name."""
  *parents, name = path.split('.')
  return functools.reduce(getattr, parents, __import__(module, {}, {}, [''])), (
    name
  )


def marked_steps(make):
  def make_train_step(*args, **kwargs):
    steps = [make(*args, **kwargs)]  # Then also a mark of having compiled.

    def train_step(*args):
      if len(steps) > 1:
        mark('begin', 'step')
        return steps[0](*args)
      steps.append(True)
      mark('begin', 'compilation')
      if 'long_compilation' in FAULTS:
        # As in XLA: no Python, no lock, deaf to signals; a minute or so.
        hashlib.pbkdf2_hmac('sha256', b'', b'', 100_000_000)
      result = steps[0](*args)
      mark('end', 'compilation')
      return result

    return train_step

  return make_train_step


def clock_backwards():
  """As if somebody set the clock back, again and again."""
  seconds, began = time.time, time.time()
  time.time = lambda: 2 * began - seconds()
  time.time_ns = lambda: int(1e9 * time.time())


def count_compilations():
  """Marks each program compiled, or found in the cache."""
  from jax import monitoring

  def listen(event, seconds, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      mark('begin', 'XLA')
      mark('end', 'XLA')

  monitoring.register_event_duration_secs_listener(listen)


def small_files(save):
  """Fails to write files of over 8 KB, also from C++: EFBIG, not a mock."""
  import resource

  def call(self, state, position, **arguments):
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    if position.step > 3:
      resource.setrlimit(resource.RLIMIT_FSIZE, (8192, most))
    try:
      return save(self, state, position, **arguments)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

  return call


if __name__ == '__main__':
  FD, FAULTS = int(sys.argv[1]), sys.argv[2].split(',')
  if 'clock' in FAULTS:
    clock_backwards()
  if 'small_files' in FAULTS:
    holder, name = place(*PHASES['save'])
    setattr(holder, name, small_files(getattr(holder, name)))
  if 'count_compilations' in FAULTS:
    count_compilations()
  for phase, (module, path) in PHASES.items():
    holder, name = place(module, path)
    setattr(holder, name, marked(phase, getattr(holder, name)))
  holder, name = place('moe_jax.train.loop', 'make_train_step')
  setattr(holder, name, marked_steps(getattr(holder, name)))
  sys.argv = ['moe_jax.main', *sys.argv[3:]]
  runpy.run_module('moe_jax.main', run_name='__main__')
