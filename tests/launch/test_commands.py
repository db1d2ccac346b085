"""The commands that documents show are accepted by the programs they start.

Each is parsed by its program's own parser, and its mesh and batch are checked
for the number of devices that the command asks for. Nothing is run.
"""

import ast
from collections.abc import Iterator
import math
import pathlib
import re
import shlex
import string
from typing import NamedTuple

import pytest
import yaml

from experiments import compare
from launch import ahead, plan
from launch import check as check_lib
from moe_jax import config
from moe_jax import main as command_line
from moe_jax.train import state as states
from tests.parallel.test_mesh import gpus

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = [
  path.relative_to(ROOT)
  for pattern in (
    'README.md',
    'launch/README.md',
    'launch/*.sh',
    'launch/*.sbatch',
    'launch/gke/*.yaml',
    'docs/pages/*.md',
    'experiments/*.py',
    'experiments/*/*.py',
    'moe_jax/main.py',
  )
  for path in sorted(ROOT.glob(pattern))
]
PODS = [
  path
  for path in DOCUMENTS
  if path.parent.name == 'pods' and path.name != '__init__.py'
]
# A usage pattern has one of these in the place of a file, a method or options.
PATTERN = re.compile(r'\.\.\.|--help|\b(FILE|METHOD|CONFIG|OPTION|TOPOLOGY)\b')
# The method that docs/pages/add_a_balancer.md adds; loss_free has its options.
ADDED = 'extremes', 'loss_free'
# Chips of a slice by gcloud's name; the larger names of v4 and v5p count cores.
SLICE = re.compile(r'(v5litepod|v6e|v5p|v4)-(\d+)')


class Devices(NamedTuple):
  """What a command starts on: `together` of the `count` are a slice or node."""

  count: int = 1
  together: int = 1


class Command(NamedTuple):
  """A program of this repository with its flags, and where it would run."""

  module: str
  flags: list[str]
  devices: Devices


