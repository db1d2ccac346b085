"""The tokenizer loses nothing, and what is cached equals what is made."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from moe_jax.data.tokenizer import (
  END_OF_DOCUMENT,
  Tokenizer,
  load_tokenizer,
  load_tokens,
  stretches,
)

DOCUMENTS = ['the theme of the thesis', 'then the other', 'naïve 😀 naïve 😀']


def unwanted():
  raise AssertionError('the cache should have been used')


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer.train(DOCUMENTS, 300)


any_text = st.text(st.characters(exclude_categories=['Cs']))


@hypothesis.given(any_text)
@hypothesis.example(f'a {END_OF_DOCUMENT}{END_OF_DOCUMENT} b')
@hypothesis.example('\x00\r\n\u2028  \ufeff\U0010ffff')
def test_any_text_round_trips_without_an_end_of_document(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.end_of_document not in ids
  assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())


def test_end_of_document_survives_storage_as_ordinary_text(tokenizer):
  again = Tokenizer.from_json(tokenizer.to_json(), 300)
  assert again.end_of_document not in again.encode(END_OF_DOCUMENT)


def test_end_of_document_decodes_to_nothing_and_has_no_bytes(tokenizer):
  end = tokenizer.end_of_document
  ids = [*tokenizer.encode('the'), end, *tokenizer.encode('other')]
  assert tokenizer.decode(ids) == 'theother'
  assert tokenizer.token_bytes_V[end] == 0


def test_merges_are_learnt(tokenizer):
  # 'the' and its surroundings come six times: it must have become one token.
  assert len(tokenizer.encode(' the')) == 1
  assert (tokenizer.token_bytes_V > 1).sum() > 5


def test_training_is_deterministic(tokenizer):
  assert Tokenizer.train(DOCUMENTS, 300).to_json() == tokenizer.to_json()
  assert Tokenizer.train(DOCUMENTS[:2], 300).to_json() != tokenizer.to_json()


def test_small_text_leaves_ids_unused():
  tokenizer = Tokenizer.train(['ab ab ab'], 1000)
  assert tokenizer.vocabulary == 1000
  assert tokenizer.token_bytes_V.shape == (1000,)
  assert tokenizer.token_bytes_V.sum() == 256 + 2 + 3
  assert not tokenizer.token_bytes_V[259:].any()
  assert tokenizer.decode([999, *tokenizer.encode('ab'), 998]) == 'ab'


@pytest.mark.parametrize('vocabulary, dtype', [(65536, 'u2'), (65537, 'u4')])
def test_dtype_holds_every_id(vocabulary, dtype):
  assert Tokenizer.train(DOCUMENTS, vocabulary).dtype == np.dtype(dtype)


def test_vocabulary_below_the_bytes_is_refused():
  with pytest.raises(ValueError, match='at most 256 ids'):
    Tokenizer.train(DOCUMENTS, 256)


def test_cached_tokenizer_is_used_and_equal(tmp_path, tokenizer):
  path = tmp_path / 'tokenizer.json'
  first = load_tokenizer(path, lambda: DOCUMENTS, 300)
  second = load_tokenizer(path, unwanted, 300)
  assert first.to_json() == second.to_json() == tokenizer.to_json()


@pytest.mark.parametrize(
  'damage',
  [
    lambda whole: b'',
    lambda whole: whole[: len(whole) // 2],
    lambda whole: b'{}',
    lambda whole: b'\xff' + whole,
    lambda whole: whole.replace(b'<|endoftext|>', b'<|somethingelse|>'),
    lambda whole: whole.replace(b'"the"', b'"teh"'),
    lambda whole: whole[:-64],  # As it was before it was sealed.
  ],
)
def test_damaged_tokenizer_is_made_again(tmp_path, tokenizer, damage, capsys):
  path = tmp_path / 'tokenizer.json'
  load_tokenizer(path, lambda: DOCUMENTS, 300)
  whole = path.read_bytes()
  assert damage(whole) != whole
  path.write_bytes(damage(whole))
  capsys.readouterr()
  made = load_tokenizer(path, lambda: DOCUMENTS, 300)
  assert made.to_json() == tokenizer.to_json()
  assert path.read_bytes() == whole
  assert f'{path} is damaged' in capsys.readouterr().err


def test_token_file_holds_the_documents_and_their_ends(tmp_path, tokenizer):
  path = tmp_path / 'tokens.npy'
  made = load_tokens(path, lambda: iter(DOCUMENTS), tokenizer)
  opened = load_tokens(path, unwanted, tokenizer)
  expected = []
  for text in DOCUMENTS:
    expected += [*tokenizer.encode(text), tokenizer.end_of_document]
  np.testing.assert_array_equal(made, expected)
  np.testing.assert_array_equal(opened, expected)
  assert isinstance(opened, np.memmap) and not opened.flags.writeable
  assert opened.dtype == np.uint16


@pytest.mark.parametrize(
  'damage',
  [
    lambda whole: b'',
    lambda whole: whole[:20],
    lambda whole: whole[:-1],
    lambda whole: b'text' + whole,
    lambda whole: whole.replace(b'<u2', b'<u4'),
    lambda whole: whole[:140] + bytes([whole[140] ^ 1]) + whole[141:],
    lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    lambda whole: whole[:-64],  # As it was before it was sealed.
    lambda whole: whole + b'more',
  ],
)
def test_damaged_token_file_is_made_again(tmp_path, tokenizer, damage, capsys):
  path = tmp_path / 'tokens.npy'
  load_tokens(path, lambda: iter(DOCUMENTS), tokenizer)
  whole = path.read_bytes()
  path.write_bytes(damage(whole))
  capsys.readouterr()
  load_tokens(path, lambda: iter(DOCUMENTS), tokenizer)
  assert path.read_bytes() == whole
  assert f'{path} is damaged' in capsys.readouterr().err


@hypothesis.given(
  st.text(
    st.one_of(
      st.sampled_from(' \n\r\t\x1c\u00a0\u0085\u3000'),
      st.sampled_from("ab'st1_.\u00b2\u0301\u4e2d"),
      st.characters(exclude_categories=['Cs']),
    ),
    max_size=60,
  )
)
@hypothesis.settings(max_examples=500, deadline=None)
def test_stretches_have_the_tokens_of_the_whole(text):
  whole = Tokenizer.train([text, text], 400)  # What may be merged is.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('moe_jax.data.tokenizer.STRETCH', 8)
    pieces, ends = zip(*stretches(text), strict=True)
    cut, _ = zip(*stretches(text, anywhere=True), strict=True)
    learnt = Tokenizer.train([text, text], 400)
  assert ''.join(pieces) == ''.join(cut) == text
  assert max(map(len, cut)) <= 8
  assert ends == (*[False] * (len(pieces) - 1), True)
  assert learnt.to_json() == whole.to_json()
  found = np.concatenate(whole.encode_batch(list(pieces)))
  np.testing.assert_array_equal(found, whole.encode(text))


def test_memory_does_not_hold_all_documents(tmp_path, tokenizer, monkeypatch):
  """Nor a whole one that is long."""
  expected = load_tokens(tmp_path / 'a.npy', lambda: DOCUMENTS * 2, tokenizer)
  monkeypatch.setattr('moe_jax.data.tokenizer._CHARACTERS_AT_ONCE', 10)
  monkeypatch.setattr('moe_jax.data.tokenizer.STRETCH', 8)
  sizes = []
  encode = tokenizer.encode_batch

  def encode_batch(texts):
    sizes.append(len(''.join(texts)))
    return encode(texts)

  monkeypatch.setattr(tokenizer, 'encode_batch', encode_batch)
  tokens = load_tokens(tmp_path / 'b.npy', lambda: DOCUMENTS * 2, tokenizer)
  np.testing.assert_array_equal(tokens, expected)
  assert sum(sizes) == len(''.join(DOCUMENTS * 2)) and max(sizes) < 20
