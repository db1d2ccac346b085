"""Corpora prepared from files of every kind, and read back lazily."""

from concurrent import futures
import gzip
import json
import os
import pathlib
import re

from etils import epath
import fsspec
import numpy as np
import pyarrow as pa
from pyarrow import ipc, parquet
import pytest
import tokenizers
import zstandard

from moe_jax import data
from moe_jax.data import parts as parts_lib
from moe_jax.data import prepare, prepared
from moe_jax.data.tokenizer import Tokenizer
from tests import buckets
from tests.data import killing
from tests.data.killing import files

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


def write_kind(kind, folder, texts=TEXTS):
  """Writes texts as files of a kind; returns what --source names."""
  if kind == 'txt':
    for i, text in enumerate(texts):
      (folder / f'{i:03d}.txt').write_text(text)
    return f'{folder}/*.txt'
  path = folder / f'all.{kind}'
  if kind == 'jsonl':
    path.write_bytes(_jsonl(texts))
  elif kind == 'jsonl.gz':
    path.write_bytes(gzip.compress(_jsonl(texts)))
  elif kind == 'jsonl.zst':
    half = len(texts) // 2  # Two frames.
    frames = (texts[:half], texts[half:])
    path.write_bytes(
      b''.join(zstandard.compress(_jsonl(frame)) for frame in frames)
    )
  elif kind == 'parquet':
    table = pa.table({'text': texts, 'id': list(range(len(texts)))})
    parquet.write_table(table, path, row_group_size=10)
  else:  # As the library `datasets` saves it.
    path = folder / 'data-00000-of-00001.arrow'
    table = pa.table({'text': texts})
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
  one_part = 'z' in kind or kind == 'arrow'
  assert (len(corpus.splits['train'].shards) > 1) != one_part
  assert not list(corpus.splits['train'].damage())
  # Nothing else is left there.
  shards = {x.file for split in corpus.splits.values() for x in split.shards}
  assert set(files(tmp_path / 'out')) == shards | {
    'manifest.json',
    'tokenizer.json',
  }


@pytest.mark.parametrize('kind', ['jsonl', 'jsonl.gz', 'parquet', 'arrow'])
def test_a_text_that_is_null_is_skipped(kind, tmp_path):
  source = write_kind(kind, tmp_path, ['first', None, 'last'])
  (part,) = parts_lib.find_parts(source, 'text')
  assert list(parts_lib.read_part(part, 'text')) == ['first', 'last']


def test_small_files_are_a_part_together(tokenizer, tmp_path, monkeypatch):
  """Or a source of a million files would make a million shards."""
  (tmp_path / 'in').mkdir()
  source = write_kind('txt', tmp_path / 'in')
  found = parts_lib.find_parts(f'{source},{tmp_path}/in/007.txt', 'text')
  assert [len(part) for part in found] == [len(TEXTS)]  # None is read twice.
  monkeypatch.setattr(parts_lib, 'PART_BYTES', 300)
  found = parts_lib.find_parts(source, 'text')
  assert 5 < len(found) < 30
  texts = [x for part in found for x in parts_lib.read_part(part, 'text')]
  assert texts == TEXTS


def test_caches_of_datasets_are_not_read(tmp_path):
  source = write_kind('arrow', tmp_path)
  (data,) = tmp_path.glob('*.arrow')
  (tmp_path / 'cache-0123.arrow').write_bytes(data.read_bytes())
  (tmp_path / 'state.json').write_text(
    json.dumps({'_data_files': [{'filename': data.name}]})
  )
  (part,) = parts_lib.find_parts(source, 'text')
  assert list(parts_lib.read_part(part, 'text')) == TEXTS


