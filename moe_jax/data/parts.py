"""Parts of a source, each read by itself: the work of `prepare`.

Sources are .txt (one document a file), .jsonl (one a line), both with .gz or
.zst, .parquet, folders that Hugging Face's `datasets` saved, and TFDS data sets
(`tfds:NAME`); on disk or wherever fsspec opens files (gs://, s3://, http://).
Large files are divided, and neighbouring small ones are one part.
"""

from collections.abc import Iterable, Iterator
from concurrent import futures
import contextlib
import functools
import gzip
import io
import json
import os
import sys
from typing import Any, BinaryIO, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from moe_jax.data import documents
from moe_jax.data.config import DataConfig, split_names
from moe_jax.data.documents import reading, reading_with_any_library

PART_BYTES = 1 << 26
_TFDS_DOCUMENTS = 1 << 14
_ZSTD_BYTES = 1 << 12  # Packed; nothing expands to more than 2**15 times that.
_BUFFER = 1 << 20
_END_OF_ARROW = b'\xff\xff\xff\xff\0\0\0\0'
SUFFIXES = ('.txt', '.jsonl', '.parquet', '.arrow')
_PACKED = ('.gz', '.zst')


class Piece(NamedTuple):
  """A stretch of a file.

  Attributes:
    path: of the file, or `tfds:NAME` or `tfds:NAME@DIRECTORY`.
    start: first byte, row group or document.
    stop: the one after the last; -1 reads to the end.
    size: bytes of the file, which tell whether it changed; -1 where a server
      does not say it.
  """

  path: str
  start: int
  stop: int
  size: int


Part = list[Piece]  # What one worker reads at a time.


def find_parts(source: str, text_field: str, tfds_dir: str = '') -> list[Part]:
  """Divides a source into parts, in a fixed order.

  Args:
    source: comma-separated paths, globs and `tfds:NAME`s; a file that they name
      twice comes once.
    text_field: name of the text in a record.
    tfds_dir: where TFDS data sets are prepared; empty for TFDS's default.

  Raises:
    ValueError: a name stands for nothing, or for what cannot be read.
  """
  found = {}
  for name in split_names(source):
    with reading_with_any_library(f'--source={name}'):
      if name.startswith('tfds:'):
        path = f'{name}@{tfds_dir}' if tfds_dir else name
        found[path] = functools.partial(_tfds_pieces, path, text_field)
        continue
      for path, size in _files(name):
        found[path] = functools.partial(_pieces, path, size, text_field)
  # To open a file in a bucket takes a moment, and there may be thousands.
  with futures.ThreadPoolExecutor(32) as pool:
    pieces = pool.map(lambda find: find(), found.values())
    parts = list(_joined(piece for some in pieces for piece in some))
  if not parts:
    raise ValueError(f'--source={source}: names no file that holds anything')
  return parts


def _joined(pieces: Iterable[tuple[Piece, int]]) -> Iterator[Part]:
  """Joins neighbours, given with their weights, until a part has its size."""
  part, weight = [], 0
  for piece, more in pieces:
    part.append(piece)
    weight += more
    if weight >= PART_BYTES:
      yield part
      part, weight = [], 0
  if part:
    yield part


def read_part(part: Part, text_field: str) -> Iterator[str]:
  """Yields the documents of a part; empty ones and nulls are skipped.

  Raises:
    ValueError: it cannot be read; the message has the file, and the line, row
      or byte.
  """
  for piece in part:
    with reading_with_any_library(piece.path):
      yield from filter(None, _texts(piece, text_field))


def _texts(piece: Piece, text_field: str) -> Iterator[str | None]:
  if piece.path.startswith('tfds:'):
    return _tfds_texts(piece, text_field)
  file_system, place = fsspec.core.url_to_fs(piece.path)
  if _size(file_system, place) != piece.size:
    raise ValueError(
      'changed while its corpus is being prepared; give another --out'
    )
  kind = _unpacked_name(piece.path).rpartition('.')[2]
  readers = {
    'txt': _txt,
    'jsonl': _jsonl,
    'parquet': _parquet,
    'arrow': _arrow,
  }
  return readers[kind](piece, text_field)


def _unpacked_name(path: str) -> str:
  return path.removesuffix('.gz').removesuffix('.zst')


def _size(file_system: Any, place: str) -> int:
  size = file_system.size(place)
  return -1 if size is None else size


