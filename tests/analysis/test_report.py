"""The report page: what it says, that it is safe, and how it looks."""

from html import parser
import io
import os
import pathlib
import re
import shutil
import time

from matplotlib.figure import Figure
import numpy as np
from playwright import sync_api
import pytest
from rich.console import Console

from moe_jax.analysis import Run
from moe_jax.analysis.report import __main__ as report
from moe_jax.analysis.report import pictures


class Page(parser.HTMLParser):
  """Tags with attributes, and each table's rows of texts by its label."""

  def __init__(self, html):
    super().__init__()
    self.tags, self.tables, self.label, self.cell = [], {}, '', None
    self.feed(html)

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.tags.append((tag, attributes))
    if tag == 'div' and 'aria-label' in attributes:
      self.label = attributes['aria-label']
      self.tables[self.label] = []
    if tag == 'tr':
      self.tables[self.label].append([])
    if tag in ('td', 'th'):
      self.tables[self.label][-1].append('')
      self.cell = tag

  def handle_endtag(self, tag):
    if tag == self.cell:
      self.cell = None

  def handle_data(self, data):
    if self.cell:
      self.tables[self.label][-1][-1] += data


def text_of(html):
  return ' '.join(re.sub('<[^>]*>', '', html).split())


@pytest.fixture
def page(tmp_path, capsys):
  """Makes a page of work directories by the command; returns its HTML."""

  def make(*workdirs):
    out = tmp_path / 'report.html'
    assert report.main([*map(str, workdirs), f'--out={out}']) == 0
    return out.read_text()

  return make


def test_one_run(write_run, page):
  html = page(write_run('bip'))
  tables = Page(html).tables
  assert tables['Runs'][1] == [
    'bip',
    'bip',
    'bip(iterations=4, clip=True, cutoff=next, warm=True, lag=False, '
    'scope=global)',
    '0',
    '3',
    'True',
    '24',
    '0',
    '–',
  ]
  assert tables['Balance'][1][:5] == ['bip', '0.583', '1.000', '1.000', '0.250']
  assert tables['AvgMaxVio / SupMaxVio of each layer'][1:] == [
    ['layer_00', '0.500 / 1.500'],
    ['layer_01', '0.667 / 1.000'],
  ]
  assert tables['On validation'][1][1:3] == ['20.12', '1.500']
  assert 'Differences' not in html
  for option in ('<dt>learning_rate</dt><dd>0.001', '<dt>jax</dt>'):
    assert option in html


def test_runs_side_by_side(write_run, records, page):
  better = [r | {'router/max_violation': 0.25} for r in records]
  balancer = {'name': 'bip', 'iterations': 8}
  facts = {'run': 'a name', 'mesh': {'data': 2}}
  other = write_run('t8', records=better, balancer=balancer, facts=facts)
  tables = Page(page(write_run('t4'), other)).tables
  by_name = {row[0]: row[1:] for row in tables['Results']}
  assert by_name['result'] == ['t4', 't8']
  assert by_name['AvgMaxVio'] == ['0.583', '0.250 -0.333']
  assert by_name['perplexity, validation'] == ['20.12', '20.12 +0.00']
  settings = {row[0]: row[1:] for row in tables['Options and facts']}
  assert settings['balancer.iterations'] == ['4', '8']
  assert settings['facts.mesh.data'] == ['–', '2']
  assert 'learning_rate' not in settings and 'facts.run' not in settings


def test_runs_that_comparison_refuses(write_run, page):
  first = write_run('first', model={'layers': 2, 'experts': 4})
  second = write_run('second', model={'layers': 2, 'experts': 8})
  html = page(first, second)
  assert 'Not comparable in every respect:' in html
  assert 'model.experts: 4 and 8' in text_of(html)
  tables = Page(html).tables
  assert [row[0] for row in tables['Balance'][1:]] == ['first', 'second']
  assert ['model.experts', '4', '8'] in tables['Options and facts']


