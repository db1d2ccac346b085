"""Trains a Mixture-of-Experts language model.

  python -m moe_jax.main --config=experiments/FILE.py:METHOD --workdir=DIR \\
      [--config.OPTION=VALUE ...]

METHOD is how the load of the experts is balanced: bip, loss_controlled,
loss_free, midpoint, quantile, sinkhorn, unbalanced, ...; a wrong one lists all.

Examples:

  # BIP-Based Balancing at the size of the demo, 50 steps.
  python -m moe_jax.main --config=experiments/demo.py:bip \\
      --workdir=runs/bip --config.steps=50

  # Eight dual iterations instead of four.
  python -m moe_jax.main --config=experiments/demo.py:bip \\
      --workdir=runs/bip_t8 --config.balancer.iterations=8

  # Your own text.
  python -m moe_jax.main --config=experiments/mini_16e.py:loss_free \\
      --workdir=runs/mine --config.data.dataset=text_files \\
      --config.data.files='books/*.txt'

  # Where each parameter would be, and its bytes on each device; trains nothing.
  python -m moe_jax.main --config=experiments/paper_64e.py:bip --print_sharding

The same command again continues the run, also with another number of
processes (see moe_jax/runs/processes.py). All of them must see DIR, which
may be gs://BUCKET/... where gcsfs is installed. DIR/config.json lists all
options with their values. Another config than the run's is refused, but for
what --allow_config_change=OPTION,... names.

Exit codes: 0 done, 2 refused (bad config or input), 75 preempted (SIGTERM or
Ctrl-C) and saved, 128 + N ended by signal N unsaved, 1 anything else.
"""

from collections.abc import Callable, Mapping, Sequence
import os
import runpy
import sys
import types

from absl import flags
from ml_collections import ConfigDict, config_flags

from moe_jax.options import Refused, expected, is_plain, one_line, shown
from moe_jax.runs import preemption, processes

_FLAGS = {'print_sharding': False, 'allow_config_change': ''}


def parse(
  argv: Sequence[str],
  *,
  method: str = '',
  others: Mapping[str, str | bool] = types.MappingProxyType({}),
) -> tuple[ConfigDict, flags.FlagValues]:
  """Reads `--config=FILE.py:METHOD`, overrides of its options, `--workdir`.

  Args:
    argv: the program's name and its flags.
    method: taken where the flag names none.
    others: further flags, with their defaults.

  Returns:
    The options of the experiment with those given on top, and the other flags.

  Raises:
    ValueError: a flag, a file, a method, an option or a value is wrong.
  """
  values = flags.FlagValues()
  for name, default in {'config': '', 'workdir': '', **others}.items():
    is_switch = isinstance(default, bool)
    define = flags.DEFINE_boolean if is_switch else flags.DEFINE_string
    define(name, default, '', values)
  overrides = flags.FlagValues()
  known = ['config', 'workdir', *others]
  for argument in argv[1:]:
    # absl knows these by itself: one reads flags from any file, the other lets
    # misspelt flags pass.
    name = argument.lstrip('-').partition('=')[0]
    if argument.startswith('-') and name in ('flagfile', 'undefok'):
      raise ValueError(f'--{name}: {expected(name, known)}')
  try:
    rest = values(list(argv), known_only=True)
    for name, value in values.flag_values_dict().items():
      if isinstance(value, str) and not is_plain(value):
        raise ValueError(
          f'--{name}={shown(value)}: must be one line without control '
          'characters'
        )
    config = load_experiment(values.config, method)
    for argument in rest[1:]:
      _check_argument(argument, config, known)
    config_flags.DEFINE_config_dict(
      'config', config, flag_values=overrides, sys_argv=rest
    )
    overrides(rest)
  except (flags.Error, TypeError, ValueError) as error:
    raise ValueError(one_line(error)) from error
  return overrides.config, values