def _files(name: str) -> list[tuple[str, int]]:
  """Lists the files that a path or glob names: full names, and sizes."""
  if '::' in name:
    raise ValueError('chained addresses are not read; unpack the archive')
  file_system, place = fsspec.core.url_to_fs(name)
  if file_system.isfile(place):
    sizes = {place: _size(file_system, place)}
  elif file_system.isdir(place):
    sizes = {
      path: _size(file_system, path)
      for path in _dataset_files(file_system, place, name)
    }
  else:
    sizes = {
      path: info['size'] if info.get('size') is not None else -1
      for path, info in file_system.glob(place, detail=True).items()
    }
  if not sizes:
    raise ValueError('no such file')
  for path in sizes:
    plain = _unpacked_name(path)
    if not plain.endswith(SUFFIXES) or (
      plain != path and not plain.endswith(('.txt', '.jsonl'))
    ):
      raise ValueError(
        f'{path}: the name must end in {", ".join(SUFFIXES[:3])}, or .gz or '
        '.zst of the first two'
      )
  local = isinstance(file_system, LocalFileSystem)
  return [
    (path if local else file_system.unstrip_protocol(path), sizes[path])
    for path in sorted(sizes)
  ]


def _dataset_files(file_system: Any, place: str, name: str) -> list[str]:
  """Lists the .arrow files of a folder of the library `datasets`."""
  folder = place.rstrip('/')
  if file_system.isfile(f'{folder}/dataset_dict.json'):
    about = json.loads(file_system.cat_file(f'{folder}/dataset_dict.json'))
    raise ValueError(
      f'has the splits {", ".join(about["splits"])}; name one of them, as '
      f'{name.rstrip("/")}/{about["splits"][0]}'
    )
  if file_system.isfile(f'{folder}/state.json'):  # There may be caches beside.
    about = json.loads(file_system.cat_file(f'{folder}/state.json'))
    names = [os.path.basename(x['filename']) for x in about['_data_files']]
    return [f'{folder}/{name}' for name in names]
  paths = file_system.glob(f'{folder}/*.arrow')
  if not paths:
    raise ValueError(
      'a folder without .arrow files of the library datasets; to read its '
      f'files write {name.rstrip("/")}/*.parquet or the like'
    )
  return paths


