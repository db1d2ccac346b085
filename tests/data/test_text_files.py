"""The user's own files give their documents, and bad ones are told by name."""

import errno
import gzip
import hashlib
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from moe_jax import data
from moe_jax.data import sources
from moe_jax.data.tokenizer import Tokenizer
from tests.data.reading import load, train_and_validation, write


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


@pytest.mark.parametrize('name', ['a.jsonl.txt', 'a.jsonl.v2.txt.gz'])
def test_the_end_of_the_name_says_what_a_file_is(tmp_path, name):
  opener = gzip.open if name.endswith('.gz') else open
  with opener(tmp_path / name, 'wt') as file:
    file.write('{"text": "a"}\nfree text')
  write(tmp_path / 'v.txt', ['held out'])
  names = f'{tmp_path}/{name}', f'{tmp_path}/v.txt'
  train, _ = train_and_validation(
    load(tmp_path, names[0], validation_files=names[1])
  )
  assert train == ['{"text": "a"}\nfree text']


# What the versions before made of the files below: their caches stay valid.
REST = ['\ufefftwo', 'one', '', 'one', '\u00e9', 'four\r\n', 'six']


@pytest.mark.parametrize(
  'validation, keys, expected',
  [
    (
      '',
      ['4f243afb2313d96474cb0d5165320c79', 'e44879a373dac8b4fbbc595c622cf156'],
      (REST, ['one']),
    ),
    (
      'v.jsonl',
      ['794aeb726cac385d98e154b8e7f52558', '7fff3cc2124f2f1c329e19a009e68d43'],
      (['one', *REST], ['held']),
    ),
  ],
)
def test_keys_and_documents_are_what_they_were(
  tmp_path, validation, keys, expected
):
  texts = ['\ufeffone', '\ufeff\ufefftwo', 'one', '\ufeff', 'one', '\u00e9']
  lines = [json.dumps({'text': text}) for text in texts]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  (tmp_path / 'c.txt').write_bytes('\ufeff\ufefffour\r\n'.encode())
  packed = '1f8b08000000000002032bceac0000fb26174303000000'
  (tmp_path / 'd.txt.gz').write_bytes(bytes.fromhex(packed))
  (tmp_path / 'v.jsonl').write_text('{"text": "held"}\n')
  config = data.DataConfig(
    dataset='text_files',
    files=','.join(f'{tmp_path}/{name}.*' for name in 'acd'),
    validation_files=validation and f'{tmp_path}/{validation}',
  )
  corpora = sources.open_corpora(config).values()
  assert [corpus.key for corpus in corpora] == keys
  assert tuple(list(corpus.documents()) for corpus in corpora) == expected


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


def test_a_text_that_is_null_is_skipped(tmp_path):
  lines = ['{"text": "a"}', '{"text": null}', '{"text": "b"}']
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  text = load(tmp_path, f'{tmp_path}/a.jsonl')
  assert train_and_validation(text) == (['b'], ['a'])


def test_json_of_other_fields_may_be_anything(tmp_path):
  lines = ['{"text": "a", "text": "b", "n": NaN}', '{"n": 1e999, "text": "c"}']
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  text = load(tmp_path, f'{tmp_path}/a.jsonl')
  assert train_and_validation(text) == (['c'], ['b'])


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.txt.gz', 'a.jsonl.gz'])
def test_huge_documents_are_refused(tmp_path, name, monkeypatch):
  monkeypatch.setattr('moe_jax.data.documents.LARGEST_DOCUMENT', 1000)
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
  monkeypatch.setattr('moe_jax.data.documents.SMALL_EXPANSION', 1 << 16)
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

  def denied(file, name):
    raise PermissionError(errno.EACCES, 'Permission denied')

  monkeypatch.setattr(hashlib, 'file_digest', denied)
  message = r'^data\.files=.*a\.txt: cannot be read: Permission denied$'
  with pytest.raises(ValueError, match=message):
    load(tmp_path, f'{tmp_path}/a.txt')


@pytest.mark.parametrize('change', ['vanish', 'grow'])
def test_file_that_changes_before_it_is_read_is_told(
  tmp_path, monkeypatch, change
):
  path = tmp_path / 'a.jsonl'
  write(path, ['one', 'two'])
  original = hashlib.file_digest

  def digest(file, name):
    found = original(file, name)
    monkeypatch.setattr(hashlib, 'file_digest', original)
    path.unlink() if change == 'vanish' else write(path, ['one', 'two', '3'])
    return found

  monkeypatch.setattr(hashlib, 'file_digest', digest)
  message = 'cannot be read: No such' if change == 'vanish' else 'changed while'
  with pytest.raises(ValueError, match=f'^data.files.*{message}'):
    load(tmp_path, str(path))
  assert not list((tmp_path / 'cache').iterdir())