def load_experiment(path: str, method: str = '') -> ConfigDict:
  """Calls `get_config` of an experiment file, given as FILE.py[:METHOD].

  Raises:
    ValueError: there is no such file, or it fails in whatever way; the message
      has its name.
  """
  path, _, given = path.partition(':')
  if not path:
    raise ValueError('--config=FILE.py:METHOD: missing')
  if not os.path.isfile(path):
    raise ValueError(f'--config={path}: no such file')
  try:
    names = runpy.run_path(path)
    if 'get_config' not in names:
      raise ValueError('has no function get_config')
    config = names['get_config'](*filter(None, [given or method]))
    if not isinstance(config, ConfigDict):
      raise ValueError(f'get_config returned {shown(config)}, no ConfigDict')
    _check_names(config.to_dict())
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # Anything can go wrong in somebody's file.
    kind = '' if type(error) is ValueError else f'{type(error).__name__}: '
    raise ValueError(f'--config={path}: {kind}{one_line(error)}') from error
  return config


def _check_names(options: Mapping) -> None:
  for name, value in options.items():
    if not isinstance(name, str):
      raise ValueError(f'get_config has an option {shown(name)}, no string')
    if isinstance(value, Mapping):
      _check_names(value)


def _check_argument(
  argument: str, config: ConfigDict, known: Sequence[str]
) -> None:
  """Raises ValueError unless `argument` overrides an option that exists."""
  if not argument.startswith('--'):
    raise ValueError(f'{argument}: unexpected; flags look like --name=value')
  name = argument[2:].partition('=')[0]
  if '=' not in argument:
    raise ValueError(f'{argument}: has no value; write {argument}=VALUE')
  section, *path = name.split('.')
  if section == 'config' and path:
    for i, part in enumerate(path):
      known = config if isinstance(config, ConfigDict) else ()
      if part not in known:
        section = '.'.join(['config', *path[: i + 1]])
        raise ValueError(f'--{section}: {expected(part, known)}')
      config = config[part]
    if isinstance(config, ConfigDict):
      raise ValueError(
        f'--{name}: a group of options; set one of {", ".join(config)}'
      )
  else:
    raise ValueError(f'--{name}: {expected(section, known)}')


def main(argv: Sequence[str]) -> int:
  """Runs the program; returns its exit code."""
  if {'--help', '-h', '-help'} & set(argv):
    print(__doc__)
    return 0
  try:
    processes.start()
    with preemption.notice() as preempted:
      _train(argv, preempted)
  except Exception as error:
    return exit_code(error)
  return 0


def _train(argv: Sequence[str], preempted: Callable[[], bool]) -> None:
  with processes.agreement():
    options, values = parse(argv, others=_FLAGS)
    if not values.workdir and not values.print_sharding:
      raise ValueError('--workdir=DIR: missing')
    # Late: a wrong flag is answered at once, before anything big is loaded.
    from moe_jax import config
    from moe_jax.train.loop import train
    from moe_jax.train.plan import plan, sharding

    frozen = config.freeze(options)
    allowed = config.split_names(values.allow_config_change)
    if values.print_sharding:
      return print(sharding(frozen))
  train(plan(frozen, values.workdir, allowed), preempted)


def exit_code(error: Exception) -> int:
  """Says in a line what ended a run; returns the program's exit code.

  What nobody foresees is raised again.
  """
  message, hint = one_line(error), ''
  if isinstance(error, preemption.Preempted):
    print(f'preempted: {message}; the same command continues', file=sys.stderr)
    return 75
  if isinstance(error, OSError):
    hint = '\nThe same command resumes from the last checkpoint.'
  elif _is_out_of_memory(error):
    hint = (
      '; a smaller batch_size, more accumulation or a smaller model need less; '
      '--print_sharding lists the bytes of parameters'
    )
  elif not isinstance(error, (Refused, FloatingPointError)):
    raise error
  print(f'error: {message}{hint}', file=sys.stderr)
  return 2 if isinstance(error, Refused) else 1


def _is_out_of_memory(error: Exception) -> bool:
  if isinstance(error, RuntimeError):  # That of jax is one.
    return 'Out of memory' in str(error) or 'RESOURCE_EXHAUSTED' in str(error)
  return isinstance(error, MemoryError)


if __name__ == '__main__':
  processes.end(main)
