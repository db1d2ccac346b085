"""Corpora prepared from files of every kind, and read back lazily."""

import gzip
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
from pyarrow import ipc, parquet
import pytest

from moe_jax.data import parts as parts_lib
from moe_jax.data import prepare, prepared
from moe_jax.data.tokenizer import Tokenizer

TEXTS = [
  f'document {i}: ' + 'the load of experts ' * (i % 7) for i in range(60)
]
TEXTS[7] = 'naïve 😀 ' * 3


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
  path.write_text(Tokenizer.train(TEXTS, 300).to_json())
  return str(path)


def _jsonl(texts):
  return ''.join(json.dumps({'text': text}) + '\n' for text in texts).encode()


def write_kind(kind, folder):
  """Writes TEXTS as files of a kind; returns what --source names."""
  if kind == 'txt':
    for i, text in enumerate(TEXTS):
      (folder / f'{i:03d}.txt').write_text(text)
    return f'{folder}/*.txt'
  path = folder / f'all.{kind}'
  if kind == 'jsonl':
    path.write_bytes(_jsonl(TEXTS))
  elif kind == 'jsonl.gz':
    path.write_bytes(gzip.compress(_jsonl(TEXTS)))
  elif kind == 'jsonl.zst':
    zstandard = pytest.importorskip('zstandard')
    half = len(TEXTS) // 2  # Two frames.
    frames = (TEXTS[:half], TEXTS[half:])
    path.write_bytes(
      b''.join(zstandard.compress(_jsonl(texts)) for texts in frames)
    )
  elif kind == 'parquet':
    table = pa.table({'text': TEXTS, 'id': list(range(len(TEXTS)))})
    parquet.write_table(table, path, row_group_size=10)
  else:  # As the library `datasets` saves it.
    path = folder / 'data-00000-of-00001.arrow'
    table = pa.table({'text': TEXTS})
    with ipc.new_stream(str(path), table.schema) as stream:
      stream.write_table(table, max_chunksize=16)
    return str(folder)
  return str(path)


def documents(corpus, split):
  """Decodes a split, document by document."""
  tokens = corpus.splits[split][:]
  ends = np.flatnonzero(tokens == corpus.tokenizer.end_of_document)
  starts = [0, *(ends + 1)][: len(ends)]
  return [
    corpus.tokenizer.decode(tokens[start:end])
    for start, end in zip(starts, ends, strict=True)
  ]


@pytest.mark.parametrize(
  'kind', ['txt', 'jsonl', 'jsonl.gz', 'jsonl.zst', 'parquet', 'arrow']
)
def test_every_kind_of_source_gives_its_documents(
  kind, tokenizer, tmp_path, monkeypatch
):
  monkeypatch.setattr(parts_lib, 'PART_BYTES', 600)  # Several parts.
  (tmp_path / 'in').mkdir()
  source = write_kind(kind, tmp_path / 'in')
  corpus = prepare.prepare(
    source, tokenizer, str(tmp_path / 'out'), validation=0.25
  )
  train, validation = (documents(corpus, s) for s in ('train', 'validation'))
  # In the order of the source, none twice, each on its side by its hash alone.
  assert sorted(train + validation) == sorted(TEXTS)
  assert train == [text for text in TEXTS if text in set(train)]
  assert 5 < len(validation) < 25
  for name, texts in (('train', train), ('validation', validation)):
    split = corpus.manifest['splits'][name]
    assert split['documents'] == len(texts)
    assert split['bytes'] == sum(len(text.encode()) for text in texts)
    assert split['tokens'] == len(corpus.splits[name])
    size = corpus.tokenizer.token_bytes_V[corpus.splits[name][:]].sum()
    assert size == split['bytes']
  assert (
    len(corpus.splits['train'].shards) > 1 or 'z' in kind or kind == 'arrow'
  )
  corpus.splits['train'].verify()


def test_lines_are_divided_once_wherever_parts_end(tmp_path, monkeypatch):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(_jsonl(TEXTS))
  for size in (1, 37, 100, 10**6):
    monkeypatch.setattr(parts_lib, 'PART_BYTES', size)
    found = parts_lib.find_parts(str(path), 'text')
    texts = [text for part in found for text in parts_lib.read_part(part)]
    assert texts == TEXTS


@pytest.fixture(scope='module')
def whole(tokenizer, tmp_path_factory):
  """A corpus of several shards, and its tokens in one array."""
  folder = tmp_path_factory.mktemp('whole')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parts_lib, 'PART_BYTES', 900)
    patch.setattr(prepare, 'SHARD_TOKENS', 200)
    (folder / 'a.jsonl').write_bytes(_jsonl(TEXTS))
    corpus = prepare.prepare(
      str(folder / 'a.jsonl'), tokenizer, str(folder / 'out'), validation=0.0
    )
  assert len(corpus.splits['train'].shards) > 5
  return corpus, corpus.splits['train'][:].copy()


