"""The site: it builds without warnings, is current, and what it shows runs."""

import ast
import dataclasses
from html.parser import HTMLParser
import importlib
import inspect
import pathlib
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
from mkdocs.commands.build import build
from mkdocs.config import load_config
import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from docs import configuration
from moe_jax import config
from moe_jax.data import Tokenizer
from moe_jax.runs.reader import Reader
from tests.train import tiny

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ROOT / 'docs/pages'
PACKAGES = ('routing', 'nn', 'data', 'analysis')
NAMED_FILE = re.compile(
  r'`((?:docs|experiments|launch|moe_jax|tests)/[\w/.]+\.\w+)[`:]'
)
NAMED_TEST = re.compile(r'`(tests/[\w/]+\.py)::(\w+)`')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """Builds the site; a warning is an error."""
  directory = tmp_path_factory.mktemp('site')
  config = load_config(
    str(ROOT / 'mkdocs.yml'), site_dir=str(directory), strict=True
  )
  build(config)
  return directory


class Loaded(HTMLParser):
  """Collects what a browser fetches with a page."""

  def __init__(self, page):
    super().__init__()
    self.addresses = []
    self.feed(page.read_text())

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    if tag != 'a':
      self.addresses += [attrs[k] for k in ('src', 'href') if k in attrs]


def test_pages_load_nothing_from_a_network(site):
  pages = list(site.rglob('*.html'))
  assert len(pages) > len(list(PAGES.rglob('*.md')))  # and 404.html
  for page in pages:
    addresses = Loaded(page).addresses
    assert any('stylesheets/main' in address for address in addresses)
    assert not [a for a in addresses if re.match(r'\w+:|//', a)], page.name
  for sheet in site.rglob('*.css'):
    assert not re.search(r'url\(["\']?(\w+:)?//', sheet.read_text()), sheet.name


def test_formulas_are_rendered(site):
  html = (site / 'concepts.html').read_text()
  formulas = re.findall(r'<math.*?</math>', html, re.DOTALL)
  source = (PAGES / 'concepts.md').read_text()
  displayed = source.count('\n$$\n') // 2
  assert html.count('display="block"') == displayed > 0
  assert (
    len(formulas) == displayed + len(re.findall(r'(?<!\$)\$(?!\$)', source)) / 2
  )
  # What the converter does not know, it copies.
  assert not [f for f in formulas if '\\' in f or '<mi>&</mi>' in f]
  assert 'arithmatex' not in html


@pytest.mark.parametrize('name', PACKAGES)
def test_public_names_are_documented(site, name):
  package = importlib.import_module(f'moe_jax.{name}')
  html = (site / f'api/{name}.html').read_text()
  for public in package.__all__:
    assert inspect.getdoc(getattr(package, public)), public
    assert re.search(rf'id="moe_jax\.{name}\.[\w.]*\b{public}"', html), public


def test_the_reference_of_options_is_current():
  current = configuration.reference()
  assert configuration.PAGE.read_text() == current, (
    'run: python -m docs.configuration'
  )


def test_the_reference_has_every_option():
  page = configuration.PAGE.read_text()
  assert '| `mesh.data` | `-1` |' in page
  for field in dataclasses.fields(config.Config):
    assert f'`{field.name}`' in page or f'| `{field.name}.' in page, field.name
  assert '| `balancer.estimator` | `exact` | str |' in page
  assert re.search(r'`learning_rate` .* float above 0, .* \| named \|', page)
  assert re.search(r'`model.norm_epsilon` .* \| no \|', page)
  assert re.search(r'`checkpoint_every` .* \| yes \|', page)


def test_files_that_pages_name_exist():
  for page in [*PAGES.glob('*.md'), ROOT / 'launch/README.md']:
    for name in NAMED_FILE.findall(page.read_text()):
      assert (ROOT / name).exists(), f'{page.name}: {name}'


def test_tests_that_pages_name_exist():
  """As `tests/FILE.py::NAME`; each row of bugs.md has one."""
  for page in PAGES.glob('*.md'):
    for file, name in NAMED_TEST.findall(page.read_text()):
      tree = ast.parse((ROOT / file).read_text())
      functions = {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}
      assert name in functions, f'{page.name}: {file}::{name}'
  lines = (PAGES / 'bugs.md').read_text().splitlines()
  rows = [line for line in lines if re.match(r'\| (?!mistake |---)', line)]
  assert len(rows) > 20
  for row in rows:
    assert NAMED_TEST.search(row) and 'https://' in row, row
    assert row.count(' | ') == 2, row


def run_blocks(page):
  """Runs all Python of a page, as one program."""
  blocks = re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)
  assert blocks
  names = {}
  exec(compile('\n'.join(blocks), str(page), 'exec'), names)
  return names


@pytest.mark.long
def test_the_quick_start_runs():
  names = run_blocks(PAGES / 'quick_start.md')
  assert names['get_config']('midpoint').model.experts == 32
  assert names['choice'].load.sum() == 512 * 2


