"""Prepared corpora: tokens in shards, found by arithmetic and read lazily.

A corpus is a directory, local or remote, of

    manifest.json    what it is made of, and the shards of each split in order
    tokenizer.json   of Hugging Face's library
    SPLIT-NNNNN.tok  little-endian tokens, then the CRC-32 of each block

Nothing is read before it is needed, and each block is checked when it is.

Shape letters: N tokens.
"""

import functools
import json
import sys
from typing import Any, NamedTuple
import zlib

from etils import epath
import numpy as np

from moe_jax.data import cache
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.options import shown

FORMAT = 1
MANIFEST = 'manifest.json'
BLOCK = 1 << 16  # Bytes that are checked together.


class Shard(NamedTuple):
  """One file of tokens, as the manifest has it.

  Attributes:
    file: its name.
    tokens: number of tokens, ends of documents included.
    documents: number of documents.
    bytes: of UTF-8 that they had.
    crc32: of the table of checksums at the end of the file.
  """

  file: str
  tokens: int
  documents: int
  bytes: int
  crc32: int


def write_shard(path: epath.Path, tokens_N: np.ndarray) -> int:
  """Writes tokens and their checksums; returns the CRC-32 of the latter."""
  data = np.ascontiguousarray(tokens_N, tokens_N.dtype.newbyteorder('<'))
  view = memoryview(data).cast('B')
  table = b''.join(
    zlib.crc32(view[at : at + BLOCK]).to_bytes(4, 'little')
    for at in range(0, len(view), BLOCK)
  )
  with path.open('wb') as file:
    file.write(view)
    file.write(table)
  return zlib.crc32(table)


class Tokens:
  """The tokens of one split, which behaves like an array of one axis.

  It is indexed by slices and by integer arrays. Raises ValueError, which names
  the file, where a shard is missing or damaged.
  """

  def __init__(
    self, directory: epath.Path, shards: list[Shard], dtype: np.dtype
  ):
    self.directory, self.shards, self.dtype = directory, shards, dtype
    counts = [shard.tokens for shard in shards]
    self._ends = np.cumsum(counts, dtype=np.int64)
    self._files: dict[int, _File] = {}

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
    if isinstance(index, slice):
      start, stop, step = index.indices(len(self))
      if step != 1:
        return self[np.arange(start, stop, step)]
      return self._between(start, stop)
    index = np.asarray(index)
    if not index.size:
      return np.zeros(index.shape, self.dtype)
    first = int(index.min())
    return self._between(first, int(index.max()) + 1)[index - first]

  def verify(self) -> None:
    """Reads every block of every shard; raises ValueError for a bad one."""
    for number, shard in enumerate(self.shards):
      for start in range(0, shard.tokens, 1 << 22):
        self._file(number).read(start, min(start + (1 << 22), shard.tokens))

  def _between(self, start: int, stop: int) -> np.ndarray:
    parts = []
    number = int(np.searchsorted(self._ends, start, side='right'))
    while start < stop:
      shard_end = int(self._ends[number])
      shard_start = shard_end - self.shards[number].tokens
      end = min(stop, shard_end)
      parts.append(
        self._file(number).read(start - shard_start, end - shard_start)
      )
      start, number = end, number + 1
    if len(parts) == 1:
      return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

  def _file(self, number: int) -> '_File':
    # Open files are few: what was not used for long is opened anew.
    if number not in self._files:
      if len(self._files) >= 256:
        del self._files[next(iter(self._files))]
      shard = self.shards[number]
      path = self.directory / shard.file
      self._files[number] = _File(path, shard, self.dtype)
    return self._files[number]


class _File:
  """An open shard."""

  def __init__(self, path: epath.Path, shard: Shard, dtype: np.dtype):
    self._path, self._dtype = path, dtype
    self._size = shard.tokens * dtype.itemsize
    blocks = -(-self._size // BLOCK)
    try:
      length = path.stat().length
      if length != self._size + 4 * blocks:
        raise ValueError(
          f'has {length} bytes, not {self._size + 4 * blocks}: cut off or '
          'overwritten'
        )
      self._file = path.open('rb')
      table = self._bytes(self._size, 4 * blocks)
    except (OSError, ValueError) as error:
      raise self._bad(error) from error
    if zlib.crc32(table) != shard.crc32:
      raise self._bad('its checksums are not those of the manifest')
    self._table = np.frombuffer(table, '<u4')
    self._good = np.zeros(blocks, bool)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns the tokens from `start` to `stop`, whose blocks are checked."""
    width = self._dtype.itemsize
    first, last = start * width // BLOCK, -(-stop * width // BLOCK)
    offset = first * BLOCK
    try:
      data = self._bytes(offset, min(last * BLOCK, self._size) - offset)
    except OSError as error:
      raise self._bad(error) from error
    for block in range(first, last):
      if not self._good[block]:
        at = block * BLOCK - offset
        if zlib.crc32(data[at : at + BLOCK]) != self._table[block]:
          raise self._bad(f'its bytes from {block * BLOCK} on are damaged')
        self._good[block] = True
    begin = start * width - offset
    tokens_N = np.frombuffer(data, self._dtype, stop - start, begin)
    return tokens_N if sys.byteorder == 'little' else tokens_N.byteswap()

  def _bytes(self, offset: int, size: int) -> bytes:
    self._file.seek(offset)
    data = self._file.read(size)
    if len(data) != size:
      raise OSError(f'ends {size - len(data)} bytes too early')
    return data

  def _bad(self, why: Any) -> ValueError:
    return ValueError(
      f'{self._path}: {getattr(why, "strerror", None) or why}; restore the '
      'shard from a copy, or prepare the corpus anew in another directory'
    )


def _shards(split: dict[str, Any]) -> list[Shard]:
  shards = [Shard(**shard) for shard in split['shards']]
  for shard in shards:
    # A directory from elsewhere must not name files outside of it.
    if epath.Path(shard.file).name != shard.file or shard.tokens < 1:
      raise ValueError(f'a shard is {shown(shard._asdict())}')
  return shards


class Prepared:
  """A prepared corpus.

  Attributes:
    directory: where it is.
    manifest: the dict of manifest.json.
    tokenizer: that it was made with.
    splits: 'train' and 'validation'.
    fingerprint: hash of the manifest: of all tokens, by their checksums.

  Raises:
    ValueError: the directory holds no whole prepared corpus.
  """

  def __init__(self, directory: str):
    self.directory = epath.Path(directory).expanduser()
    try:
      text = (self.directory / MANIFEST).read_text()
      self.manifest = json.loads(text)
      if self.manifest['format'] != FORMAT:
        raise ValueError(f'of format {self.manifest["format"]}, not {FORMAT}')
      kind = self.manifest['tokenizer']
      self.tokenizer = Tokenizer.from_json(
        (self.directory / 'tokenizer.json').read_text(),
        kind['vocabulary'],
        kind['end_of_document'],
      )
      dtype = self.tokenizer.dtype.newbyteorder('<')
      self.splits = {
        name: Tokens(self.directory, _shards(split), dtype)
        for name, split in self.manifest['splits'].items()
      }
    except FileNotFoundError as error:
      raise ValueError(
        f'{directory}: no prepared corpus ({error.filename or error} is not '
        'there); python -m moe_jax.data.prepare --out=DIR makes one'
      ) from error
    except (KeyError, TypeError, ValueError, OSError) as error:
      raise ValueError(
        f'{directory}: its manifest or tokenizer is damaged: {shown(error)}'
      ) from error

  @functools.cached_property
  def fingerprint(self) -> str:
    return cache.content_key('prepared', self.manifest)