def test_unfinished_and_without_evaluations(write_run, records, page):
  bare = [
    {key: x for key, x in record.items() if not key.startswith('eval/')}
    for record in records[:2]
  ]
  html = page(write_run('going', records=bare))
  assert 'going is not finished: step 2 of 3.' in text_of(html)
  tables = Page(html).tables
  assert 'On validation' not in tables
  assert tables['Training'][1] == ['going', '7.500', '–', '–']


def test_seeds(write_run, records, page):
  workdirs = []
  for seed, scale in enumerate((1.0, 1.125)):
    scaled = [
      r | {'router/max_violation': scale * r['router/max_violation']}
      for r in records
    ]
    workdirs.append(
      write_run(f'seed_{seed}', records=scaled, method='bip', seed=seed)
    )
  html = page(*workdirs)
  tables = Page(html).tables
  assert tables['Balance, over seeds'][1][:3] == [
    'bip',
    '0.620 ± 0.052',
    '1.062 ± 0.088',
  ]
  assert 'One seed' not in html


def test_text_from_runs_is_text(write_run, page):
  """Names, options and facts that a page must not act on."""
  attack = '"><script>alert(1)</script><img src=x onerror=alert(2)>$\\frac{$'
  workdir = write_run(
    '_<script>alert(0)<',
    method=attack,
    data={'files': attack, attack: 1},
    facts={'device_kind': attack, 'not_evaluated': {attack: attack}},
  )
  html = page(workdir, write_run('other', method='</title><script>'))
  tags = Page(html).tags
  assert [tag for tag, _ in tags].count('script') == 1
  for tag, attributes in tags:
    assert not any(name.startswith('on') for name in attributes)
    assert tag != 'img' or attributes['src'].startswith('data:image/png')
  assert f'{attack}()' in [cells[1] for cells in Page(html).tables['Runs']]
  # Nothing else would run, were it there.
  (policy,) = (a['content'] for t, a in tags if 'http-equiv' in a)
  assert "default-src 'none'" in policy
  assert 'unsafe' not in policy


def test_runs_are_told_apart_by_their_paths(write_run, tmp_path, page):
  for place in ('a/x', 'b/x'):
    shutil.copytree(write_run(place.replace('/', '')), tmp_path / place)
  tables = Page(page(tmp_path / 'a' / 'x', tmp_path / 'b' / 'x')).tables
  assert [row[0] for row in tables['Runs'][1:]] == ['a/x', 'b/x']


def test_a_figure_that_cannot_be_drawn_says_why(write_run, records, page):
  for record in records:
    for layer in range(2):
      del record[f'router/load/layer_{layer:02d}']
  html = page(write_run('bare', records=records))
  assert re.search(r'Not drawn: .* has no router/load/layer_01', html)
  assert re.search(r'Not drawn: .* has no router/q/layer_01', html)
  assert re.search(r'Not drawn: .* has no router/sequence_violation', html)
  assert html.count('data:image/png') == len(pictures.PICTURES) - 3


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (shutil.rmtree, 'metrics.jsonl is missing: not a run'),
    (lambda w: (w / 'metrics.jsonl').write_text(''), 'no step is completed'),
    (lambda w: (w / 'run.json').write_text('{'), 'run.json: damaged, not JSON'),
    (
      lambda w: (w / 'metrics.jsonl').write_text('{"step": 1, "x": 2}\n'),
      'no run of this version, it has no train/loss',
    ),
  ],
)
def test_what_is_no_run_is_named(write_run, tmp_path, capsys, damage, message):
  good, bad = write_run('good'), write_run('bad')
  damage(bad)
  out = tmp_path / 'report.html'
  assert report.main([str(good), str(bad), f'--out={out}']) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert str(bad) in error and message in error
  assert not out.exists()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'required: workdir'),
    (['x', '--nothing'], 'unrecognized arguments: --nothing'),
  ],
)
def test_wrong_arguments_are_refused_in_one_line(capsys, arguments, message):
  assert report.main(arguments) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert message in error


@pytest.mark.parametrize('out', ['', 'missing/report.html'])
def test_out_must_be_a_file_to_be(write_run, tmp_path, capsys, out):
  assert report.main([str(write_run()), f'--out={tmp_path / out}']) == 2
  assert '--out=' in capsys.readouterr().err


