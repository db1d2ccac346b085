"""Prepared corpora: tokens in shards, found by arithmetic and read lazily.

A corpus is a directory, local or remote, of

    manifest.json        what it is made of, and the shards of each split
    tokenizer.json       of Hugging Face's library
    SPLIT-NNNNN-NNN.tok  little-endian tokens, then the CRC-32 of each block

The manifest has a checksum of its own, of the tokenizer and of each shard's
table of checksums. Nothing is read before it is needed, and each block is
checked when it is.

Shape letters: N tokens.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import functools
import hashlib
import json
import os
import re
import sys
import threading
import time
from typing import Any, NamedTuple, TypeVar
import uuid
import zlib

from etils import epath
import fsspec
import numpy as np

from moe_jax import storage
from moe_jax.data import cache
from moe_jax.data.documents import reading_with_any_library
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.options import one_line, shown

FORMAT = 2
MANIFEST = 'manifest.json'
INCOMPLETE = '.incomplete'  # Ends the name of a file that is being written.
BLOCK = 1 << 16  # Bytes that are checked together.
_SECONDS_BETWEEN_LOOKS = 2.0
_LOOKS_BETWEEN_REPORTS = 15
_REMEDY = (
  'restore it from a copy, or prepare the corpus anew in another directory'
)
T = TypeVar('T')


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
  write_file(path, view, table)
  return zlib.crc32(table)


def file_size(shard: Shard, dtype: np.dtype) -> int:
  """Returns the bytes of tokens and checksums."""
  size = shard.tokens * dtype.itemsize
  return size + 4 * -(-size // BLOCK)


def write_json(path: epath.Path, value: dict[str, Any]) -> None:
  """Writes a JSON object, sealed with a checksum of its own."""
  sealed = value | {'key': _key(value)}
  write_file(path, json.dumps(sealed, indent=1).encode())


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads what `write_json` wrote; raises ValueError if it is damaged."""
  return _parse(path, _unsealed)


def _unsealed(data: bytes) -> dict[str, Any]:
  value = json.loads(data)
  if value['key'] != _key(value):
    raise ValueError('it is not as it was written')
  return value


def _key(value: dict[str, Any]) -> str:
  rest = {name: part for name, part in value.items() if name != 'key'}
  return cache.content_key('prepared', rest)


def write_file(path: epath.Path, *content: bytes | memoryview) -> None:
  """Writes a file that is whole or not there, though others write it as well.

  An object of a bucket appears when all of it is sent; a file is renamed.
  """
  if storage.is_remote(path):
    with path.open('wb') as file:
      file.writelines(content)
    return
  beside = path.with_name(f'{path.name}.{uuid.uuid4().hex}{INCOMPLETE}')
  try:
    with beside.open('wb') as file:
      file.writelines(content)
      file.flush()
      os.fsync(file.fileno())  # A record must not outlive what it tells of.
    beside.replace(path)
  except OSError as error:
    raise ValueError(
      f'{path}: cannot be written: {error.strerror or error}; make room, or '
      'give another directory'
    ) from error
  finally:
    beside.unlink(missing_ok=True)


def open_directory(option: str, name: str) -> epath.Path:
  """Returns a path, which may be of a bucket; nothing need be there.

  Raises:
    ValueError: there is no such kind of place, or its package is missing.
  """
  try:
    if storage.is_remote(path := epath.Path(name).expanduser()):
      fsspec.get_filesystem_class(name.partition('://')[0])
      storage.ask_buckets_anew()
    return path
  except ImportError as error:
    raise ValueError(
      f'{option}={name}: needs a package that is not installed; {error}'
    ) from error
  except (KeyError, RuntimeError) as error:  # The latter of ~somebody.
    raise ValueError(
      f'{option}={name}: must be a directory, on this machine or at gs:// or '
      's3://'
    ) from error


