"""What pip is told: the package's ranges, and the versions that are tested."""

import ast
import importlib.metadata
import pathlib
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
PYTHONS = ('3.11', '3.12', '3.13')
# Modules that another distribution requires.
COMES_WITH = {'jaxlib': 'jax'}


def read(file):
  """Returns the requirements of a file."""
  lines = (ROOT / file).read_text().splitlines()
  return [
    Requirement(line.partition(' #')[0])
    for line in lines
    if line[:1] not in '#'
  ]


def declared(extra=None):
  """Returns what the package requires, or an extra does."""
  extras = PROJECT['optional-dependencies']
  return list(
    map(Requirement, extras[extra] if extra else PROJECT['dependencies'])
  )


def pins(file, python):
  """Returns the versions that a Python gets, by name."""
  found = {}
  for requirement in read(file):
    marker = requirement.marker
    if marker is None or marker.evaluate({'python_version': python}):
      (pin,) = requirement.specifier
      name = canonicalize_name(requirement.name)
      assert pin.operator == '==' and name not in found, requirement
      found[name] = pin.version
  return found


@pytest.mark.parametrize('python', PYTHONS)
@pytest.mark.parametrize(
  ('extra', 'file'),
  [
    (None, 'requirements.txt'),
    ('cuda12', 'requirements-cuda.txt'),
    ('gcs', 'requirements-cuda.txt'),
    ('tpu', 'requirements-tpu.txt'),
    ('gcs', 'requirements-tpu.txt'),
    ('notebooks', 'requirements-notebooks.txt'),
    ('wandb', 'requirements-wandb.txt'),
    (None, 'requirements-beam.txt'),
    ('beam', 'requirements-beam.txt'),
  ],
)
def test_ranges_admit_the_pins(extra, file, python):
  found = pins(file, python)
  ranges = [
    each for each in declared(extra) if canonicalize_name(each.name) in found
  ]
  assert ranges
  for each in ranges:
    assert found[canonicalize_name(each.name)] in each.specifier, each


@pytest.mark.parametrize('python', PYTHONS)
def test_all_that_is_declared_is_pinned(python):
  names = {canonicalize_name(each.name) for each in declared()}
  assert names == set(pins('requirements.txt', python))


@pytest.mark.parametrize('python', PYTHONS)
@pytest.mark.parametrize('backend', ['cuda', 'tpu'])
def test_backends_are_for_the_same_jax(backend, python):
  """TPU: not with Python 3.11, whose compiler is of no use; pip refuses."""
  base, more = (
    pins(file, python)
    for file in ('requirements.txt', f'requirements-{backend}.txt')
  )
  both = base.keys() & more.keys()
  assert both == {'jax'}
  same = (backend, python) != ('tpu', '3.11')
  assert (base['jax'] == more['jax']) == same


def test_this_environment_has_the_pins():
  """Or other tests say nothing of them."""
  python = f'{sys.version_info.major}.{sys.version_info.minor}'
  for name, version in pins('requirements.txt', python).items():
    assert importlib.metadata.version(name) == version, name


def test_all_imports_are_declared():
  names = {canonicalize_name(each.name) for each in declared()}
  extras = {
    canonicalize_name(each.name)
    for extra in ('beam', 'harness', 'sentencepiece', 'wandb', 'zstd')
    for each in declared(extra)
  }
  distributions = importlib.metadata.packages_distributions()
  for path in (ROOT / 'moe_jax').rglob('*.py'):
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        modules |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and not node.level:
        modules.add(node.module)
    for module in {module.partition('.')[0] for module in modules}:
      if module != 'moe_jax' and module not in sys.stdlib_module_names:
        module = COMES_WITH.get(module, module)
        options = distributions.get(module, [module])  # Of an extra, maybe.
        options = set(map(canonicalize_name, options))
        assert options & (names | extras), f'{path}: {module}'
