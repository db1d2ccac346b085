"""A gigabyte of text: memory that is bounded, and ten kills."""

import json

import pytest

from moe_jax.data import parts
from moe_jax.data.sotu import sotu_files
from tests.data import killing

SIZE = 10**9
KILLS = 10
MEMORY = 1.5e9


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
def test_killed_ten_times_it_ends_as_if_undisturbed(source, tmp_path):
  killed, memory = killing.kill_and_resume(
    tmp_path, source, 'bpe:32000', KILLS, parts.PART_BYTES
  )
  assert killed == KILLS
  assert memory < MEMORY