@pytest.mark.long
def test_the_balancer_that_is_added_balances(capsys):
  run_blocks(PAGES / 'add_a_balancer.md')
  first, last, *_ = capsys.readouterr().out.splitlines()
  assert float(last.split()[1]) < float(first.split()[1]) / 2


@pytest.mark.long
def test_the_loss_that_is_added_falls_and_balances(capsys):
  run_blocks(PAGES / 'add_a_loss.md')
  first, last = (
    [float(word) for word in line.split()]
    for line in capsys.readouterr().out.splitlines()
  )
  assert last[1] < first[1] / 2 and last[2] < first[2]


@pytest.mark.long
def test_the_selection_that_is_added_reaches_its_sum():
  names = run_blocks(PAGES / 'add_a_selection.md')
  active, gates = names['choice'].active, names['choice'].gates
  full = jnp.all(active, axis=1)
  assert 0 < jnp.sum(full) < 256
  assert jnp.all(full | (jnp.sum(gates, axis=1) >= 0.7))
  assert jnp.all(jnp.sum(gates[:, :-1] * active[:, 1:], axis=1) < 0.7)


@pytest.mark.long
def test_the_recipe_of_deepseek_v3_is_its_loss_and_its_groups():
  names = run_blocks(PAGES / 'deepseek_v3.md')
  aux = names['aux']
  assert 0.9e-4 < aux.loss < 2e-4
  groups = jnp.sort(aux.choice.experts // 4, axis=1)
  assert jnp.all(jnp.sum(jnp.diff(groups, axis=1) > 0, axis=1) <= 1)
  assert jnp.allclose(jnp.sum(aux.choice.gates, axis=1), 2.5)


@pytest.mark.long
def test_the_inspection_of_a_run_runs(tmp_path, monkeypatch):
  text = tiny.write_text(tmp_path)
  bip, loss_free = (
    tmp_path / f'runs/demo/{m}_seed_0' for m in ('bip', 'loss_free')
  )
  tiny.run(tiny.tiny_config(text), bip)
  shutil.copytree(bip, loss_free)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('MPLBACKEND', 'agg')
  names = run_blocks(PAGES / 'inspect.md')
  page = (PAGES / 'inspect.md').read_text()
  for metric in names['run'].metrics:
    metric = re.sub(r'layer_\d+', 'layer_00', metric)
    assert f'`{metric.replace("validation", "SET")}`' in page, metric
  assert names['checkpoint'].step == names['run'].checkpoints[-1]
  assert (tmp_path / 'max_violation.svg').stat().st_size > 1000


@pytest.mark.long
def test_the_page_on_replay_runs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = tiny.write_text(tmp_path)
  options = {'steps': 2, 'data.evaluation_sets': ''}
  recorded = tiny.tiny_config(text, record_routes=True, **options)
  tiny.run(recorded, 'runs/recorded')
  for method in ('bip', 'loss_free'):
    config = tiny.tiny_config(
      text, method, replay_routes='runs/recorded', **options
    )
    tiny.run(config, f'runs/on_the_same_routes/{method}')
  names = run_blocks(PAGES / 'replay.md')
  assert names['bip'].loads(0).equals(names['loss_free'].loads(0))
  assert names['experts_BxLxSxK'].shape == (8, 2, 16, 2)
  np.testing.assert_allclose(names['same_BxSxD'], names['y_BxSxD'], atol=1e-6)


@pytest.mark.long
def test_the_steps_from_parquet_to_a_job_run(tmp_path):
  """As they stand, but for where the files are and the size of the model."""
  page = (PAGES / 'your_text.md').read_text()
  block = re.search(r'```sh\n(BUCKET=.*?)```', page, re.DOTALL)[1]
  for old, new in (
    ('BUCKET=gs://bucket', f'BUCKET={tmp_path}'),
    ('experiments/mini_16e.py', 'tests/train/tiny.py'),
    ('--workdir=runs', f'--workdir={tmp_path}/runs'),
    ('python -m', f'{sys.executable} -m'),
  ):
    assert old in block
    block = block.replace(old, new)
  small = '--config.steps=1 --config.data.dataset=sotu --config.data.files='
  block = f'{block.rstrip()} {small} --config.data.evaluation_sets=validation'
  (tmp_path / 'fineweb-edu').mkdir()
  texts = [
    f'{i}: the load of an expert, ' + 'and again ' * i for i in range(99)
  ]
  for i in range(3):
    path = tmp_path / f'fineweb-edu/{i}.parquet'
    parquet.write_table(pa.table({'text': texts[i::3]}), path)
  tokenizer = Tokenizer.train(texts, 300)
  (tmp_path / 'tokenizer.json').write_text(tokenizer.to_json())
  done = subprocess.run(
    ['bash', '-ec', block], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert Reader(tmp_path / 'runs/edu').records[-1]['step'] == 1