def lines_of(path: pathlib.Path, text: str) -> Iterator[str]:
  """Yields what could be a command, one a line, without comments."""
  if path.suffix == '.md':
    blocks = re.findall(r'^```sh\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
    blocks += [
      span.replace('\n', ' ')
      for span in re.findall(r'(?<!`)`([^`]+)`(?!`)', text)
    ]
  elif path.suffix == '.py':
    blocks = [ast.get_docstring(ast.parse(text)) or '']
  else:  # The comment at the top of a script or manifest.
    blocks = re.findall(r'^#(?!!) ?(.*)$', text, re.MULTILINE)
    blocks = ['\n'.join(blocks)]
  for block in blocks:
    yield from block.replace('\\\n', ' ').splitlines()


class Reader:
  """Reads the commands of one document, which share slices and variables."""

  def __init__(self):
    self.slices: dict[str, Devices] = {}
    self.variables: dict[str, str] = {}

  def read(self, line: str) -> Iterator[Command]:
    """Yields the command of a line, if it has one of ours."""
    line = string.Template(line).safe_substitute(self.variables)
    try:
      words = shlex.split(line.replace(*ADDED), comments=True)
    except ValueError:  # Prose, with an apostrophe.
      return
    while words and re.match(r'[A-Z_]+=', words[0]):  # Of this command only.
      words.pop(0)
    match words:
      case ['export', *pairs]:
        for name, _, value in (pair.partition('=') for pair in pairs):
          self.variables[name] = value.replace('...', name)
      case _ if PATTERN.search(line):
        return
      case ['python', '-m', module, *flags] if flags:
        yield Command(module, flags, Devices())
      case ['launch/local.sh', path, workdir, *rest]:
        yield local(path, workdir, *rest)
      case ['sbatch', *rest] if 'launch/slurm.sbatch' in rest:
        yield sbatch(rest)
      case ['launch/tpu_vm.sh', 'create', name, _, kind, *_]:
        self.slices[name] = slices(kind)
      case ['launch/tpu_vm.sh', 'run', name, _, path, workdir, *flags]:
        yield train(self.slices[name], path, workdir, *flags)
      case ['envsubst', '<', file, '|', 'kubectl', 'create', *_]:
        yield self.job_set(file)
      case ['xpk', 'workload', 'create', *flags]:
        last = flag(flags, 'command', '').rpartition('exec ')[2]
        for command in self.read(last):
          yield command._replace(devices=xpk(flags))

  def job_set(self, file: str) -> Command:
    """Reads the command of a manifest filled in with the exported variables."""
    text = (ROOT / file).read_text()
    manifest = yaml.safe_load(string.Template(text).substitute(self.variables))
    (job,) = manifest['spec']['replicatedJobs']
    (container,) = job['template']['spec']['template']['spec']['containers']
    (chips,) = (
      value
      for name, value in container['resources']['requests'].items()
      if '/' in name
    )
    hosts = job['template']['spec']['completions']
    python, m, module = container['command']
    assert (python, m) == ('python', '-m')
    nodes = hosts * job['replicas']
    devices = Devices(chips * nodes, chips)
    if 'TOPOLOGY' in string.Template(text).get_identifiers():
      sides = map(int, self.variables['TOPOLOGY'].split('x'))
      devices = Devices(chips * nodes, math.prod(sides))
      assert devices.together == chips * hosts, self.variables
    return Command(module, container['args'], devices)


def flag(flags: list[str], name: str, default: str) -> str:
  """Returns the value of --NAME=VALUE."""
  values = (f.partition('=')[2] for f in flags if f.startswith(f'--{name}='))
  return next(values, default)


def topology(flags: list[str]) -> Devices:
  """Reads what the planner is asked about."""
  name = flag(flags, 'topology', '')
  count = int(flag(flags, 'slices', '1'))
  found = ahead.parse_topology(name, count, flag(flags, 'machine', ''))
  together = found.shape[0] if found.machine else found.size // count
  return Devices(found.size, together)


def slices(kind: str, count: int = 1) -> Devices:
  """Reads gcloud's name of a slice, such as v5p-128."""
  generation, size = SLICE.fullmatch(kind).groups()
  together = int(size) // (2 if generation in ('v4', 'v5p') else 1)
  return Devices(together * count, together)


def xpk(flags: list[str]) -> Devices:
  """Reads what xpk starts a training on: slices of TPUs or nodes of GPUs."""
  if kind := flag(flags, 'tpu-type', ''):
    return slices(kind, int(flag(flags, 'num-slices', '1')))
  together = int(flag(flags, 'device-type', '').rpartition('-')[2])
  return Devices(together * int(flag(flags, 'num-nodes', '')), together)


def train(devices: Devices, path: str, workdir: str, *flags: str) -> Command:
  flags = [f'--config={path}', f'--workdir={workdir}', *flags]
  return Command('moe_jax.main', flags, devices)


def local(path: str, workdir: str, *rest: str) -> Command:
  """Reads the arguments of local.sh, the third of which may be a number."""
  count = 1
  if rest and re.fullmatch(r'(\d+x)?\d+', rest[0]):
    count = math.prod(map(int, rest[0].split('x')))
    rest = rest[1:]
  return train(Devices(count, count), path, workdir, *rest)


def sbatch(words: list[str]) -> Command:
  """Reads sbatch's options, which go before those that the script has."""
  script = words.index('launch/slurm.sbatch')
  text = (ROOT / words[script]).read_text()
  options = words[:script] + re.findall(r'^#SBATCH (\S+)', text, re.MULTILINE)
  nodes = int(flag(options, 'nodes', ''))
  tasks = int(flag(options, 'ntasks-per-node', ''))
  return train(Devices(nodes * tasks, tasks), *words[script + 1 :])


def check(command: Command) -> None:
  """Raises ValueError where the program refuses the command."""
  argv = [command.module, *command.flags]
  match command.module:
    case 'moe_jax.main':
      options, _ = command_line.parse(argv, others=command_line._FLAGS)
      check_config(options, command.devices)
    case 'launch.plan':
      options, values = command_line.parse(argv, others=plan._FLAGS)
      if values.mesh:
        options.mesh.data, options.mesh.expert = plan._mesh(values.mesh)
      check_config(options, topology(command.flags))
    case 'launch.check':
      if not flag(argv, 'config', ''):
        argv[1:1] = check_lib._DEFAULT
      options, _ = command_line.parse(argv, others={'out': ''})
      check_config(options, command.devices)
    case 'experiments.compare':
      _, values = command_line.parse(argv, others=compare._FLAGS)
      for method in values.methods.split(','):
        options, _ = command_line.parse(
          argv, method=method, others=compare._FLAGS
        )
        check_config(options, command.devices)


def check_config(options, devices: Devices) -> None:
  frozen = config.freeze(options)
  described = gpus(devices.count // devices.together, devices.together)
  states.check_mesh(frozen, states.make_mesh(frozen, described))


def commands(path: pathlib.Path, text: str) -> Iterator[Command]:
  reader = Reader()
  for line in lines_of(path, text):
    yield from reader.read(line.strip())


def refusals(path: pathlib.Path, text: str) -> list[str]:
  found = []
  for command in commands(path, text):
    try:
      check(command)
    except ValueError as error:
      found.append(f'{command.module} {shlex.join(command.flags)}: {error}')
  return found


@pytest.mark.parametrize('path', DOCUMENTS, ids=str)
def test_commands_are_accepted(path, monkeypatch):
  monkeypatch.chdir(ROOT)
  refused = refusals(path, (ROOT / path).read_text())
  assert not refused, '\n'.join(refused)


@pytest.mark.parametrize('path', PODS, ids=str)
def test_pods_take_every_method(path, monkeypatch):
  monkeypatch.chdir(ROOT)
  planned = list(commands(path, (ROOT / path).read_text()))
  assert planned
  for module, flags, devices in planned:
    for method in config.METHODS:
      flags = [re.sub(r'\.py:\w+$', f'.py:{method}', flag) for flag in flags]
      check(Command(module, flags, devices))


def test_commands_are_found():
  found = {
    str(path): list(commands(path, (ROOT / path).read_text()))
    for path in DOCUMENTS
  }
  modules = {c.module for of_path in found.values() for c in of_path}
  programs = {'moe_jax.main', 'experiments.compare'}
  assert modules >= programs | {'launch.plan', 'launch.check'}
  assert len(found['README.md']) >= 4
  assert len(found['launch/README.md']) >= 12
  sizes = {c.devices for c in found['launch/README.md']}
  one_of_each = {(1, 1), (8, 8), (256, 256), (512, 256), (32, 8)}
  assert {Devices(*pair) for pair in one_of_each} <= sizes


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    (
      'launch/tpu_vm.sh create a z v5litepod-256\n'
      'launch/tpu_vm.sh run a z experiments/paper_64e.py:bip gs://b/run',
      ['batch_size=256', 'multiple of 256'],
    ),
    (
      'sbatch --nodes=2 launch/slurm.sbatch experiments/demo.py:bip run \\\n'
      '  --config.mesh.expert=16',
      ['mesh.expert=16', 'would span'],
    ),
    (
      'launch/local.sh experiments/demo.py:bip run 2x3',
      ['batch_size=16', 'multiple of 6'],
    ),
    (
      'python -m launch.plan --config=experiments/demo.py:bip --topology=v9:4',
      ['--topology=v9:4', 'must be like'],
    ),
    (
      'python -m experiments.compare --config=experiments/demo.py '
      '--workdir=run --methods=bip,none',
      ['none'],
    ),
    (
      'python -m moe_jax.main --config=experiments/demo.py:bip '
      '--workdir=run --config.model.experts_per_tokn=2',
      ['experts_per_tokn'],
    ),
  ],
)
def test_wrong_commands_are_found(text, words, monkeypatch):
  monkeypatch.chdir(ROOT)
  (refused,) = refusals(pathlib.Path('page.md'), f'```sh\n{text}\n```\n')
  assert all(word in refused for word in words), refused


def test_tables_of_machines_agree_with_themselves():
  text = (ROOT / 'launch/README.md').read_text()
  rows = [line.strip('| ').split(' | ') for line in text.splitlines()]
  rows = [row for row in rows if len(row) == 8 and row[0][0] in 'vh']
  assert len(rows) >= 6
  for planner, vm, _, sides, count, hosts, chips, _ in rows:
    name, *flags = f'--topology={planner}'.split()
    devices = topology([name, *flags])
    assert int(hosts) * int(chips) * int(count.replace('-', '1')) == (
      devices.count
    )
    if sides != '-':
      assert math.prod(map(int, sides.split('x'))) == devices.together
    if vm != '-':
      assert slices(vm) == devices
