"""Whatever is damaged is told by name, and never read as something else."""

import errno
import gzip
import json
import os
import pathlib
import shutil

import fsspec
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
from pyarrow import ipc, parquet
import pytest
import tokenizers

from moe_jax import data, storage
from moe_jax.data import parts as parts_lib
from moe_jax.data import prepare, prepared
from moe_jax.data.tokenizer import Tokenizer

TEXTS = [f'document {i}: ' + 'naïve loads ' * (i % 9) for i in range(1, 40)]
TRIED = hypothesis.settings(
  deadline=None,
  suppress_health_check=list(hypothesis.HealthCheck),
  max_examples=60,
  derandomize=True,
)
FEWER = hypothesis.settings(TRIED, max_examples=25)


def write_corpus(folder, texts, tokenizer):
  """Prepares a corpus of several shards."""
  folder.mkdir(parents=True)
  lines = [json.dumps({'text': text}) for text in texts]
  (folder / 'a.jsonl').write_text('\n'.join(lines))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parts_lib, 'PART_BYTES', 1500)
    patch.setattr(prepare, 'SHARD_TOKENS', 300)
    out = str(folder / f'{folder.name}_tokens')
    source = str(folder / 'a.jsonl')
    return prepare.prepare(source, tokenizer, out, validation=0.2)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp('a') / 'b', TEXTS, 'bpe:290')


def everything(directory):
  """Reads all that a corpus says."""
  found = prepared.Prepared(str(directory))
  tokens = {name: split[:] for name, split in found.splits.items()}
  return tokens, found.tokenizer.to_json(), found.manifest


def damage(draw, content, others):
  """Draws what may come of a file: its new bytes, or None if it is lost."""
  kind = draw(
    st.sampled_from(['flip', 'cut', 'zero', 'insert', 'drop', 'other', 'lost'])
  )
  if kind == 'lost':
    return None
  if kind == 'other':
    return draw(st.sampled_from(others))
  start = draw(st.integers(0, max(len(content) - 1, 0)))
  stop = min(len(content), start + draw(st.integers(1, 100)))
  changed = bytearray(content)
  if kind == 'flip':
    for place in range(start, min(start + 1, len(content))):
      changed[place] ^= draw(st.integers(1, 255))
  elif kind == 'cut':
    del changed[start:]
  elif kind == 'zero':
    changed[start:stop] = bytes(stop - start)
  elif kind == 'insert':
    changed[start:start] = draw(st.binary(min_size=1, max_size=9))
  else:
    del changed[start:stop]
  return bytes(changed)


@TRIED
@hypothesis.given(st.data())
def test_a_damaged_corpus_is_told_or_reads_as_before(corpus, data):
  tokens, tokenizer, manifest = everything(corpus.directory)
  files = sorted(pathlib.Path(corpus.directory).iterdir())
  assert len(files) >= 8
  contents = {file: file.read_bytes() for file in files}
  file = data.draw(st.sampled_from(files))
  changed = damage(data.draw, contents[file], list(contents.values()))
  try:
    file.unlink()
    if changed is not None:
      file.write_bytes(changed)
    try:
      found = everything(corpus.directory)
    except ValueError as error:
      assert file.name in str(error) and '\n' not in str(error)
      assert 'restore it' in str(error) or 'makes one' in str(error)
    else:
      assert found[1:] == (tokenizer, manifest)
      for name, expected in tokens.items():
        np.testing.assert_array_equal(found[0][name], expected)
  finally:
    file.write_bytes(contents[file])


def test_every_field_of_a_manifest_is_checked(corpus, tmp_path):
  copy = shutil.copytree(corpus.directory, tmp_path / 'copy')
  written = json.loads((copy / 'manifest.json').read_text())

  def places(value, place=()):
    yield place
    if isinstance(value, (dict, list)):
      keys = value if isinstance(value, dict) else range(len(value))
      for key in keys:
        yield from places(value[key], (*place, key))

  for place in list(places(written))[1:]:
    for bad in (None, -1.5, 'x', {}, 10**30):
      changed = json.loads(json.dumps(written))
      group = changed
      for key in place[:-1]:
        group = group[key]
      if group[place[-1]] == bad:
        continue
      group[place[-1]] = bad
      (copy / 'manifest.json').write_text(json.dumps(changed))
      with pytest.raises(ValueError, match='manifest.json: .*restore it'):
        prepared.Prepared(str(copy))


