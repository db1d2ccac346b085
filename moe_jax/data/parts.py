"""Parts of a source, each read by itself: the work of `prepare`.

Sources are .txt (one document a file), .jsonl (one a line), both with .gz or
.zst, .parquet, folders that Hugging Face's `datasets` saved, and TFDS data sets
(`tfds:NAME`); on disk or wherever fsspec opens files (gs://, s3://, http://).
"""

from collections.abc import Iterator
import contextlib
import functools
import gzip
import io
import sys
from typing import Any, BinaryIO, NamedTuple

import fsspec

from moe_jax.data import documents
from moe_jax.data.config import DataConfig, split_names
from moe_jax.data.documents import reading

PART_BYTES = 1 << 26  # Of plain .jsonl and .parquet files, which are divided.
_TFDS_DOCUMENTS = 1 << 14
SUFFIXES = ('.txt', '.jsonl', '.parquet', '.arrow')
_PACKED = ('.gz', '.zst')


class Part(NamedTuple):
  """What one worker reads at a time.

  Attributes:
    path: of a file, or `tfds:NAME`.
    start: first byte, row group or document.
    stop: the one after the last; -1 reads to the end.
    text_field: name of the text in a record.
    size: bytes of the source's file, which tell whether it changed.
  """

  path: str
  start: int
  stop: int
  text_field: str
  size: int


def find_parts(source: str, text_field: str) -> list[Part]:
  """Divides a source into parts, in a fixed order.

  Args:
    source: comma-separated paths, globs and `tfds:NAME`s.
    text_field: name of the text in a record.

  Raises:
    ValueError: a name stands for nothing, or for what cannot be read.
  """
  parts = []
  for name in split_names(source):
    with reading(f'--source={name}'):
      if name.startswith('tfds:'):
        parts += _tfds_parts(name, text_field)
        continue
      file_system, _, _ = fsspec.get_fs_token_paths(name)
      found = _files(file_system, name)
      if not found:
        raise ValueError('no such file')
      for path in found:
        parts += _file_parts(file_system, path, text_field)
  if not parts:
    raise ValueError(f'--source={source}: names nothing')
  return parts


def read_part(part: Part) -> Iterator[str]:
  """Yields the documents of a part; empty ones are skipped.

  Raises:
    ValueError: it cannot be read; the message has the file, and the line, row
      or byte.
  """
  with reading(part.path):
    yield from filter(None, _texts(part))


def _texts(part: Part) -> Iterator[str]:
  if part.path.startswith('tfds:'):
    return _tfds_texts(part)
  kind = _unpacked_name(part.path).rpartition('.')[2]
  readers = {
    'txt': _txt,
    'jsonl': _jsonl,
    'parquet': _parquet,
    'arrow': _arrow,
  }
  return readers[kind](part)


def _unpacked_name(path: str) -> str:
  return path.removesuffix('.gz').removesuffix('.zst')


def _files(file_system: Any, name: str) -> list[str]:
  """Lists the files that a path or glob names, with their protocol."""
  protocol, separator, _ = name.rpartition('://')
  place = file_system._strip_protocol(name)
  if file_system.isdir(place):
    paths = file_system.glob(f'{place.rstrip("/")}/*.arrow')
    if not paths:
      raise ValueError(
        'a folder without .arrow files of the library datasets; to read its '
        f'files write {name.rstrip("/")}/*.parquet or the like'
      )
  else:
    exists = file_system.isfile(place)
    paths = [place] if exists else file_system.glob(place)
  for path in paths:
    plain = _unpacked_name(path)
    if not plain.endswith(SUFFIXES) or (
      plain != path and not plain.endswith(('.txt', '.jsonl'))
    ):
      raise ValueError(
        f'{path}: the name must end in {", ".join(SUFFIXES[:3])}, or .gz or '
        '.zst of the first two'
      )
  return [f'{protocol}{separator}{path}' for path in sorted(paths)]


def _file_parts(file_system: Any, path: str, text_field: str) -> list[Part]:
  size = file_system.size(path)
  if path.endswith('.parquet'):
    return [
      Part(path, first, last, text_field, size)
      for first, last in _row_groups(path, text_field)
    ]
  if not path.endswith('.jsonl'):
    return [Part(path, 0, -1, text_field, size)]
  starts = range(0, max(size, 1), PART_BYTES)
  return [
    Part(path, start, min(start + PART_BYTES, size), text_field, size)
    for start in starts
  ]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
  """Opens a file; what is packed is unpacked."""
  with fsspec.open(path, 'rb') as file:
    if path.endswith('.gz'):
      yield gzip.GzipFile(fileobj=file)
    elif path.endswith('.zst'):
      yield _unpacked_zstd(file)
    else:
      yield file


