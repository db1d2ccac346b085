"""Tokenizers as they are published."""

import io
import json

import pytest
import tokenizers

from moe_jax.data import pretrained
from moe_jax.data.tokenizer import END_OF_DOCUMENT, Tokenizer

DOCUMENTS = ['the theme of the thesis', 'then the other', 'naïve 😀 naïve'] * 9
TEXTS = [*DOCUMENTS[:3], 'other  themes\n of naïveté', 'über 中文', '', ' the ']


def test_a_folder_names_its_end(tmp_path):
  model = tokenizers.Tokenizer.from_str(
    Tokenizer.train(DOCUMENTS, 300).to_json()
  )
  model.add_special_tokens(['<stop>', '<eos>'])
  model.save(str(tmp_path / 'tokenizer.json'))
  for named in ('<stop>', {'content': '<stop>', 'lstrip': False}):
    config = json.dumps({'eos_token': named})
    (tmp_path / 'tokenizer_config.json').write_text(config)
    tokenizer = pretrained.open_tokenizer(str(tmp_path))
    assert tokenizer.end_of_document == model.token_to_id('<stop>')
    assert tokenizer.vocabulary == model.get_vocab_size()
  (tmp_path / 'tokenizer_config.json').unlink()
  tokenizer = pretrained.open_tokenizer(str(tmp_path / 'tokenizer.json'))
  assert tokenizer.end_of_document_token == END_OF_DOCUMENT
  text = 'a <eos> in the text'
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert model.token_to_id('<eos>') not in tokenizer.encode(text)


def test_texts_are_neither_cut_nor_filled_up(tmp_path):
  """As tokenizers of sentence embeddings are published."""
  model = tokenizers.Tokenizer.from_str(
    Tokenizer.train(DOCUMENTS, 300).to_json()
  )
  model.enable_truncation(4)
  model.enable_padding(length=8)
  model.save(str(tmp_path / 'tokenizer.json'))
  tokenizer = pretrained.open_tokenizer(str(tmp_path))
  for text in TEXTS:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
  ('config', 'beginning'),
  [
    ({}, ['<s>']),  # As tokenizer.json has it.
    ({'add_bos_token': True, 'bos_token': '<b>'}, ['<b>']),
    ({'add_bos_token': True, 'bos_token': {'content': '<b>'}}, ['<b>']),
    ({'add_bos_token': False, 'bos_token': '<b>'}, []),
    ({'add_bos_token': True, 'bos_token': '<unknown>'}, []),
  ],
)
def test_what_a_text_begins_with_is_known(config, beginning, tmp_path):
  model = tokenizers.Tokenizer.from_str(
    Tokenizer.train(DOCUMENTS, 300).to_json()
  )
  model.add_special_tokens(['<s>', '<b>', '</s>'])
  special = [(token, model.token_to_id(token)) for token in ('<s>', '</s>')]
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A </s>', special_tokens=special
  )
  model.save(str(tmp_path / 'tokenizer.json'))
  config = json.dumps(config | {'eos_token': '</s>'})
  (tmp_path / 'tokenizer_config.json').write_text(config)
  tokenizer = pretrained.open_tokenizer(str(tmp_path))
  assert tokenizer.beginning == list(map(model.token_to_id, beginning))
  assert tokenizer.decode(tokenizer.encode('the theme')) == 'the theme'
  assert not {*dict(special).values()} & {*tokenizer.encode('the theme')}


@pytest.mark.parametrize('config', ['[]', '{"eos_token": 5}', '{}', 'null'])
def test_an_odd_config_names_no_end(config, tmp_path):
  text = Tokenizer.train(DOCUMENTS, 300).to_json()
  (tmp_path / 'tokenizer.json').write_text(text)
  (tmp_path / 'tokenizer_config.json').write_text(config)
  tokenizer = pretrained.open_tokenizer(str(tmp_path))
  assert tokenizer.end_of_document_token == END_OF_DOCUMENT


def test_an_end_is_added_where_there_is_none(tmp_path):
  model = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({'the': 0, 'of': 1, '?': 2}, unk_token='?')
  )
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  model.save(str(tmp_path / 'words.json'))
  tokenizer = pretrained.open_tokenizer(str(tmp_path / 'words.json'))
  assert tokenizer.vocabulary == 4 and tokenizer.end_of_document == 3
  assert tokenizer.encode('the of the').tolist() == [0, 1, 0]
  again = Tokenizer.from_json(tokenizer.to_json(), 4)
  assert again.end_of_document == 3


def train_sentencepiece(folder, **options):
  """Returns a model as SentencePiece opens it, and as we do."""
  sentencepiece = pytest.importorskip('sentencepiece')
  written = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(DOCUMENTS),
    model_writer=written,
    hard_vocab_limit=False,
    minloglevel=2,
    **options,
  )
  (folder / 'tokenizer.model').write_bytes(written.getvalue())
  theirs = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
  return theirs, pretrained.open_tokenizer(str(folder))


@pytest.mark.parametrize('kind', ['unigram', 'bpe'])
@pytest.mark.parametrize('fallback', [False, True])
def test_sentencepiece_encodes_alike(kind, fallback, tmp_path):
  theirs, tokenizer = train_sentencepiece(
    tmp_path,
    model_type=kind,
    vocab_size=300 if fallback else 40,
    byte_fallback=fallback,
  )
  assert tokenizer.end_of_document == theirs.eos_id()
  assert tokenizer.vocabulary == theirs.vocab_size()
  for text in TEXTS:
    assert tokenizer.encode(text).tolist() == theirs.encode(text), text
  if fallback:
    ids = tokenizer.encode('naïve über 中文')
    assert tokenizer.decode(ids) == 'naïve über 中文'
    # And the space that is put before the text.
    size = len('naïve über 中文'.encode()) + 1
    assert tokenizer.token_bytes_V[ids].sum() == size


@pytest.mark.parametrize('kind', ['unigram', 'bpe'])
def test_symbols_of_sentencepiece_are_tokens(kind, tmp_path):
  theirs, tokenizer = train_sentencepiece(
    tmp_path,
    model_type=kind,
    vocab_size=40,
    user_defined_symbols=['<s', '<sep>', '.*'],
  )
  for text in ('<sep>', 'the <sep> of', '<s<sep>the.*', ' <sep>other'):
    assert tokenizer.encode(text).tolist() == theirs.encode(text), text


@pytest.mark.parametrize(
  ('name', 'content', 'words'),
  [
    ('a.json', '{}', 'a.json: not a tokenizer.json'),
    ('a.json', 'no json', 'a.json: not a tokenizer.json'),
    ('a.model', 'no model', 'a.model: '),
  ],
)
def test_what_is_no_tokenizer_is_refused(name, content, words, tmp_path):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=words):
    pretrained.open_tokenizer(str(tmp_path / name))
  empty = tmp_path / 'empty'
  empty.mkdir()
  with pytest.raises(ValueError, match='this folder has no tokenizer.json'):
    pretrained.open_tokenizer(str(empty))