@FEWER
@hypothesis.given(st.data())
def test_a_damaged_preparation_is_told_or_ends_as_it_should(corpus, data):
  """What is there when a part is missing: the job, shards and records."""
  folder = corpus.directory.parent
  out = pathlib.Path(folder) / 'unfinished'
  arguments = str(folder / 'a.jsonl'), 'bpe:290', str(out)

  def all_but_one(make, numbers, total):
    for number in numbers[1:]:
      make(number)
    raise OSError('killed')

  def one_by_one(make, numbers, total):
    for number in numbers:
      make(number)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parts_lib, 'PART_BYTES', 1500)
    patch.setattr(prepare, 'SHARD_TOKENS', 300)
    try:
      with pytest.raises(OSError, match='killed'):
        prepare.prepare(*arguments, validation=0.2, run=all_but_one)
      files = sorted(out.iterdir())
      file = data.draw(st.sampled_from(files))
      changed = damage(
        data.draw, file.read_bytes(), [x.read_bytes() for x in files]
      )
      file.unlink()
      if changed is not None:
        file.write_bytes(changed)
      prepare._opened.cache_clear()  # As in another process.
      try:
        prepare.prepare(*arguments, validation=0.2, run=one_by_one)
        found = everything(out)
      except ValueError as error:
        assert file.name in str(error) or file.name == 'job.json'
      else:
        for name, expected in everything(corpus.directory)[0].items():
          np.testing.assert_array_equal(found[0][name], expected)
    finally:
      shutil.rmtree(out)


# --- Sources -----------------------------------------------------------------


def _arrow():
  table = pa.table({'text': TEXTS})
  written = pa.BufferOutputStream()
  with ipc.new_stream(written, table.schema) as stream:
    stream.write_table(table, max_chunksize=8)
  return written.getvalue().to_pybytes()


def _parquet():
  written = pa.BufferOutputStream()
  parquet.write_table(
    pa.table({'text': TEXTS}),
    written,
    row_group_size=9,
    write_page_checksum=True,
  )
  return written.getvalue().to_pybytes()


def _zst(content):
  zstandard = pytest.importorskip('zstandard')
  compressor = zstandard.ZstdCompressor(write_checksum=True)
  return compressor.compress(content[:900]) + compressor.compress(content[900:])


LINES = '\n'.join(json.dumps({'text': text}) for text in TEXTS).encode()
SOURCES = {
  'a.txt': lambda: '\n'.join(TEXTS).encode(),
  'a.jsonl': lambda: LINES,
  'a.jsonl.gz': lambda: gzip.compress(LINES, mtime=0),
  'a.jsonl.zst': lambda: _zst(LINES),
  'a.parquet': _parquet,
  'a.arrow': _arrow,
}


def read(path):
  return [
    text
    for part in parts_lib.find_parts(str(path), 'text')
    for text in parts_lib.read_part(part, 'text')
  ]


@pytest.mark.parametrize('name', SOURCES)
@FEWER
@hypothesis.given(data=st.data())
def test_a_damaged_source_is_told_in_a_line(name, tmp_path_factory, data):
  path = tmp_path_factory.getbasetemp() / name
  content = SOURCES[name]()
  path.write_bytes(content)
  expected = read(path)
  changed = damage(data.draw, content, [b'', b'\n', SOURCES['a.txt']()])
  path.unlink()
  if changed is not None:
    path.write_bytes(changed)
  try:
    found = read(path)
  except ValueError as error:
    assert name in str(error)
  else:
    # The others have no checksums, or of pages only.
    checked = name in ('a.jsonl.gz', 'a.jsonl.zst')
    assert not checked or found == expected


@pytest.mark.parametrize(
  'name', ['a.jsonl.gz', 'a.jsonl.zst', 'a.parquet', 'a.arrow']
)
def test_what_was_cut_off_is_refused_wherever_it_ends(name, tmp_path):
  content = SOURCES[name]()
  for size in range(1, len(content), 7):
    (tmp_path / name).write_bytes(content[:size])
    with pytest.raises(ValueError, match=name):
      read(tmp_path / name)