def test_tokens_are_indexed_like_an_array(whole):
  corpus, tokens = whole
  lazy = corpus.splits['train']
  assert len(lazy) == len(tokens)
  generator = np.random.default_rng(0)
  for _ in range(200):
    start, stop = sorted(generator.integers(0, len(tokens) + 1, 2))
    np.testing.assert_array_equal(lazy[start:stop], tokens[start:stop])
  places = generator.integers(0, len(tokens), (3, 5))
  np.testing.assert_array_equal(lazy[places], tokens[places])
  np.testing.assert_array_equal(lazy[10:3], [])
  np.testing.assert_array_equal(lazy[3:40:7], tokens[3:40:7])


def test_nothing_is_read_that_is_not_asked_for(whole, monkeypatch):
  corpus, tokens = whole
  fresh = prepared.Prepared(str(corpus.directory))
  opened = []
  init = prepared._File.__init__

  def watched(self, path, shard, dtype):
    opened.append(shard.file)
    init(self, path, shard, dtype)

  monkeypatch.setattr(prepared._File, '__init__', watched)
  lazy = fresh.splits['train']
  assert len(lazy) and not opened
  third = lazy.shards[0].tokens + lazy.shards[1].tokens
  lazy[third : third + 2]
  assert opened == [lazy.shards[2].file]


@pytest.mark.parametrize('damage', ['cut', 'flip', 'missing', 'table'])
def test_a_damaged_shard_is_named_when_it_is_read(whole, damage, tmp_path):
  corpus, tokens = whole
  copy = tmp_path / 'copy'
  copy.mkdir()
  for path in corpus.directory.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  lazy = prepared.Prepared(str(copy)).splits['train']
  shard = copy / lazy.shards[1].file
  data = bytearray(shard.read_bytes())
  if damage == 'missing':
    shard.unlink()
  else:
    data = data[:-1] if damage == 'cut' else data
    data[{'flip': 5, 'table': -2}.get(damage, 0)] ^= 1
    shard.write_bytes(data)
  first = lazy.shards[0].tokens
  np.testing.assert_array_equal(lazy[:first], tokens[:first])
  with pytest.raises(ValueError, match=f'{shard.name}: .*restore the shard'):
    lazy[first : first + 1]
  with pytest.raises(ValueError, match=shard.name):
    prepared.Prepared(str(copy)).splits['train'].verify()


def test_a_manifest_of_a_trillion_tokens_opens_at_once(whole, tmp_path):
  """And finds a sequence by arithmetic, though no other shard is there."""
  corpus, tokens = whole
  manifest = json.loads((corpus.directory / prepared.MANIFEST).read_text())
  shards = manifest['splits']['train']['shards']
  real = shards[0]
  absent = {**real, 'tokens': 1 << 25}
  many = [{**absent, 'file': f'train-{i}.tok'} for i in range(30_000)]
  manifest['splits']['train']['shards'] = [*many, real]
  (tmp_path / prepared.MANIFEST).write_text(json.dumps(manifest))
  for name in ('tokenizer.json', real['file']):
    (tmp_path / name).write_bytes((corpus.directory / name).read_bytes())
  lazy = prepared.Prepared(str(tmp_path)).splits['train']
  assert len(lazy) > 1e12
  start = 30_000 << 25
  np.testing.assert_array_equal(lazy[start : start + 50], tokens[:50])
  with pytest.raises(ValueError, match='train-7.tok'):
    lazy[7 << 25 : (7 << 25) + 5]


def _command(source, tokenizer, out, *more):
  return [
    sys.executable,
    '-m',
    'moe_jax.data.prepare',
    f'--source={source}',
    f'--tokenizer={tokenizer}',
    f'--out={out}',
    *more,
  ]


def _files(folder):
  return {
    path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()
  }


