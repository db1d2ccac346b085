"""Nothing that is read can run code, and nothing listens to strangers."""

import ast
from collections.abc import Iterator
import ipaddress
import pathlib
import pickle
import re
import sys

from jax.experimental import multihost_utils
import pytest

from moe_jax.runs import checkpoints, processes
from moe_jax.runs.reader import Reader
from moe_jax.train import loop
from moe_jax.train import plan as plan_lib
from tests import several_processes
from tests.several_processes import ROOT
from tests.train import tiny

MODULES = {'cloudpickle', 'dill', 'joblib', 'marshal', 'pickle', 'shelve'}
CALLS = re.compile(
  r'(builtins\.)?(eval|exec|__import__)|os\.(system|popen)|runpy\.\w+'
  r'|.*\.(read_pickle|to_pickle)'
)
ALLOWED = {
  # The user's own experiment file, named on the command line.
  ('moe_jax/main.py', 'runpy.run_path'),
}
SCRIPTS = [
  *ROOT.glob('launch/*.sh'),
  *ROOT.glob('launch/*.sbatch'),
  ROOT / '.ci/run',
]


def dangers(source: str) -> Iterator[str]:
  """Yields what could run code that it is given as data."""
  for node in ast.walk(ast.parse(source)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      if CALLS.fullmatch(called):
        yield called
      for keyword in node.keywords:
        option = ast.unparse(keyword)
        if option in ('shell=True', 'allow_pickle=True'):
          yield option
    for name in names:
      if name.partition('.')[0] in MODULES or CALLS.fullmatch(name):
        yield name


@pytest.mark.parametrize(
  'source',
  [
    'import pickle',
    'from cloudpickle import loads',
    'def f():\n  import marshal as m',
    'eval(text)',
    'builtins.exec(text)',
    'os.system(text)',
    'from os import popen',
    'subprocess.run(text, shell=True)',
    'np.load(file, allow_pickle=True)',
    'pd.read_pickle(file)',
  ],
)
def test_dangers_are_found(source):
  assert list(dangers(source))


def test_no_code_is_made_from_data():
  files = [
    path
    for room in ('moe_jax', 'experiments', 'launch')
    for path in (ROOT / room).rglob('*.py')
  ]
  found = {
    (str(path.relative_to(ROOT)), danger)
    for path in files
    for danger in dangers(path.read_text())
  }
  assert found == ALLOWED


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_launchers_pass_words_and_never_read_them_as_commands(script):
  code = re.sub(r'(?m)^\s*#.*$', '', script.read_text())
  assert not re.search(r'\b(eval|source|sh -c|bash -c)\b|`', code)
  assert not re.search(r'(?<!")\$[@*]|\$\*', code)


def listening(process: int | str = 'self') -> set[str]:
  """Returns the addresses that a process of this machine listens on."""
  root = pathlib.Path('/proc') / str(process)
  own = set()
  for link in (root / 'fd').iterdir():
    try:
      own.add(str(link.readlink()))
    except FileNotFoundError:  # Closed meanwhile.
      pass
  addresses = set()
  for table in ('tcp', 'tcp6'):
    for line in (root / 'net' / table).read_text().splitlines()[1:]:
      _, local, _, state, *_, inode = line.split()[:10]
      if state == '0A' and f'socket:[{inode}]' in own:
        # Words of four bytes, each in the order of this machine.
        words = bytes.fromhex(local.partition(':')[0])
        packed = b''.join(
          words[i : i + 4][:: -1 if sys.byteorder == 'little' else 1]
          for i in range(0, len(words), 4)
        )
        addresses.add(str(ipaddress.ip_address(packed)))
  return addresses


linux = pytest.mark.skipif(
  sys.platform != 'linux', reason='reads what Linux says of its processes'
)


@pytest.fixture(scope='module')
def unpickled():
  """Lookups of a class or function for a pickle: by which module, of what."""
  lookups, watching = [], True

  def hook(event, arguments):
    if watching and event == 'pickle.find_class':
      who = sys._getframe(1).f_globals['__name__']
      lookups.append((who, '.'.join(arguments)))

  sys.addaudithook(hook)  # It cannot be removed.
  yield lookups
  watching = False


@linux
def test_a_run_unpickles_nothing_and_listens_on_nothing(
  unpickled, tmp_path, monkeypatch
):
  """Text is tokenized, trained on, saved; all of it is read again."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  (tmp_path / 'text').mkdir()
  config = tiny.tiny_config(
    tiny.write_text(tmp_path / 'text'),
    'unbalanced',
    **{'steps': 2, 'model.layers': 1, 'data.evaluation_sets': ''},
  )
  batches, seen = loop.training_batches, []

  def watched(*args):
    for batch in batches(*args):
      seen.append(listening())
      yield batch

  monkeypatch.setattr(loop, 'training_batches', watched)
  tiny.run(config, tmp_path / 'run')
  assert seen == [set(), set()]

  abstract = plan_lib.plan(config, tmp_path / 'run').training.abstract
  directory = tmp_path / 'run' / 'checkpoints'
  checkpoints.restore_newest(
    directory,
    Reader(tmp_path / 'run').facts['run'],
    lambda config: checkpoints.items_of(abstract),
  )
  assert unpickled == []
  files = [path for path in directory.rglob('*') if path.is_file()]
  assert files
  for path in files:
    content = path.read_bytes()
    assert not (re.match(rb'\x80[\x02-\x05]', content) and content[-1:] == b'.')

  # It would have been seen.
  pickle.loads(pickle.dumps(pathlib.PurePosixPath('a')))
  assert unpickled == [(__name__, 'pathlib.PurePosixPath')]


@pytest.mark.long
@linux
def test_processes_on_one_machine_listen_on_loopback_only():
  command = ['-m', 'tests.test_security']
  for process in several_processes.run(command, command):
    assert process.returncode == 0, process.stderr
    # Gloo listens as well, and writes to the same stream.
    (addresses,) = re.findall(r'listening: (.*)', process.stdout)
    addresses = addresses.split()
    assert addresses
    for address in map(ipaddress.ip_address, addresses):
      assert (getattr(address, 'ipv4_mapped', None) or address).is_loopback


if __name__ == '__main__':
  processes.start()
  multihost_utils.sync_global_devices('all connections are made')
  print('\nlistening:', *listening(), flush=True)
  multihost_utils.sync_global_devices('all have looked')
