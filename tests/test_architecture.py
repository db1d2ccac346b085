"""The rooms of the house and the direction of imports between them."""

import ast
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'moe_jax'
# Each room may import itself and what is listed.
ALLOWED = {
  'routing': set(),
  'parallel': {'routing', 'options', 'jax_privates'},
  'options': set(),
  'jax_privates': set(),
  'storage': set(),
  'nn': {'routing', 'parallel', 'options', 'jax_privates'},
  'data': {'options', 'storage'},
  'runs': {'options', 'jax_privates', 'storage'},
  'config': {'routing', 'data', 'nn', 'options'},
  'train': {
    'routing',
    'parallel',
    'nn',
    'data',
    'runs',
    'config',
    'options',
    'storage',
  },
  'analysis': {
    *('routing', 'parallel', 'nn', 'data', 'runs', 'config', 'train'),
    'options',
  },
  'hf': {
    *('nn', 'data', 'runs', 'config', 'train', 'parallel', 'options'),
  },
  'main': {'parallel', 'runs', 'config', 'options', 'train'},
}


def imported_modules(path: pathlib.Path) -> set[str]:
  """Returns full names; those of relative imports start with the package's."""
  names = set()
  # `from . import x`, one dot, is the folder that the file lies in.
  folders = path.relative_to(PACKAGE.parent).parts[:-1]
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      parent = folders[: len(folders) + 1 - node.level] if node.level else ()
      module = '.'.join((*parent, *filter(None, [node.module])))
      names |= {f'{module}.{alias.name}' for alias in node.names}
  return names


def test_imports_go_one_way():
  wrong = []
  for path in PACKAGE.rglob('*.py'):
    room = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
    for name in imported_modules(path):
      top, _, rest = name.partition('.')
      if top in ('experiments', 'launch', 'tests'):
        wrong.append(f'{path}: {name}')
      if top == 'moe_jax':
        other = rest.partition('.')[0]
        # The package itself has nothing but its version.
        if other and other != room and other not in ALLOWED.get(room, set()):
          wrong.append(f'{path}: {name}')
  assert not wrong


def test_relative_imports_are_seen(tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], 'PACKAGE', tmp_path / 'moe_jax')
  room = tmp_path / 'moe_jax' / 'data'
  room.mkdir(parents=True)
  lines = ['from . import a', 'from .b import c', 'from ..train.loop import d']
  (room / 'file.py').write_text('\n'.join([*lines, 'from e import f']))
  assert imported_modules(room / 'file.py') == {
    'moe_jax.data.a',
    'moe_jax.data.b.c',
    'moe_jax.train.loop.d',
    'e.f',
  }
  with pytest.raises(AssertionError, match='moe_jax.train.loop.d'):
    test_imports_go_one_way()


def test_routing_imports_jax_only():
  """And itself by relative imports, so that the folder works anywhere."""
  allowed = ('jax', 'typing', 'collections', 'functools', 'math')
  # The linear programs are solved on the host. SciPy is imported by the
  # function that needs it, so that others need not wait for it.
  exceptions = {'oracle.py': ('numpy', 'scipy')}
  for path in (PACKAGE / 'routing').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        assert node.level < 2, f'{path}: from {"." * node.level}{node.module}'
        names = [] if node.level else [node.module]
      else:
        continue
      known = allowed + exceptions.get(path.name, ())
      for name in names:
        assert name.split('.')[0] in known, f'{path}: {name}'


def test_functions_fit_on_a_screen():
  """60 lines: blank lines, comments and docstrings do not count."""
  too_long = []
  for path in PACKAGE.rglob('*.py'):
    source = path.read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
      if not isinstance(node, ast.FunctionDef):
        continue
      count = sum(
        bool(line.strip()) and not line.lstrip().startswith('#')
        for line in lines[node.lineno - 1 : node.end_lineno]
      )
      for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef):
          docstring = ast.get_docstring(inner) or ''
          count -= sum(bool(line.strip()) for line in docstring.splitlines())
      if count > 60:
        too_long.append(f'{path}: {node.name} has {count} lines')
  assert not too_long
