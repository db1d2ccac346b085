"""Data sets of TFDS are opened by name and bad ones are told by it."""

import json
import os
import pathlib
import pwd
import re
import shutil
import sys
import tempfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_jax import data
from moe_jax.data import prepare
from tests.data.reading import documents_of, train_and_validation


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

  builder = SmallLm1b(data_dir=str(tmp_path / 'tfds'))
  builder.download_and_prepare(file_format='array_record')
  return tmp_path / 'tfds'


def load_named(folder, name, **options):
  config = data.DataConfig(
    dataset=name,
    vocabulary=300,
    evaluation_sets='validation',
    cache_dir=str(folder / 'cache'),
    **{'tfds_dir': str(folder / 'tfds')} | options,
  )
  return data.load_text(config)


@pytest.mark.parametrize('name', ['lm1b', 'lm1b:1.1.0'])
def test_prepared_lm1b_opens_by_name(tmp_path, lm1b, name):
  text = load_named(tmp_path, name)
  train, validation = train_and_validation(text)
  assert sorted(train) == [f'train sentence {i} .' for i in range(7)]
  assert sorted(validation) == [f'test sentence {i} .' for i in range(7)]
  assert load_named(tmp_path, name).fingerprint == text.fingerprint


def test_a_corpus_is_made_of_it(tmp_path, lm1b, monkeypatch):
  monkeypatch.chdir(lm1b.parent)
  flags = 'tfds:lm1b', 'bpe:270', str(tmp_path / 'out')

  def elsewhere(make, numbers, total):  # As workers do.
    monkeypatch.chdir('/')
    for number in numbers:
      make(number)

  corpus = prepare.prepare(
    *flags, tfds_dir=lm1b.name, validation=0.0, run=elsewhere
  )
  found = documents_of(corpus.splits['train'][:], corpus.tokenizer)
  assert sorted(found) == [f'train sentence {i} .' for i in range(7)]


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (
      ['--tfds_dir=nowhere'],
      '^error: --source=tfds:lm1b: not prepared in .*set --tfds_dir to that',
    ),
    (
      ['--tfds_dir=tfds', '--text_field=body'],
      '^error: --text_field=body: --source=tfds:lm1b has no such text',
    ),
    (['--tfds_dir=ftp://x/y'], '^error: --tfds_dir=ftp://x/y: must be'),
    (['--source=tfds:'], '^error: --source=tfds:: .*give a TFDS name such as'),
  ],
)
def test_flags_of_prepare_are_named(
  flags, message, tmp_path, lm1b, monkeypatch, capsys
):
  monkeypatch.chdir(lm1b.parent)
  argv = ['--source=tfds:lm1b', '--tokenizer=bpe:270', '--out=out', *flags]
  assert prepare.main(['prepare', *argv]) == 2
  assert re.search(message, capsys.readouterr().err)


def test_a_file_of_an_unknown_owner_is_read(tmp_path, lm1b, monkeypatch):
  """As in a container, where users of other machines have no names."""

  def unknown(uid):
    raise KeyError(uid)

  monkeypatch.setattr(pwd, 'getpwuid', unknown)
  train, _ = train_and_validation(load_named(tmp_path, 'lm1b'))
  assert len(train) == 7


def test_mocked_lm1b_goes_the_same_way(tmp_path, lm1b):
  with tfds.testing.mock_data(num_examples=5, data_dir=str(lm1b)):
    train, validation = train_and_validation(load_named(tmp_path, 'lm1b'))
  assert len(train) == len(validation) == 5
  assert set(''.join(train)) <= set(' abcdefghij')


@pytest.mark.parametrize(
  'tfds_dir, expected',
  [
    ('gs://bucket/data', 'gs://bucket/data'),
    ('~/data', os.path.expanduser('~/data')),
    ('', None),
  ],
)
def test_directory_is_passed_on(tmp_path, monkeypatch, tfds_dir, expected):
  seen = []

  def builder(name, data_dir):
    seen.append(data_dir)
    raise OSError('stop here')

  monkeypatch.setattr(tfds, 'builder', builder)
  with pytest.raises(ValueError, match='^data.dataset=lm1b: stop here'):
    load_named(tmp_path, 'lm1b', tfds_dir=tfds_dir)
  assert seen == [expected]


def test_nothing_is_left_in_the_systems_temporary_directory(
  tmp_path, temporary_files
):
  left = set(pathlib.Path(temporary_files).glob('*tfds'))
  with pytest.raises(ValueError, match='not prepared in'):
    load_named(tmp_path, 'lm1b')
  (made,) = set(pathlib.Path(temporary_files).glob('*tfds')) - left
  assert pathlib.Path(tempfile.gettempdir()) == made.parent


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
    ('lm1b', 'tfds build lm1b --file_format=array_record'),
    ('wikipedia', 'Apache Beam'),
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
  """A TFDS data set that can be prepared without TensorFlow."""

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


def prepare_recipes(folder):
  builder = Recipes(data_dir=str(folder / 'tfds'))
  builder.download_and_prepare(file_format='array_record')


def test_without_a_validation_split_the_end_is_held_out(tmp_path, capsys):
  prepare_recipes(tmp_path)
  load_named(tmp_path, 'recipes', text_field='title')
  capsys.readouterr()
  text = load_named(tmp_path, 'recipes', text_field='title')
  train, validation = train_and_validation(text)
  assert train == [f'soup {i}' for i in range(38)]
  assert validation == ['soup 38', 'soup 39']  # The last 5 %.
  assert capsys.readouterr() == ('', '')


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
  prepare_recipes(tmp_path)
  with pytest.raises(ValueError, match=rf'^data\.dataset=recipes: .*{message}'):
    load_named(tmp_path, 'recipes', text_field='title')
