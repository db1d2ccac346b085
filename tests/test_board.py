"""`make board` shows runs, to this machine only."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
import urllib.request

import pytest

from moe_jax.runs import events
from tests import test_security
from tests.several_processes import ROOT


def family(process: int) -> list[int]:
  """Returns a process and its children, their children and so on."""
  children = pathlib.Path(f'/proc/{process}/task/{process}/children')
  return [process] + [
    member
    for child in children.read_text().split()
    for member in family(int(child))
  ]


def recipe(runs: pathlib.Path) -> list[str]:
  """Returns the command of `make board`."""
  # Within another make, these would have this one print more than the recipe.
  of_make = ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS')
  outside = {k: v for k, v in os.environ.items() if k not in of_make}
  lines = subprocess.run(
    ['make', '-n', '-o', '.venv/installed', 'board', f'RUNS={runs}'],
    cwd=ROOT,
    env=outside,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  return shlex.split(lines)


def test_the_recipe_is_found_within_make(tmp_path, monkeypatch):
  alone = recipe(tmp_path)
  assert alone[0].endswith('tensorboard')
  monkeypatch.setenv('MAKELEVEL', '1')
  monkeypatch.setenv('MAKEFLAGS', 'w')
  assert recipe(tmp_path) == alone


@pytest.fixture
def board(tmp_path):
  """Runs what `make board` runs; yields the process and its address."""
  process = subprocess.Popen(
    [*recipe(tmp_path), '--port=0'],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    said = ''
    for line in process.stderr:
      said += line
      if found := re.search(r'TensorBoard \S+ at (http://\S+)', line):
        yield process.pid, found[1]
        break
    else:
      pytest.fail(f'no address: {said}')
  finally:
    process.terminate()
    process.communicate()


def get(url: str):
  with urllib.request.urlopen(url, timeout=60) as answer:
    return json.load(answer)


@pytest.mark.long
@pytest.mark.skipif(
  sys.platform != 'linux', reason='reads what Linux says of its processes'
)
def test_board(tmp_path, board):
  (tmp_path / 'bip').mkdir()
  text = events.describe('bip seed 0', {'balancer': {'name': 'bip'}}, {})
  writer = events.Events(tmp_path / 'bip', step=0, steps=1, text=text)
  writer.show({'step': 1, 'train/loss': 7.0, 'router/load/layer_00': [1, 3]})
  writer.close()
  process, url = board
  assert url.startswith('http://127.0.0.1:')
  listening = set().union(*map(test_security.listening, family(process)))
  assert '127.0.0.1' in listening
  assert listening <= {'127.0.0.1', '::1'}
  plugins = ('scalars', 'histograms', 'text')
  shown = dict.fromkeys(plugins)
  for _ in range(120):  # It looks every few seconds.
    shown = {name: get(f'{url}data/plugin/{name}/tags') for name in plugins}
    if all(shown.values()):
      break
    time.sleep(0.5)
  assert list(shown['scalars']['bip']) == ['train/loss']
  assert list(shown['histograms']['bip']) == ['router/load/layer_00']
  assert shown['text'] == {'bip': ['run/text_summary']}
  page = f'{url}data/plugin/text/text?run=bip&tag=run/text_summary'
  assert '<h1>bip seed 0</h1>' in get(page)[0]['text']