def test_long_documents_are_encoded_in_stretches(tmp_path, monkeypatch):
  """Whose tokens are those of the whole, where there are words."""
  monkeypatch.setattr('moe_jax.data.tokenizer.STRETCH', 100)
  texts = [
    'the load of experts, and more \u00e9 of it.\n\n' * 40,
    'x' * 730,
    '\u4e2d\u6587' * 400,
  ]
  (tmp_path / 'a.jsonl').write_bytes(_jsonl(texts))
  words = tokenizers.Tokenizer(
    tokenizers.models.WordPiece({'the': 0, 'load': 1, '[UNK]': 2})
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  words.save(str(tmp_path / 'words.json'))
  (tmp_path / 'bytes.json').write_text(Tokenizer.train(texts, 300).to_json())
  for name in ('bytes', 'words'):
    corpus = prepare.prepare(
      str(tmp_path / 'a.jsonl'),
      str(tmp_path / f'{name}.json'),
      str(tmp_path / name),
      validation=0.0,
    )
    tokens = corpus.splits['train'][:]
    end = corpus.tokenizer.end_of_document
    first = tokens[: np.flatnonzero(tokens == end)[0]]
    np.testing.assert_array_equal(first, corpus.tokenizer.encode(texts[0]))
    if name == 'bytes':
      assert documents(corpus, 'train') == texts
    assert np.sum(tokens == end) == len(texts)


# --- Buckets -----------------------------------------------------------------


def test_from_a_bucket_to_a_bucket(tokenizer, tmp_path, monkeypatch):
  """Sources, tokenizer and corpus; killed in between."""
  monkeypatch.setattr(parts_lib, 'PART_BYTES', 600)
  (tmp_path / 'in').mkdir()
  bucket = buckets.empty()
  for kind in ('jsonl', 'jsonl.gz', 'parquet'):
    write_kind(kind, tmp_path / 'in')
    bucket.pipe(f'/b/in/all.{kind}', (tmp_path / f'in/all.{kind}').read_bytes())
  bucket.pipe('/b/tokenizer.json', pathlib.Path(tokenizer).read_bytes())
  arguments = 'gs://b/in/*', 'gs://b/tokenizer.json', 'gs://b/out'

  def failing(make, numbers, total):
    for number in numbers[:3]:
      make(number)
    raise OSError('killed')

  with pytest.raises(OSError, match='killed'):
    prepare.prepare(*arguments, run=failing)

  def one_by_one(make, numbers, total):
    assert len(numbers) == total - 3
    for number in numbers:
      make(number)

  corpus = prepare.prepare(*arguments, run=one_by_one)
  here = prepare.prepare(
    f'{tmp_path}/in/*', tokenizer, str(tmp_path / 'out'), run=None
  )
  corpus.check_files()
  for name, split in here.splits.items():
    np.testing.assert_array_equal(corpus.splits[name][:], split[:])
  there, local = (
    data.training_batches(
      [data.Source('x', each.splits['train'])],
      sequence_length=16,
      batch_size=4,
      seed=0,
    )
    for each in (corpus, here)
  )
  for _ in range(40):
    np.testing.assert_array_equal(next(there)['inputs'], next(local)['inputs'])
  kept = {path.rpartition('/')[2] for path in bucket.find('/b/out')}
  assert kept == set(files(tmp_path / 'out'))
  bucket.pipe(f'/b/out/{corpus.splits["train"].shards[0].file}', b'short')
  damaged = prepared.Prepared('gs://b/out')
  with pytest.raises(ValueError, match='gs://b/out/train-00000.*5 bytes'):
    damaged.check_files()
  with pytest.raises(ValueError, match='gs://b/out/train-00000.*too early'):
    damaged.splits['train'][:9]


@pytest.mark.parametrize('kind', ['jsonl', 'jsonl.zst', 'parquet', 'txt'])
def test_addresses_of_fsspec_are_sources(kind, tmp_path, monkeypatch):
  monkeypatch.setattr(parts_lib, 'PART_BYTES', 600)
  source = write_kind(kind, tmp_path)
  memory = fsspec.filesystem('memory')
  for path in tmp_path.iterdir():
    memory.pipe(f'/{kind}/{path.name}', path.read_bytes())
  for address in (f'memory://{kind}/*', f'file://{source}'):
    found = parts_lib.find_parts(address, 'text')
    assert all('://' in piece.path for part in found for piece in part) == (
      'memory' in address
    )
    texts = [x for part in found for x in parts_lib.read_part(part, 'text')]
    assert texts == TEXTS


# --- Apache Beam -------------------------------------------------------------


def test_beam_makes_the_same_bytes(tokenizer, tmp_path, monkeypatch, capsys):
  pytest.importorskip('apache_beam')
  monkeypatch.setattr(parts_lib, 'PART_BYTES', 600)
  (tmp_path / 'a.jsonl').write_bytes(_jsonl(TEXTS))
  source = str(tmp_path / 'a.jsonl')
  prepare.prepare(source, tokenizer, str(tmp_path / 'threads'))
  argv = ['prepare', f'--source={source}', f'--tokenizer={tokenizer}']
  argv += [f'--out={tmp_path}/beam', '--beam', '--runner=DirectRunner']
  assert prepare.main(argv) == 0
  assert files(tmp_path / 'threads') == files(tmp_path / 'beam')
  (tmp_path / 'a.jsonl').write_text('{"text":')
  argv[3] = f'--out={tmp_path}/bad'
  capsys.readouterr()
  assert prepare.main(argv) == 2
  last = capsys.readouterr().err.splitlines()[-1]
  assert last.startswith('error: ') and 'a.jsonl: line at byte 0' in last


def test_lines_are_divided_once_wherever_parts_end(tmp_path, monkeypatch):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(_jsonl(TEXTS))
  for size in (1, 37, 100, 10**6):
    monkeypatch.setattr(parts_lib, 'PART_BYTES', size)
    found = parts_lib.find_parts(str(path), 'text')
    texts = [x for part in found for x in parts_lib.read_part(part, 'text')]
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


def test_no_shard_is_kept_open(whole):
  """A mixture may have more than a process may open."""
  corpus, tokens = whole
  lazy = prepared.Prepared(str(corpus.directory)).splits['train']
  before = os.listdir('/proc/self/fd')
  np.testing.assert_array_equal(lazy[:], tokens)
  assert len(os.listdir('/proc/self/fd')) <= len(before)


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
  with pytest.raises(ValueError, match=f'{shard.name}: .*restore it from'):
    lazy[first : first + 1]
  (line,) = prepared.Prepared(str(copy)).splits['train'].damage()
  assert shard.name in line


def test_a_manifest_of_a_trillion_tokens_opens_at_once(whole, tmp_path):
  """And finds a sequence by arithmetic, though no other shard is there."""
  corpus, tokens = whole
  real = corpus.splits['train'].shards[0]._asdict()
  absent = {**real, 'tokens': 1 << 25}
  many = [{**absent, 'file': f'train-{i}.tok'} for i in range(30_000)]
  train = {**corpus.manifest['splits']['train'], 'shards': [*many, real]}
  splits = {**corpus.manifest['splits'], 'train': train}
  prepared.write_json(
    epath.Path(tmp_path) / prepared.MANIFEST,
    {**corpus.manifest, 'splits': splits},
  )
  for name in ('tokenizer.json', real['file']):
    (tmp_path / name).write_bytes((corpus.directory / name).read_bytes())
  lazy = prepared.Prepared(str(tmp_path)).splits['train']
  assert len(lazy) > 1e12
  start = 30_000 << 25
  np.testing.assert_array_equal(lazy[start : start + 50], tokens[:50])
  with pytest.raises(ValueError, match='train-7.tok'):
    lazy[7 << 25 : (7 << 25) + 5]


def test_what_was_finished_is_kept(tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr(parts_lib, 'PART_BYTES', 600)
  (tmp_path / 'a.jsonl').write_bytes(_jsonl(TEXTS))
  source = str(tmp_path / 'a.jsonl')
  prepare.prepare(source, tokenizer, str(tmp_path / 'undisturbed'))
  made = []

  def one_by_one(make, numbers, total):
    assert len(numbers) == total - sum(number is not None for number in made)
    for number in numbers:
      if len(made) % 4 == 3:
        made.append(None)
        raise OSError('a disk that is full')
      make(number)
      made.append(number)

  for _ in range(30):
    try:
      out = str(tmp_path / 'out')
      prepare.prepare(source, tokenizer, out, run=one_by_one)
      break
    except OSError:
      continue
  numbers = [number for number in made if number is not None]
  assert None in made and sorted(numbers) == list(range(len(numbers)))
  assert files(tmp_path / 'out') == files(tmp_path / 'undisturbed')


@pytest.mark.long
def test_killed_it_ends_as_if_undisturbed(tokenizer, tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(_jsonl(TEXTS * 20))
  source = tmp_path / 'a.jsonl'
  killed, _ = killing.kill_and_resume(tmp_path, source, tokenizer, 2, 2000)
  assert killed == 2


def test_one_process_prepares_and_another_is_told(tokenizer, tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(_jsonl(TEXTS * 20))
  source = str(tmp_path / 'a.jsonl')
  alone = prepare.prepare(source, tokenizer, str(tmp_path / 'alone'))
  out = tmp_path / 'out'
  both = [killing.start(source, tokenizer, out, 4000) for _ in range(2)]
  ends = [(process.communicate()[1], process.returncode) for process in both]
  assert 0 in [code for _, code in ends]
  for errors, code in ends:
    if code:  # Or the first was done before the second began.
      assert code == 2 and 'another process prepares it; wait' in errors
      assert len(errors.splitlines()) == 1
  tokens = prepared.Prepared(str(out)).splits['train']
  np.testing.assert_array_equal(tokens[:], alone.splits['train'][:])


def test_a_process_that_prepares_keeps_others_out(tokenizer, tmp_path):
  (tmp_path / 'a.txt').write_text('some text')
  arguments = str(tmp_path / 'a.txt'), tokenizer, str(tmp_path / 'out')

  def meanwhile(make, numbers, total):
    with pytest.raises(ValueError, match='another process prepares it'):
      prepare.prepare(*arguments)
    for number in numbers:
      make(number)

  prepare.prepare(*arguments, run=meanwhile)
  prepare.prepare(*arguments)


def test_a_part_may_be_made_twice_at_once(tokenizer, tmp_path, monkeypatch):
  """As engines do that start a slow part anew, or two processes in a bucket."""
  monkeypatch.setattr(parts_lib, 'PART_BYTES', 2000)
  (tmp_path / 'a.jsonl').write_bytes(_jsonl(TEXTS))
  source = str(tmp_path / 'a.jsonl')
  prepare.prepare(source, tokenizer, str(tmp_path / 'one'))

  def twice(make, numbers, total):
    with futures.ThreadPoolExecutor(8) as pool:
      list(pool.map(make, numbers * 4))

  prepare.prepare(source, tokenizer, str(tmp_path / 'two'), run=twice)
  assert files(tmp_path / 'one') == files(tmp_path / 'two')


def _write_bad_files():
  for name, values in (
    ('null', pa.array([None, None])),
    ('list', pa.array([['a'], ['b']])),
    ('rows', pa.array([b'fine', b'b\xff']).view(pa.string())),
  ):
    parquet.write_table(pa.table({'text': values}), f'{name}.parquet')
  packed = zstandard.compress(_jsonl(TEXTS))
  pathlib.Path('cut.jsonl.zst').write_bytes(packed[:-9])
  pathlib.Path('field.jsonl').write_text('{"body": "a"}')
  pathlib.Path('splits').mkdir()
  splits = json.dumps({'splits': ['train', 'test']})
  pathlib.Path('splits/dataset_dict.json').write_text(splits)
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}))
  words.save('words.json')


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
    (['--out=good.txt'], '--out=good.txt: .*File exists'),
    (['--out=ftp://host/x'], '--out=ftp://host/x: must be a directory'),
    (['--workers=-1'], '--workers=-1: must be 0 or more'),
    (['--tokenizer=bpe:99999999'], '--tokenizer=bpe:99999999: .* or less'),
    (['--tokenizer=bpe:\u00b2'], '--tokenizer=bpe:.*257 or more'),
    (['--tokenizer=ftp://host/x'], '--tokenizer=ftp://host/x: must be'),
    (['--tokenizer=words.json'], 'good.txt: the tokenizer fails: .*UNK'),
    (['--source=null.parquet'], 'null.parquet: column text is of null'),
    (['--source=list.parquet'], 'list.parquet: column text is of list'),
    (
      ['--source=rows.parquet'],
      'rows.parquet: row group 0, rows from 0 on: .*UTF8',
    ),
    (['--source=cut.jsonl.zst'], 'cut.jsonl.zst: .*it ends too early'),
    (['--source=zip://a.txt::b.zip'], 'chained addresses are not read'),
    (['--source=nowhere://b/a.txt'], '--source=nowhere://b/a.txt: .*nowhere'),
    (['--source=good.txt,bad.jsonl'], 'bad.jsonl: line at byte 0: invalid'),
    (['--source=field.jsonl'], 'no field --text_field.*=text; .* has .body'),
    (['--source=splits'], 'has the splits train, test; .* as splits/train'),
    (['--source=,'], '--source=,: names no file'),
    (['--verify', '--out=nowhere'], 'error: --out=nowhere: no prepared corpus'),
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
  good = pathlib.Path('good.parquet').read_bytes()
  pathlib.Path('short.parquet').write_bytes(good[: len(good) // 2])
  pathlib.Path('full').mkdir()
  pathlib.Path('full/file').write_text('')
  _write_bad_files()
  flags = {
    '--source': 'good.txt',
    '--tokenizer': tokenizer,
    '--out': 'out',
  } | dict(flag.split('=', 1) for flag in flags if '=' in flag)
  argv = ['prepare', *(f'{name}={value}' for name, value in flags.items())]
  argv += ['--verify'] * ('--out=nowhere' in argv)
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
  with pytest.raises(ValueError, match='prepared with another content'):
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
  shards = [copy / shard.file for shard in corpus.splits['train'].shards]
  shards[0].write_bytes(b'?' + shards[0].read_bytes()[1:])
  shards[3].unlink()
  assert prepare.main(['prepare', '--verify', f'--out={copy}']) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 2
  assert shards[0].name in lines[0] and shards[3].name in lines[1]