def test_a_failure_leaves_the_page_that_was_there(
  write_run, tmp_path, monkeypatch, capsys
):
  out = tmp_path / 'report.html'
  out.write_text('before')

  def full(source, target):
    raise OSError(28, 'No space left on device', str(target))

  monkeypatch.setattr(pathlib.Path, 'replace', full)
  assert report.main([str(write_run('bip')), f'--out={out}']) == 2
  assert 'No space left on device' in capsys.readouterr().err
  assert out.read_text() == 'before'
  assert sorted(os.listdir(tmp_path)) == ['bip', 'report.html']


def test_figures_of_all_runs_and_of_each(write_run, page, monkeypatch):
  long = 'x' * 40
  names = {'a': '_a$b', 'b': long + '1', 'c': long + '2'}
  workdirs = [write_run(name, method=names[name]) for name in names]
  drawn = []

  def draw(of):
    drawn.append(of)
    return Figure()

  shown = (
    pictures.Picture('Together', draw, ''),
    pictures.Picture('Alone', draw, '', each=True),
  )
  monkeypatch.setattr(pictures, 'PICTURES', shown)
  html = page(*workdirs)
  together, *alone = drawn
  labels = ['_a$b()', f'2: …{"x" * 12}1()', f'3: …{"x" * 12}2()']
  assert list(together) == labels
  assert list(together.values()) == alone
  assert html.count('"data:image/png;base64,') == 4
  titles = re.findall('<h3>(.*?)</h3>\n<div', html)
  assert titles[:4] == ['Together', 'Alone: a', 'Alone: b', 'Alone: c']
  # Methods that are the same do not tell runs apart.
  page(write_run('d', method='bip'), write_run('e', method='bip'))
  assert list(drawn[4]) == ['d', 'e']