class Tokens:
  """The tokens of one split, which behaves like an array of one axis.

  It is indexed by slices and by integer arrays, in any number of threads.
  Raises ValueError, which names the file, where a shard is missing or damaged.
  """

  def __init__(
    self, directory: epath.Path, shards: list[Shard], dtype: np.dtype
  ):
    self.directory, self.shards, self.dtype = directory, shards, dtype
    counts = [shard.tokens for shard in shards]
    self._ends = np.cumsum(counts, dtype=np.int64)
    self._files: dict[int, _File] = {}
    self._lock = threading.Lock()

  @property
  def remote(self) -> bool:
    """Whether each row takes answers of a bucket."""
    return storage.is_remote(self.directory)

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

  def damage(self, workers: int = 8) -> Iterator[str]:
    """Reads all that there is; yields a line for each shard that is bad."""

    def check(shard: Shard) -> str:
      try:
        file = _File(self.directory / shard.file, shard, self.dtype)
        for start in range(0, shard.tokens, 1 << 22):
          file.read(start, min(start + (1 << 22), shard.tokens))
      except ValueError as error:
        return str(error)
      return ''

    with futures.ThreadPoolExecutor(workers) as pool:
      yield from filter(None, pool.map(check, self.shards))

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
    file = self._files.get(number)
    if file is None:
      # Not under the lock: a bucket takes its time. Two threads may open one.
      shard = self.shards[number]
      file = _File(self.directory / shard.file, shard, self.dtype)
      with self._lock:  # What was opened long ago is checked anew.
        if len(self._files) >= 256:
          del self._files[next(iter(self._files))]
        self._files[number] = file
    return file


def _reader(path: epath.Path) -> Callable[[int, int], bytes]:
  """Returns what reads a shard from a byte to another, in any thread."""
  if storage.is_remote(
    path
  ):  # One request each, for no more than is asked for.
    file_system, place = fsspec.core.url_to_fs(os.fspath(path))
    return functools.partial(file_system.cat_file, place)

  def read(start: int, stop: int) -> bytes:
    with path.open('rb') as file:  # Kept open, thousands would be too many.
      return os.pread(file.fileno(), stop - start, start)

  return read