def _pieces(path: str, size: int, text_field: str) -> list[tuple[Piece, int]]:
  """Divides a file; returns pieces and about how many bytes they hold."""
  with reading_with_any_library(path):
    if path.endswith('.parquet'):
      return [
        (Piece(path, i, i + 1, size), weight)
        for i, weight in enumerate(_row_groups(path, text_field))
      ]
    if path.endswith('.arrow'):
      _check_arrow(path, text_field)
    if path.endswith(_PACKED) and not size:
      raise ValueError('damaged: the file is empty')
    if not path.endswith('.jsonl') or size < 0:
      return [(Piece(path, 0, -1, size), max(size, 0))]
    bounds = [*range(0, size, PART_BYTES), size]
    return [
      (Piece(path, start, stop, size), stop - start)
      for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


def _open(path: str) -> BinaryIO:
  # Not by fsspec.open, for which some characters of a name mean something.
  file_system, place = fsspec.core.url_to_fs(path)
  return file_system.open(place, 'rb')


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
  """Opens a file; what is packed is unpacked."""
  with _open(path) as file:
    if path.endswith('.gz'):
      yield gzip.GzipFile(fileobj=file)
    elif path.endswith('.zst'):
      yield io.BufferedReader(_Unpacked(file), _BUFFER)
    elif '://' in path:  # Files of fsspec read no line of bounded length.
      yield io.BufferedReader(file, _BUFFER)
    else:
      yield file


class _Unpacked(io.RawIOBase):
  """What is inside a .zst file: all of its frames.

  The reader of zstandard takes a file that was cut off for a whole one, and
  that of fsspec ends after the first frame.
  """

  def __init__(self, file: BinaryIO):
    try:
      import zstandard
    except ImportError as error:
      raise ValueError(
        "needs the extra of Zstandard: pip install 'moe_jax[zstd]'"
      ) from error
    self._zstandard, self._file = zstandard, file
    self._frame, self._packed, self._ready = None, b'', memoryview(b'')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._ready:
      self._packed = self._packed or self._file.read(_ZSTD_BYTES)
      if not self._packed:
        if self._frame:
          raise OSError('damaged zst file: it ends too early')
        return 0
      self._unpack()
    size = min(len(buffer), len(self._ready))
    buffer[:size], self._ready = self._ready[:size], self._ready[size:]
    return size

  def _unpack(self) -> None:
    if self._frame is None:
      self._frame = self._zstandard.ZstdDecompressor().decompressobj()
    try:
      self._ready = memoryview(self._frame.decompress(self._packed))
    except self._zstandard.ZstdError as error:
      raise OSError(f'damaged zst file: {error}') from error
    self._packed = b''
    if self._frame.eof:
      self._packed, self._frame = self._frame.unused_data, None


def _room(piece: Piece) -> int:
  """Returns how many bytes a file may have inside."""
  if not piece.path.endswith(_PACKED) or piece.size < 0:
    return sys.maxsize
  return documents.SMALL_EXPANSION + piece.size * documents.LARGEST_EXPANSION


def _txt(piece: Piece, text_field: str) -> Iterator[str]:
  del text_field  # All of the file is the text.
  with _opened(piece.path) as file:
    yield documents.read_whole(file, _room(piece))


def _jsonl(piece: Piece, text_field: str) -> Iterator[str | None]:
  """Yields the lines that begin within the piece."""
  with _opened(piece.path) as file:
    if piece.stop < 0:
      yield from documents.read_lines(file, _room(piece), text_field)
      return
    if piece.start:
      # A line that began before may go on to the end of the piece, or further.
      file.seek(piece.start - 1)
      file.readline(piece.stop - piece.start + 1)
    while (start := file.tell()) < piece.stop:
      with reading(f'line at byte {start}'):
        line = file.readline(documents.LARGEST_DOCUMENT + 1)
        documents.check_size(len(line))
        if line.strip():
          yield documents.parse_line(line, text_field)


def _row_groups(path: str, text_field: str) -> list[int]:
  """Returns the bytes of each row group."""
  from pyarrow import parquet

  with _open(path) as file, _arrow_told():
    meta = parquet.ParquetFile(file)
    _check_column(meta.schema_arrow, text_field)
    return [
      meta.metadata.row_group(i).total_byte_size
      for i in range(meta.num_row_groups)
    ]


def _check_column(schema: Any, text_field: str) -> None:
  """Raises ValueError where a table has no such text."""
  import pyarrow as pa

  if text_field not in schema.names:
    raise ValueError(
      f'no column --text_field={text_field}; it has {", ".join(schema.names)}'
    )
  kind = schema.field(text_field).type
  if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
    raise ValueError(
      f'column {text_field} is of {kind}, not of strings; name another by '
      '--text_field'
    )


def _parquet(piece: Piece, text_field: str) -> Iterator[str]:
  from pyarrow import parquet

  with _open(piece.path) as file, _arrow_told():
    # A row group may be large: neither it nor its column is read as a whole.
    table = parquet.ParquetFile(
      file,
      pre_buffer=False,
      buffer_size=_BUFFER,
      page_checksum_verification=True,
    )
    batches = table.iter_batches(
      256, row_groups=[piece.start], columns=[text_field]
    )
    yield from _strings(batches, f'row group {piece.start}, row')


def _check_arrow(path: str, text_field: str) -> None:
  """Raises ValueError for a file that is cut off, or has no such text."""
  from pyarrow import ipc

  with _open(path) as file, _arrow_told():
    _check_column(ipc.open_stream(file).schema, text_field)
    size = len(_END_OF_ARROW)
    file.seek(max(0, file.seek(0, os.SEEK_END) - size))
    if file.read(size) != _END_OF_ARROW:
      raise ValueError('damaged: it ends too early')


def _arrow(piece: Piece, text_field: str) -> Iterator[str]:
  """Reads what Hugging Face's `datasets` saves: a stream of record batches."""
  from pyarrow import ipc

  with _open(piece.path) as file, _arrow_told():
    batches = (batch.select([text_field]) for batch in ipc.open_stream(file))
    yield from _strings(batches, 'row')


def _strings(batches: Iterable[Any], where: str) -> Iterator[str | None]:
  """Yields the strings of the only column."""
  first = 0
  for batch in batches:
    with reading(f'{where}s from {first} on'):
      batch.validate(full=True)  # Or damage may lead anywhere in memory.
    yield from batch.column(0).to_pylist()
    first += len(batch)


@contextlib.contextmanager
def _arrow_told() -> Iterator[None]:
  """Turns the errors of a damaged file into ValueErrors."""
  import pyarrow as pa

  try:
    yield
  except pa.ArrowException as error:
    line = str(error).partition('\n')[0]
    raise ValueError(f'damaged or of another format: {line}') from error


@functools.lru_cache(maxsize=4)
def _tfds_source(path: str, text_field: str) -> Any:
  from moe_jax.data import catalog

  name, _, directory = path.removeprefix('tfds:').partition('@')
  return catalog.open_training_split(
    DataConfig(dataset=name, text_field=text_field, tfds_dir=directory)
  )


def _tfds_pieces(path: str, text_field: str) -> list[tuple[Piece, int]]:
  size = len(_tfds_source(path, text_field))
  return [
    # Each is a part: how large documents are is not known.
    (Piece(path, start, min(start + _TFDS_DOCUMENTS, size), size), PART_BYTES)
    for start in range(0, size, _TFDS_DOCUMENTS)
  ]


def _tfds_texts(piece: Piece, text_field: str) -> Iterator[str]:
  from moe_jax.data import catalog

  source = _tfds_source(piece.path, text_field)
  numbers = range(piece.start, piece.stop)
  return catalog.texts(source, text_field, 'split train', numbers)