def _unpacked_zstd(file: BinaryIO) -> BinaryIO:
  """Unpacks all frames; fsspec's own way ends after the first one."""
  try:
    import zstandard
  except ImportError as error:
    raise ValueError(
      "needs the extra of Zstandard: pip install 'moe_jax[zstd]'"
    ) from error
  stream = zstandard.ZstdDecompressor().stream_reader(
    file, read_across_frames=True
  )
  return io.BufferedReader(_Told(stream, zstandard.ZstdError))


class _Told(io.RawIOBase):
  """A stream whose errors are OSErrors."""

  def __init__(self, stream: BinaryIO, error: type[Exception]):
    self._stream, self._error = stream, error

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    try:
      return self._stream.readinto(buffer)
    except self._error as error:
      raise OSError(f'damaged zst file: {error}') from error


def _room(part: Part) -> int:
  """Returns how many bytes a file may have inside."""
  if not part.path.endswith(_PACKED):
    return sys.maxsize
  return documents.SMALL_EXPANSION + part.size * documents.LARGEST_EXPANSION


def _txt(part: Part) -> Iterator[str]:
  with _opened(part.path) as file:
    yield documents.read_whole(file, _room(part))


def _jsonl(part: Part) -> Iterator[str]:
  """Yields the lines that begin within the part."""
  with _opened(part.path) as file:
    if part.stop < 0:
      yield from documents.read_lines(file, _room(part), part.text_field)
      return
    if part.start:
      file.seek(part.start - 1)
      file.readline()  # It began in the part before.
    while (start := file.tell()) < part.stop:
      with reading(f'line at byte {start}'):
        line = file.readline(documents.LARGEST_DOCUMENT + 1)
        documents.check_size(len(line))
        if line.strip():
          yield documents.parse_line(line, part.text_field)


def _row_groups(path: str, text_field: str) -> list[tuple[int, int]]:
  """Joins neighbouring row groups until a part has its size."""
  import pyarrow as pa
  from pyarrow import parquet

  with fsspec.open(path, 'rb') as file, _arrow_told():
    meta = parquet.ParquetFile(file)
    names = meta.schema_arrow.names
    if text_field not in names:
      raise ValueError(
        f'no column --text_field={text_field}; it has {", ".join(names)}'
      )
    kind = meta.schema_arrow.field(text_field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
      raise ValueError(f'column {text_field} is of {kind}, not of strings')
    groups, first, size = [], 0, 0
    for i in range(meta.num_row_groups):
      size += meta.metadata.row_group(i).total_byte_size
      if size >= PART_BYTES:
        groups.append((first, i + 1))
        first, size = i + 1, 0
    if first < meta.num_row_groups:
      groups.append((first, meta.num_row_groups))
  return groups


def _parquet(part: Part) -> Iterator[str]:
  from pyarrow import parquet

  with fsspec.open(part.path, 'rb') as file, _arrow_told():
    batches = parquet.ParquetFile(file).iter_batches(
      batch_size=1024,
      row_groups=range(part.start, part.stop),
      columns=[part.text_field],
    )
    for batch in batches:
      yield from _strings(batch.column(0), part.text_field)


def _arrow(part: Part) -> Iterator[str]:
  """Reads what Hugging Face's `datasets` saves: a stream of record batches."""
  from pyarrow import ipc

  with fsspec.open(part.path, 'rb') as file, _arrow_told():
    stream = ipc.open_stream(file)
    if part.text_field not in stream.schema.names:
      raise ValueError(
        f'no column --text_field={part.text_field}; it has '
        f'{", ".join(stream.schema.names)}'
      )
    for batch in stream:
      yield from _strings(batch.column(part.text_field), part.text_field)


def _strings(column: Any, name: str) -> Iterator[str]:
  for value in column:
    text = value.as_py()
    if text is not None:
      if not isinstance(text, str):
        raise ValueError(f'column {name} has {type(text).__name__}, no string')
      yield text


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
def _tfds_source(name: str, text_field: str) -> Any:
  from moe_jax.data import catalog

  dataset = name.removeprefix('tfds:')
  return catalog.open_training_split(
    DataConfig(dataset=dataset, text_field=text_field)
  )


def _tfds_parts(name: str, text_field: str) -> list[Part]:
  size = len(_tfds_source(name, text_field))
  return [
    Part(name, start, min(start + _TFDS_DOCUMENTS, size), text_field, size)
    for start in range(0, size, _TFDS_DOCUMENTS)
  ]


def _tfds_texts(part: Part) -> Iterator[str]:
  from moe_jax.data import catalog

  source = _tfds_source(part.path, part.text_field)
  numbers = range(part.start, part.stop)
  return catalog.texts(source, part.text_field, part.path, numbers)