class _File:
  """A shard, and which of its blocks were found to be good."""

  def __init__(self, path: epath.Path, shard: Shard, dtype: np.dtype):
    self._path, self._dtype = path, dtype
    self._size = shard.tokens * dtype.itemsize
    try:
      self._read = _reader(path)
      table = self._bytes(self._size, file_size(shard, dtype))
    except Exception as error:  # Clients of buckets raise what they like.
      raise self._bad(error) from error
    if zlib.crc32(table) != shard.crc32:
      raise self._bad('its checksums are not those of the manifest')
    self._table = np.frombuffer(table, '<u4')
    self._good = np.zeros(len(self._table), bool)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns the tokens from `start` to `stop`, whose blocks are checked."""
    width = self._dtype.itemsize
    first, last = start * width // BLOCK, -(-stop * width // BLOCK)
    offset = first * BLOCK
    try:
      data = self._bytes(offset, min(last * BLOCK, self._size))
    except Exception as error:
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

  def _bytes(self, start: int, stop: int) -> bytes:
    data = storage.patiently(
      lambda: self._read(start, stop), str(self._path), storage.may_pass
    )
    if len(data) != stop - start:
      raise ValueError(f'ends {stop - start - len(data)} bytes too early')
    return data

  def _bad(self, why: Exception | str) -> Exception:
    return _unread(self._path, why)


def _unread(path: epath.Path, why: Exception | str) -> Exception:
  """Returns what to raise: OSError where another try may be better."""
  if isinstance(why, Exception):
    if storage.may_pass(why):
      return OSError(f'{path}: cannot be read now ({one_line(why)})')
    why = f'cannot be read: {getattr(why, "strerror", None) or one_line(why)}'
  return ValueError(f'{path}: {why}; {_REMEDY}')


def _shards(split: dict[str, Any]) -> list[Shard]:
  shards = [Shard(**shard) for shard in split['shards']]
  for shard in shards:
    # A directory from elsewhere must not name files outside of it.
    if not re.fullmatch(r'[\w-]+\.tok', shard.file) or shard.tokens < 1:
      raise ValueError(f'a shard is {shown(shard._asdict())}')
  return shards


class Prepared:
  """A prepared corpus.

  Attributes:
    where: the option that named it, with its value.
    directory: where it is.
    manifest: the dict of manifest.json.
    tokenizer: that it was made with.
    splits: 'train' and 'validation'.
    fingerprint: hash of the manifest: of all tokens, by their checksums.

  Raises:
    ValueError: the directory holds no whole prepared corpus.
  """

  def __init__(
    self,
    directory: str,
    wait_seconds: float = 0.0,
    option: str = 'data.corpus',
  ):
    """Opens a corpus, for which another process may be waited for.

    Args:
      directory: where it is.
      wait_seconds: how long.
      option: that named it.
    """
    self.where = where = f'{option}={directory}'
    self.directory = open_directory(option, directory)
    with reading_with_any_library(where):
      _await(self.directory / MANIFEST, wait_seconds)
    self.manifest, shards = _parse(self.directory / MANIFEST, _manifest, where)
    self.fingerprint: str = self.manifest['key']

    def tokenizer(data: bytes) -> Tokenizer:
      if hashlib.sha256(data).hexdigest() != self.manifest['tokenizer_sha256']:
        raise ValueError('another tokenizer than that of the manifest')
      kind = self.manifest['vocabulary'], self.manifest['end_of_document']
      return Tokenizer.from_json(data.decode(), *kind)

    self.tokenizer = _parse(self.directory / 'tokenizer.json', tokenizer, where)
    dtype = self.tokenizer.dtype.newbyteorder('<')
    self.splits = {
      name: Tokens(self.directory, split, dtype)
      for name, split in shards.items()
    }

  def check_files(self) -> None:
    """Finds out a shard that is missing or cut off, without opening any.

    Raises:
      ValueError: names it.
    """
    sizes = file_sizes(self.directory)
    for tokens in self.splits.values():
      for shard in tokens.shards:
        size, whole = sizes.get(shard.file), file_size(shard, tokens.dtype)
        if size != whole:
          found = 'is missing' if size is None else f'has {size} bytes'
          raise ValueError(
            f'{self.directory / shard.file}: {found}, in place of {whole} '
            f'bytes; {_REMEDY}'
          )


def file_sizes(directory: epath.Path) -> dict[str, int]:
  """Returns the sizes of a directory's files, by name.

  (That of an epath also looks up who owns a file, which fails in containers
  that do not know the owner.)
  """
  with reading_with_any_library(os.fspath(directory)):
    if storage.is_remote(directory):
      file_system, place = fsspec.core.url_to_fs(os.fspath(directory))
      found = file_system.ls(place, detail=True, refresh=True)
      return {os.path.basename(x['name']): x['size'] for x in found}
    with os.scandir(directory) as found:
      return {x.name: x.stat().st_size for x in found}


def _await(path: epath.Path, seconds: float) -> None:
  """Waits until a file is there, and says so, but no longer than `seconds`."""
  deadline = time.monotonic() + seconds
  looks = 0
  while (left := deadline - time.monotonic()) > 0 and not path.exists():
    if looks % _LOOKS_BETWEEN_REPORTS == 0:
      cache.log(f'waiting for {path}, {left:.0f} s at most')
    looks += 1
    time.sleep(min(left, _SECONDS_BETWEEN_LOOKS))


def _manifest(data: bytes) -> tuple[dict[str, Any], dict[str, list[Shard]]]:
  """Returns a manifest and the shards of each split."""
  manifest = _unsealed(data)
  if manifest['format'] != FORMAT:
    raise ValueError(f'of format {manifest["format"]}, not {FORMAT}')
  shards = {n: _shards(split) for n, split in manifest['splits'].items()}
  return manifest, shards


def _parse(path: epath.Path, parse: Callable[[bytes], T], where: str = '') -> T:
  """Reads a small file of a corpus; what is wrong with it is a ValueError."""
  try:
    data = storage.patiently(path.read_bytes, str(path), storage.may_pass)
    return parse(data)
  except FileNotFoundError as error:
    raise ValueError(
      f'{where or path.parent}: no prepared corpus ({path.name} is not '
      'there); python -m moe_jax.data.prepare --out=DIR makes one, or '
      'completes it'
    ) from error
  # Damage and the clients of buckets raise what they like.
  except Exception as error:
    raise _unread(path, error) from error