@pytest.mark.parametrize('maximum', [0, 1])
@pytest.mark.parametrize('changed', ['files', 'validation_files'])
def test_no_tokens_are_kept_of_a_file_that_changes(
  tmp_path, monkeypatch, changed, maximum
):
  paths = {
    'files': tmp_path / 'a.jsonl',
    'validation_files': tmp_path / 'v.jsonl',
  }
  for path in paths.values():
    write(path, [path.name, 'two'])
  names = {name: str(path) for name, path in paths.items()}
  original = Tokenizer.encode_batch

  def encode_batch(self, texts):
    if paths[changed].name in texts:
      write(paths[changed], [paths[changed].name, '3'])
    return original(self, texts)

  monkeypatch.setattr(Tokenizer, 'encode_batch', encode_batch)
  monkeypatch.setattr('moe_jax.data.tokenizer._CHARACTERS_AT_ONCE', 1)
  with pytest.raises(ValueError, match=rf'^data\.{changed}: changed while'):
    load(tmp_path, maximum_documents=maximum, **names)
  kept = list((tmp_path / 'cache').glob('*.npy'))
  assert len(kept) == (changed == 'files')  # The validation tokens, or none.


# --- The cache ---------------------------------------------------------------


def flip(path):
  whole = bytearray(path.read_bytes())
  whole[len(whole) // 2] ^= 1
  path.write_bytes(whole)


def test_damaged_files_are_made_again(tmp_path):
  write(tmp_path / 'a.jsonl', [f'document {i}' for i in range(50)])
  text = load(tmp_path, f'{tmp_path}/a.jsonl')
  expected = train_and_validation(text)
  folder = tmp_path / 'cache'
  for path in folder.iterdir():
    flip(path)
  again = load(tmp_path, f'{tmp_path}/a.jsonl')
  assert train_and_validation(again) == expected
  assert again.fingerprint == text.fingerprint
  assert not list(folder.glob('.incomplete-*'))


def test_only_tokenizer_and_tokens_are_kept(tmp_path):
  write(tmp_path / 'a.jsonl', ['one', 'two'])
  load(tmp_path, f'{tmp_path}/a.jsonl')
  kept = sorted(path.name for path in (tmp_path / 'cache').iterdir())
  assert [re.sub(r'-.*\.', '.', name) for name in kept] == [
    'tokenizer.json',
    'tokens.npy',
    'tokens.npy',
  ]


def test_cache_without_room_is_named(tmp_path):
  words = np.random.default_rng(0).integers(0, 9999, (4000, 40)).astype(str)
  write(tmp_path / 'a.jsonl', [' '.join(line) for line in words])
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (960_000, limits[1]))
  try:
    with pytest.raises(ValueError) as info:
      load(tmp_path, f'{tmp_path}/a.jsonl')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  folder = tmp_path / 'cache'
  start = f'data.cache_dir={folder}: cannot write tokens-'
  assert str(info.value).startswith(start) and '\n' not in str(info.value)
  assert 'File too large' in str(info.value)
  assert not list(folder.glob('.incomplete-*'))
  load(tmp_path, f'{tmp_path}/a.jsonl')  # With room again.


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize(
  'module, function', [(tempfile, 'NamedTemporaryFile'), (os, 'replace')]
)
def test_cache_that_cannot_be_written_is_named(
  tmp_path, monkeypatch, code, module, function
):
  write(tmp_path / 'a.jsonl', ['one', 'two'])

  def fail(*arguments, **options):
    raise OSError(code, os.strerror(code))

  monkeypatch.setattr(module, function, fail)
  message = rf'^data\.cache_dir={tmp_path}/cache: .*\({os.strerror(code)}\)'
  with pytest.raises(ValueError, match=message):
    load(tmp_path, f'{tmp_path}/a.jsonl')
  assert not list((tmp_path / 'cache').iterdir())


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
  os.replace = lambda *arguments: os._exit(9)
config = data.DataConfig(
  dataset='text_files', files=sys.argv[1], vocabulary=300,
  evaluation_sets='validation', cache_dir=sys.argv[2])
text = data.load_text(config)
print(text.fingerprint, text.train[0].tokens.sum())
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
  expected = f'{text.fingerprint} {text.train[0].tokens.sum()}\n'
  assert output == [expected, expected]  # And stdout has nothing else.


@pytest.mark.long
def test_processes_may_find_damage_together(tmp_path):
  write(tmp_path / 'a.jsonl', [f'document {i}' * 9 for i in range(500)])
  text = load(tmp_path, str(tmp_path / 'a.jsonl'))
  expected = f'{text.fingerprint} {text.train[0].tokens.sum()}\n'
  for path in [*(tmp_path / 'cache').rglob('*')]:
    if path.is_file():
      flip(path)
  together = [run(tmp_path, 'live') for _ in range(4)]
  output = [process.communicate(timeout=120)[0] for process in together]
  assert output == [expected] * 4