def test_a_source_that_changes_meanwhile_is_told(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(LINES)
  (part,) = parts_lib.find_parts(str(tmp_path / 'a.jsonl'), 'text')
  (tmp_path / 'a.jsonl').write_bytes(LINES + b' ')
  with pytest.raises(ValueError, match='a.jsonl: changed while .* another --o'):
    list(parts_lib.read_part(part, 'text'))


# --- Training on it ----------------------------------------------------------


def load(corpora):
  config = data.DataConfig(corpus=corpora, evaluation_sets='validation')
  return data.load_text(data.resolve(config))


@pytest.mark.parametrize(
  ('corpora', 'words'),
  [
    ('{0}:1,{0}/:-1', 'must be DIR:WEIGHT, a number above 0'),
    ('{0}:0', 'must be DIR:WEIGHT, a number above 0'),
    ('{0}:nan', 'must be DIR:WEIGHT, a number above 0'),
    ('{0}:inf', 'must be DIR:WEIGHT, a number above 0'),
    ('{0}:-inf,sotu:1', 'must be DIR:WEIGHT, a number above 0'),
    (' , ', 'names nothing; give a directory'),
    ('nowhere', '^data.corpus=nowhere: no prepared corpus .* makes one'),
    ('{0}:1,nowhere:1', '^data.corpus=nowhere: no prepared corpus'),
    ('ftp://host/x', 'data.corpus=ftp://host/x: must be a directory'),
  ],
)
def test_a_mixture_that_names_nothing_is_refused(corpus, corpora, words):
  with pytest.raises(ValueError, match=words) as info:
    load(corpora.format(corpus.directory))
  assert '\n' not in str(info.value)


def test_the_option_that_names_nothing_is_told(corpus):
  config = data.DataConfig(
    corpus=str(corpus.directory), anneal_corpus='nowhere', anneal_from=1
  )
  with pytest.raises(ValueError, match='^data.anneal_corpus=nowhere: no prep'):
    data.load_text(config)


def test_a_bucket_without_its_package_is_told(monkeypatch):
  def missing(name):
    raise ImportError(f'Please install what opens {name}')

  monkeypatch.setattr(fsspec, 'get_filesystem_class', missing)
  with pytest.raises(ValueError) as info:
    load('gs://bucket/x')
  assert str(info.value) == (
    'data.corpus=gs://bucket/x: needs a package that is not installed; '
    'Please install what opens gs'
  )


@pytest.mark.parametrize('bad', ['missing', 'cut'])
def test_a_shard_that_is_cut_off_is_refused_before_training(
  corpus, bad, tmp_path
):
  copy = shutil.copytree(corpus.directory, tmp_path / 'copy')
  assert load(str(copy)).train
  last = copy / corpus.splits['train'].shards[-1].file
  content = last.read_bytes()
  last.unlink()
  if bad == 'cut':
    last.write_bytes(content[:-1])
  with pytest.raises(ValueError, match=f'{last.name}: .*restore it'):
    load(str(copy))


def test_a_tokenizer_of_another_vocabulary_is_refused(corpus, tmp_path):
  ends = {'eos_token': '<other>'}  # The same tokenizer ends otherwise.
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(ends))
  for added in ([], ['<other>']):
    model = tokenizers.Tokenizer.from_str(corpus.tokenizer.to_json())
    model.add_special_tokens(added)
    model.save(str(tmp_path / 'tokenizer.json'))
    names = f'{tmp_path}/tokenizer.json', str(tmp_path), 'bpe:262'
    found = [
      write_corpus(tmp_path / f'{len(added)}{i}', TEXTS, name).directory
      for i, name in enumerate(names)
    ]
    with pytest.raises(ValueError, match='prepared with another tokenizer'):
      load(f'{found[0]}:1,{found[2]}:1')
    both = f'{found[0]}:1,{found[1]}:1'
    if added:
      with pytest.raises(ValueError, match='prepared with another tokenizer'):
        load(both)
    else:
      assert len(load(both).train) == 2
  copy = shutil.copytree(corpus.directory, tmp_path / 'copy')
  model = Tokenizer.train(TEXTS, 262)
  (copy / 'tokenizer.json').write_text(model.to_json())
  with pytest.raises(ValueError, match='tokenizer.json: .*restore it'):
    load(str(copy))


def test_a_corpus_that_is_on_its_way_is_waited_for(
  corpus, tmp_path, monkeypatch, capsys
):
  out = tmp_path / 'out'

  def finish(seconds):
    shutil.copytree(corpus.directory, out)

  monkeypatch.setattr(prepared.time, 'sleep', finish)
  tokens = prepared.Prepared(str(out), wait_seconds=600).splits['train'][:]
  np.testing.assert_array_equal(tokens, corpus.splits['train'][:])
  assert f'waiting for {out}/manifest.json, 600 s' in capsys.readouterr().err


def test_waiting_for_a_corpus_has_a_bound(tmp_path, monkeypatch):
  seconds = iter(range(0, 10**6, 100))
  monkeypatch.setattr(prepared.time, 'monotonic', lambda: next(seconds))
  monkeypatch.setattr(prepared.time, 'sleep', lambda seconds: None)
  with pytest.raises(ValueError, match='no prepared corpus'):
    prepared.Prepared(str(tmp_path), wait_seconds=600)


@pytest.mark.parametrize('failures', [2, 3])
def test_a_disk_that_fails_is_no_damage(corpus, failures, monkeypatch, capsys):
  monkeypatch.setattr(storage, 'PAUSES', (0.0, 0.0))
  tokens = prepared.Prepared(str(corpus.directory)).splits['train']
  errors, pread = [OSError(errno.EIO, 'failed')] * failures, os.pread

  def failing(*arguments):
    if errors:
      raise errors.pop()
    return pread(*arguments)

  monkeypatch.setattr(os, 'pread', failing)
  if failures == 3:
    with pytest.raises(OSError, match=r'\.tok: cannot be read now .*failed'):
      _ = tokens[:10]
  assert len(tokens[:10]) == 10  # Good again when asked once more.
  assert capsys.readouterr().err.count('tries again') == 2