def test_what_was_finished_is_kept(tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr(parts_lib, 'PART_BYTES', 600)
  (tmp_path / 'a.jsonl').write_bytes(_jsonl(TEXTS))
  source = str(tmp_path / 'a.jsonl')
  prepare.prepare(source, tokenizer, str(tmp_path / 'undisturbed'))
  made = []
  make_part = prepare.make_part

  def failing(job, number):
    if len(made) % 4 == 3:
      made.append(None)
      raise OSError('a disk that is full')
    made.append(number)
    return make_part(job, number)

  monkeypatch.setattr(prepare, 'make_part', failing)

  def one_by_one(job, numbers):
    for number in numbers:
      prepare.make_part(job, number)

  for _ in range(30):
    try:
      out = str(tmp_path / 'out')
      prepare.prepare(source, tokenizer, out, run=one_by_one)
      break
    except OSError:
      continue
  numbers = [number for number in made if number is not None]
  assert None in made and sorted(numbers) == list(range(len(numbers)))
  assert _files(tmp_path / 'out') == _files(tmp_path / 'undisturbed')


@pytest.mark.long
def test_killed_ten_times_it_ends_as_if_undisturbed(tokenizer, tmp_path):
  for i in range(40):
    (tmp_path / f'{i:02d}.jsonl').write_bytes(_jsonl(TEXTS * 40))
  source = f'{tmp_path}/*.jsonl'
  subprocess.run(_command(source, tokenizer, tmp_path / 'one'), check=True)
  command = _command(source, tokenizer, tmp_path / 'two', '--workers=1')
  for kill in range(10):
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    before = time.monotonic()
    while time.monotonic() < before + 60 and process.poll() is None:
      if len(list((tmp_path / 'two').glob('part-*.json'))) > 3 * kill:
        break
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
  subprocess.run(command, check=True)
  assert _files(tmp_path / 'one') == _files(tmp_path / 'two')


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--tokenizer=bpe:9'], '--tokenizer=bpe:9: .* 257 or more'),
    (['--source=nowhere/*.txt'], r'--source=nowhere/\*.txt: no such file'),
    (['--source=.'], r'--source=.: a folder without .arrow files'),
    (['--source=a.csv'], '--source=a.csv: .*must end in .txt, .jsonl'),
    (['--source=bad.jsonl'], 'bad.jsonl: line at byte 0: invalid JSON'),
    (['--source=latin.txt'], 'latin.txt: byte 2 is not valid UTF-8'),
    (['--source=short.parquet'], 'short.parquet: damaged'),
    (
      ['--source=good.parquet', '--text_field=body'],
      'good.parquet: no column --text_field=body; it has text, n',
    ),
    (
      ['--source=good.parquet', '--text_field=n'],
      'good.parquet: column n is of int64, not of strings',
    ),
    (['--source=cut.txt.gz'], 'cut.txt.gz: damaged gzip file'),
    (['--source=empty.txt'], '--source=empty.txt: holds no text'),
    (['--tokenizer=missing.json'], '--tokenizer=missing.json: cannot be read'),
    (['--tokenizer=bad.jsonl'], '--tokenizer=bad.jsonl: not a tokenizer.json'),
    (['--validation=1.5'], '--validation=1.5: must be in'),
    (['--validation=x'], 'invalid float value'),
    (['--colour=red'], '--colour=red: unknown'),
    (['--out='], '--out=...: missing'),
    (['--out=full'], '--out=full: is not empty'),
  ],
)
def test_bad_input_is_refused_in_a_line(
  flags, words, tokenizer, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  pathlib.Path('good.txt').write_text('some text')
  pathlib.Path('empty.txt').write_text('')
  pathlib.Path('a.csv').write_text('a,b')
  pathlib.Path('bad.jsonl').write_text('{"text": ')
  pathlib.Path('latin.txt').write_bytes(b'na\xefve')
  pathlib.Path('cut.txt.gz').write_bytes(gzip.compress(b'text' * 99)[:-9])
  parquet.write_table(pa.table({'text': ['a'], 'n': [1]}), 'good.parquet')
  data = pathlib.Path('good.parquet').read_bytes()
  pathlib.Path('short.parquet').write_bytes(data[: len(data) // 2])
  pathlib.Path('full').mkdir()
  pathlib.Path('full/file').write_text('')
  flags = {
    '--source': 'good.txt',
    '--tokenizer': tokenizer,
    '--out': 'out',
  } | dict(flag.split('=', 1) for flag in flags)
  argv = ['prepare', *(f'{name}={value}' for name, value in flags.items())]
  assert prepare.main(argv) == 2
  out, err = capsys.readouterr()
  assert not out
  lines = [line for line in err.splitlines() if not line.startswith('data:')]
  assert len(lines) == 1 and re.search(words, lines[0]), err
  assert not os.path.exists('out/manifest.json')


def test_another_preparation_is_not_mixed_in(tokenizer, tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('some text')
  out = str(tmp_path / 'out')
  first = prepare.prepare(str(path), tokenizer, out)
  assert prepare.prepare(str(path), tokenizer, out).manifest == first.manifest
  with pytest.raises(ValueError, match='another validation; give another dir'):
    prepare.prepare(str(path), tokenizer, out, validation=0.5)
  path.write_text('some other text')
  with pytest.raises(ValueError, match='prepared with another source'):
    prepare.prepare(str(path), tokenizer, out)


def test_a_tokenizer_is_learnt_from_a_sample(tmp_path, monkeypatch):
  monkeypatch.setattr(parts_lib, 'PART_BYTES', 600)
  (tmp_path / 'a.jsonl').write_bytes(_jsonl(TEXTS))
  corpus = prepare.prepare(
    str(tmp_path / 'a.jsonl'), 'bpe:290', str(tmp_path / 'out')
  )
  assert corpus.tokenizer.vocabulary == 290
  both = documents(corpus, 'train') + documents(corpus, 'validation')
  assert sorted(both) == sorted(TEXTS)


def test_a_corpus_is_verified_as_a_whole(whole, tmp_path, capsys):
  corpus, tokens = whole
  argv = ['prepare', '--verify', f'--out={corpus.directory}']
  assert prepare.main(argv) == 0
  assert f'{len(tokens)} tokens' in capsys.readouterr().out
  copy = tmp_path / 'copy'
  copy.mkdir()
  for path in corpus.directory.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  last = copy / corpus.splits['train'].shards[-1].file
  last.write_bytes(b'?' + last.read_bytes()[1:])
  assert prepare.main(['prepare', '--verify', f'--out={copy}']) == 2
  assert last.name in capsys.readouterr().err
