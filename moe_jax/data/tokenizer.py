"""Byte-level BPE, and the token files that are made with it.

Shape letters: V vocabulary, N tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import json
import pathlib
import re
from typing import Any, BinaryIO, TypeVar

import numpy as np
import tokenizers

from moe_jax.data import cache

END_OF_DOCUMENT = '<|endoftext|>'
SMALLEST_VOCABULARY = 257  # Every byte, and the end of a document.
STRETCH = 1 << 18  # Characters of a document that are encoded by themselves.
_CHARACTERS_AT_ONCE = 1 << 22  # Each takes some 100 bytes of memory.
# Where tokens end: with every tokenizer that knows words, else with those that
# are learnt here.
_BEFORE_WORD = re.compile(r'(?<=\S) (?=[^\W\d_])')
_BEFORE_SPACE = re.compile(r'(?<=\S)(?=[ \r\n])')
T = TypeVar('T')


class Tokenizer:
  """A tokenizer of Hugging Face's library with a fixed number of ids.

  Those that are trained here are byte-level: any text can be encoded and
  decodes to itself; see pretrained.py for others. A text that spells out the
  end-of-document token gets ordinary tokens for it.

  Attributes:
    vocabulary: number of ids, V. Where the training text had too few pairs to
      merge, the last ids stand for nothing: no text is ever encoded to them,
      they decode to nothing, and their token_bytes_V is 0.
    end_of_document: id of the token that follows each document.
    end_of_document_token: that token.
    beginning: ids that a published tokenizer puts before a text, such as those
      of <s>; `encode` does not, and what is trained here has none.
    dtype: of encoded text; uint16 where V allows it, else uint32.
    token_bytes_V: bytes of UTF-8 that each token stands for, int32 [V]; 0 for
      the end of a document. Bits per byte of a text are its summed negative
      log-likelihood / (ln 2 * the sum of this over the predicted tokens).
  """

  def __init__(
    self,
    model: tokenizers.Tokenizer,
    vocabulary: int,
    end_of_document: str = END_OF_DOCUMENT,
    beginning: Sequence[int] = (),
  ):
    """Wraps a `model`; see `train` and `from_json`.

    Raises:
      ValueError: the model has no end-of-document token, or too many tokens.
    """
    ids = model.get_vocab()
    if end_of_document not in ids or max(ids.values()) >= vocabulary:
      raise ValueError(
        f'not a tokenizer of at most {vocabulary} ids with {end_of_document}'
      )
    model.encode_special_tokens = True  # As text. Its JSON does not keep this.
    self._model = model
    self.vocabulary = vocabulary
    self.end_of_document = ids[end_of_document]
    self.end_of_document_token = end_of_document
    self.beginning = list(beginning)
    self.dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
    added = model.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    kind = json.loads(model.to_str())
    size = _byte_size(kind)
    self.token_bytes_V = np.zeros(vocabulary, np.int32)
    for token, i in ids.items():
      if i not in special:
        self.token_bytes_V[i] = size(token)

  @classmethod
  def train(cls, documents: Iterable[str], vocabulary: int) -> 'Tokenizer':
    """Learns the merges from documents; equal input gives equal tokenizers.

    Args:
      documents: the training text.
      vocabulary: number of ids, at least 257. A text too small for so many
        leaves the last ids unused.

    Raises:
      ValueError: vocabulary is too small.
    """
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    by_byte = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.pre_tokenizer = by_byte
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocabulary,
      min_frequency=2,
      special_tokens=[END_OF_DOCUMENT],
      initial_alphabet=by_byte.alphabet(),
      show_progress=False,
    )
    pieces = (piece for text in documents for piece, _ in stretches(text))
    model.train_from_iterator(pieces, trainer)
    return cls(model, vocabulary)

  @classmethod
  def from_json(
    cls,
    text: str,
    vocabulary: int,
    end_of_document: str = END_OF_DOCUMENT,
    beginning: Sequence[int] = (),
  ) -> 'Tokenizer':
    """Restores what `to_json` gave; raises ValueError for anything else."""
    try:
      model = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises no narrower type.
      raise ValueError(f'not a tokenizer: {error}') from error
    return cls(model, vocabulary, end_of_document, beginning)

  def to_json(self) -> str:
    """Returns the tokenizer in the JSON format of HF tokenizers."""
    return self._model.to_str()

  def encode(self, text: str) -> np.ndarray:
    """Returns the token ids of a text, `dtype` [N]."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Encodes texts on all cores; one array like that of `encode` for each."""
    encodings = self._model.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, self.dtype) for encoding in encodings]

  def decode(self, ids_N: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids [N] without ends of documents.

    Bytes that are not UTF-8, such as half a character, become U+FFFD.
    """
    return self._model.decode(np.asarray(ids_N, np.int64).tolist())


def _byte_size(model: dict[str, Any]) -> Callable[[str], int]:
  """Returns how many bytes of text a token of a model stands for.

  Args:
    model: as its JSON has it.
  """
  if '"ByteLevel"' in json.dumps([model['pre_tokenizer'], model['decoder']]):
    return len  # One character stands for one byte.

  def size(token: str) -> int:
    if re.fullmatch('<0x[0-9A-F]{2}>', token):  # A byte, where no piece fits.
      return 1
    return len(token.removeprefix('##').replace('\u2581', ' ').encode())

  return size


def load_tokenizer(
  path: pathlib.Path,
  documents: Callable[[], Iterable[str]],
  vocabulary: int,
) -> Tokenizer:
  """Reads the tokenizer at `path`, or trains it and writes it there.

  Args:
    path: a sealed JSON file; made again where it is damaged.
    documents: gives the training text; called only if it is needed.
    vocabulary: number of ids.
  """

  def load(path: pathlib.Path, size: int) -> Tokenizer:
    return Tokenizer.from_json(path.read_bytes()[:size].decode(), vocabulary)

  def make(file: BinaryIO) -> None:
    cache.log(f'training a tokenizer of {vocabulary} tokens')
    tokenizer = Tokenizer.train(documents(), vocabulary)
    file.write(tokenizer.to_json().encode())

  return cache.load_or_make(path, load, make)


def load_tokens(
  path: pathlib.Path,
  documents: Callable[[], Iterable[str]],
  tokenizer: Tokenizer,
) -> np.ndarray:
  """Opens the token file at `path`, or encodes the documents into it.

  Args:
    path: a sealed .npy file; made again where it is damaged.
    documents: gives the text; called only if it is needed.
    tokenizer: encodes it.

  Returns:
    The documents' tokens one after the other, the end-of-document token after
    each; tokenizer.dtype [N], memory-mapped and read-only.
  """

  def load(path: pathlib.Path, size: int) -> np.ndarray:
    del size  # It is in the header.
    tokens_N = np.load(path, mmap_mode='r', allow_pickle=False)
    if tokens_N.dtype != tokenizer.dtype or tokens_N.ndim != 1:
      raise ValueError(f'{path} holds {tokens_N.dtype} {tokens_N.shape}')
    return tokens_N

  def make(file: BinaryIO) -> None:
    def write_header(size: int) -> None:
      dtype = {'descr': tokenizer.dtype.str, 'fortran_order': False}
      np.lib.format.write_array_header_1_0(file, dtype | {'shape': (size,)})

    write_header(0)
    start = file.tell()
    end = np.array([tokenizer.end_of_document], tokenizer.dtype).tobytes()
    pieces = (piece for text in documents() for piece in stretches(text))
    for group in groups(
      pieces, _CHARACTERS_AT_ONCE, lambda piece: len(piece[0])
    ):
      encoded = tokenizer.encode_batch([text for text, _ in group])
      for (_, is_last), ids_N in zip(group, encoded, strict=True):
        file.write(ids_N.tobytes() + end * is_last)
    size = (file.tell() - start) // tokenizer.dtype.itemsize
    file.seek(0)
    write_header(size)
    assert file.tell() == start, 'numpy pads headers so that lengths can grow'

  return cache.load_or_make(path, load, make)


def stretches(text: str, anywhere: bool = False) -> Iterator[tuple[str, bool]]:
  """Divides a long document, as encoding takes a hundred times its memory.

  It is divided before words, or else before spaces, so that its tokens are
  those of the whole.

  Args:
    text: the document.
    anywhere: whether text without spaces is divided as well.

  Yields:
    Each stretch, of about STRETCH characters, and whether it is the last.
  """
  start = 0
  while (stop := _end_of_stretch(text, start, anywhere)) < len(text):
    yield text[start:stop], False
    start = stop
  yield text[start:], True


def _end_of_stretch(text: str, start: int, anywhere: bool) -> int:
  stop = start + STRETCH
  if stop >= len(text):
    return len(text)
  for place in (_BEFORE_WORD, _BEFORE_SPACE):
    found = list(place.finditer(text, stop - STRETCH // 4, stop))
    if found:
      return found[-1].start()
  if anywhere:
    return stop
  later = _BEFORE_SPACE.search(text, stop)
  return later.start() if later else len(text)


def groups(
  documents: Iterable[T],
  characters: int,
  size_of: Callable[[T], int] = len,
) -> Iterator[list[T]]:
  """Yields documents in lists of at least so many characters."""
  group, size = [], 0
  for text in documents:
    group.append(text)
    size += size_of(text)
    if size >= characters:
      yield group
      group, size = [], 0
  if group:
    yield group