def test_texts_are_routed(write_run, route, tmp_path, capsys, monkeypatch):
  random = np.random.default_rng(0)

  def routed(run, text, step=None):
    scores = random.random((2, 60, 4))
    return route(scores, k=2, tokens=(text.split() * 60)[:60])

  monkeypatch.setattr(Run, 'route', routed)
  for name in ('laws', 'poems'):
    (tmp_path / f'{name}.txt').write_text(f'words of {name}')
  laws, poems = (f'--text={tmp_path / name}.txt' for name in ('laws', 'poems'))
  run = str(write_run())
  out = f'--out={tmp_path / "report.html"}'
  assert report.main([run, laws, poems, out]) == 0
  html = (tmp_path / 'report.html').read_text()
  for title in ('Domain specialization', 'Co-activation'):
    (shown,) = re.findall(f'<h3>{title}: bip</h3>\n<(.*?)[ >]', html)
    assert shown == 'div'
  assert 'has no two checkpoints' in text_of(html)
  monkeypatch.undo()
  assert report.main([run, laws, out]) == 0
  html = (tmp_path / 'report.html').read_text()
  assert html.count('there are none') == 2  # No checkpoint to route by.
  (tmp_path / 'bad.txt').write_bytes(b'\xff')
  bad = f'--text={tmp_path / "bad.txt"}'
  capsys.readouterr()
  for texts in ([bad], [laws, laws], [f'{bad}.gone']):
    assert report.main([run, *texts, out]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: --text=') and error.count('\n') == 1


def test_says_what_takes_long(write_run, tmp_path, monkeypatch):
  """On a terminal."""
  screen = io.StringIO()

  def console(*, stderr):
    assert stderr
    return Console(file=screen, force_terminal=True, _environ={})

  monkeypatch.setattr(report, 'Console', console)

  def slow(runs):
    while 'drawing Slowly' not in screen.getvalue():
      time.sleep(0.01)
    return Figure()

  shown = (pictures.Picture('Slowly', slow, ''),)
  monkeypatch.setattr(pictures, 'PICTURES', shown)
  out = tmp_path / 'report.html'
  assert report.main([str(write_run()), f'--out={out}']) == 0


@pytest.fixture
def chromium():
  """Opens pages in a browser; fails where there is none."""
  path = shutil.which('chromium') or shutil.which('chromium-browser')
  if path is None:
    pytest.fail('Chromium is not installed: apt-get install chromium')
  with sync_api.sync_playwright() as playwright:
    # Its sandbox does not work for root, and the page is ours.
    browser = playwright.chromium.launch(
      executable_path=path, args=['--no-sandbox']
    )
    yield browser
    browser.close()


# Elements, other than those that may be scrolled to, that end right of the
# screen.
OVERFLOWING = """
  Array.from(document.querySelectorAll('body *'))
    .filter((e) => !e.parentElement.closest('.scroll'))
    .filter((e) => e.getBoundingClientRect().right > window.innerWidth + 0.5)
    .map((e) => e.outerHTML.slice(0, 100))
"""


@pytest.mark.long
@pytest.mark.parametrize('width', [1280, 375])
def test_in_a_browser(write_run, spread, tmp_path, chromium, page, width):
  records = spread
  long = 'a_rather_long_name_for_a_run_' * 4 + 'x' * 60
  for record in records:
    record |= {f'router/q/layer_{i:02d}': [0.0, 0.1, 0.2, 0.3] for i in (0, 1)}
  better = [r | {'router/max_violation': 0.25} for r in records]
  page(
    write_run(long, records=records, data={'files': 'y' * 300}),
    write_run('<script>alert(1)', records=better[:2]),
    write_run('third', records=[*records[:2], records[2]], seed=1),
  )
  tab = chromium.new_page(viewport={'width': width, 'height': 900})
  trouble, requests = [], []
  tab.on('console', lambda message: trouble.append(message.text))
  tab.on('pageerror', lambda error: trouble.append(str(error)))
  tab.on('dialog', lambda dialog: trouble.append(dialog.message))
  tab.on('request', lambda request: requests.append(request.url))
  tab.goto((tmp_path / 'report.html').as_uri())
  tab.screenshot(path=tmp_path / f'report_{width}.png', full_page=True)
  assert pathlib.Path(tmp_path / f'report_{width}.png').stat().st_size > 50_000
  assert trouble == []
  schemes = {url.split(':')[0] for url in requests}
  assert schemes <= {'file', 'data'} and 'file' in schemes
  assert tab.evaluate('document.documentElement.scrollWidth') <= width
  assert tab.evaluate(OVERFLOWING) == []
  images = tab.evaluate(
    'Array.from(document.images, (i) => i.complete && i.naturalWidth > 0)'
  )
  # Prices are drawn of each of the three; there is no frontier of such runs.
  assert images == [True] * (len(pictures.PICTURES) + 2 - 1)
  # It would have been seen.
  tab.evaluate(
    "document.querySelector('h1').style.cssText = 'width: 3000px; color: red'"
  )
  assert tab.evaluate(OVERFLOWING) != []


@pytest.mark.long
def test_headings_sort(write_run, records, tmp_path, chromium, page):
  """By clicks and by the keyboard, numbers as numbers, the unknown last."""
  runs = {'b': 9.0, 'a': 10.0, 'd': None, 'c': 0.5}
  workdirs = []
  for name, value in runs.items():
    changed = [r | {'router/max_violation': value} for r in records]
    workdirs.append(write_run(name, records=changed))
  page(*workdirs)
  tab = chromium.new_page()
  tab.goto((tmp_path / 'report.html').as_uri())
  table = tab.locator('#balance table').first

  def names():
    return table.locator('tbody th').all_inner_texts()

  def sorted_by(heading):
    return table.locator('thead th', has_text=heading).first.get_attribute(
      'aria-sort'
    )

  assert names() == ['b', 'a', 'd', 'c']
  violation = table.get_by_role('button', name='AvgMaxVio').first
  violation.click()
  assert names() == ['c', 'b', 'a', 'd']
  assert sorted_by('AvgMaxVio') == 'ascending'
  violation.press('Enter')
  assert names() == ['a', 'b', 'c', 'd']
  assert sorted_by('AvgMaxVio') == 'descending'
  table.get_by_role('button', name='run').press('Space')
  assert names() == ['a', 'b', 'c', 'd']
  assert (sorted_by('AvgMaxVio'), sorted_by('run')) == (None, 'ascending')
