"""The rooms of the house and the direction of imports between them."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / 'moe_jax'
# Each room may import itself and what is listed.
ALLOWED = {
  'routing': set(),
  'parallel': {'routing'},
  'options': set(),
  'nn': {'routing', 'parallel', 'options'},
  'data': {'options'},
  'config': {'routing', 'data', 'nn', 'options'},
  'train': {'routing', 'parallel', 'nn', 'data', 'config'},
  'analysis': {'routing', 'parallel', 'nn', 'data', 'config', 'train'},
  'main': {'parallel', 'config', 'options', 'train'},
}


def imported_modules(path: pathlib.Path) -> set[str]:
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
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


def test_routing_imports_jax_only():
  allowed = ('jax', 'moe_jax', 'typing', 'collections', 'math')
  # The linear programs are solved on the host. SciPy is imported by the
  # function that needs it, so that others need not wait for it.
  exceptions = {'oracle.py': ('numpy', 'scipy')}
  for path in (PACKAGE / 'routing').glob('*.py'):
    for name in imported_modules(path):
      known = allowed + exceptions.get(path.name, ())
      assert name.split('.')[0] in known, f'{path}: {name}'
      assert not name.startswith('moe_jax') or 'moe_jax.routing' in name
