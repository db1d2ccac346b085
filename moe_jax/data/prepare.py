"""Makes a corpus of tokens, ready to be trained on, of text from anywhere.

  python -m moe_jax.data.prepare --source='texts/*.parquet' \\
      --tokenizer=tokenizer.json --out=DIR [--text_field=text] \\
      [--tfds_dir=...] [--validation=0.005] [--licence=...] [--workers=2] \\
      [--beam ...]
  python -m moe_jax.data.prepare --verify --out=DIR

--source: comma-separated paths and globs of .txt (one document a file), .jsonl
(one a line), .gz and .zst of both, .parquet, folders of Hugging Face's
`datasets`, and tfds:NAME; local, gs://, or whatever fsspec opens.
--tokenizer: a tokenizer.json, a SentencePiece model, a folder with either, or
bpe:N, which learns N tokens from a sample of the source.
--out: a directory, local or gs://..., to be given to --config.data.corpus.
--tfds_dir: where data sets of TFDS are prepared; by default where TFDS does it.
--validation: share of the documents that are held out, by their hash.
--workers: number of threads; by default one for each core.
--beam: runs on Apache Beam; further flags are its own (--runner=...).

Killed, the same command resumes: what is finished is kept. --verify reads and
checks every block of a corpus, and prints a line for each bad shard. Exit
codes: 0 done, 2 refused or damaged, 1 anything else.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import functools
import hashlib
import itertools
import os
import re
import sys
import time
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from moe_jax import storage
from moe_jax.data import cache, prepared, pretrained
from moe_jax.data import parts as parts_lib
from moe_jax.data.documents import reading_with_any_library
from moe_jax.data.parts import Part, Piece
from moe_jax.data.tokenizer import (
  SMALLEST_VOCABULARY,
  STRETCH,
  Tokenizer,
  groups,
  stretches,
)
from moe_jax.options import one_line

SHARD_TOKENS = 1 << 25
SAMPLE_BYTES = 1 << 25  # Of text that bpe:N learns from.
MOST_VOCABULARY = 1 << 24
_SPLITS = ('train', 'validation')
_JOB = 'job.json'  # What is prepared, until it is.

Make = Callable[[int], dict[str, Any]]  # Makes the part of a number.


class Job(NamedTuple):
  """All that decides what the shards hold.

  Attributes:
    parts: of the source.
    text_field: name of the text in a record.
    validation: share of the documents that are held out.
    tokenizer: encodes them.
  """

  parts: list[Part]
  text_field: str
  validation: float
  tokenizer: Tokenizer


def prepare(
  source: str,
  tokenizer: str,
  out: str,
  *,
  text_field: str = 'text',
  tfds_dir: str = '',
  validation: float = 0.005,
  licence: str = '',
  run: Callable[[Make, list[int], int], None] | None = None,
) -> prepared.Prepared:
  """Makes a prepared corpus, or what is missing of it.

  Args:
    source, tokenizer, out, text_field, tfds_dir, validation, licence: as the
      flags.
    run: makes parts, given how to make one, the numbers of those to be made,
      and how many there are in total; by default in threads.

  Raises:
    ValueError: the input is bad, or the directory holds another corpus.
  """
  if not 0 <= validation < 1:
    raise ValueError(f'--validation={validation}: must be in [0, 1)')
  directory = prepared.open_directory('--out', out)
  if tfds_dir:
    tfds_dir = _absolute(prepared.open_directory('--tfds_dir', tfds_dir))
  parts = parts_lib.find_parts(source, text_field, tfds_dir)
  vocabulary = _to_be_learnt(tokenizer)
  given = None if vocabulary else pretrained.open_tokenizer(tokenizer)
  asked = {
    'source': source,
    'tokenizer': tokenizer,
    'text_field': text_field,
    'validation': validation,
    'content': cache.content_key(parts, given and given.to_json()),
  }
  with _alone(directory, out):
    if (directory / prepared.MANIFEST).exists():
      before = prepared.Prepared(out, option='--out').manifest
      _check_same(before, asked, out)
    else:
      if not _begun(directory, asked, out):
        made = given or _learn(parts, text_field, vocabulary)
        _begin(directory, asked, parts, made)
      done = _names(directory)
      missing = [i for i in range(len(parts)) if _record(i) not in done]
      place = _absolute(directory)
      _opened(place, asked['content'])  # Once, before all threads do.
      make = functools.partial(make_part, place, asked['content'])
      (run or in_threads)(make, missing, len(parts))
      _write_manifest(directory, asked, len(parts), licence)
    _tidy(directory)
  return prepared.Prepared(out, option='--out')


def _absolute(path: epath.Path) -> str:
  """Returns a path for workers, which may be elsewhere."""
  place = os.fspath(path)
  return place if storage.is_remote(path) else os.path.abspath(place)


@contextlib.contextmanager
def _alone(directory: epath.Path, out: str) -> Iterator[None]:
  """Makes the directory, and refuses to work on it beside another process.

  In a bucket nobody is refused: two would write the same.
  """
  with reading_with_any_library(f'--out={out}'):
    directory.mkdir(parents=True, exist_ok=True)
  if storage.is_remote(directory):
    yield
    return
  import fcntl  # Of Unix.

  descriptor = os.open(directory, os.O_RDONLY)
  try:
    # A file system without locks is as a bucket.
    with contextlib.suppress(OSError):
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise ValueError(
          f'--out={out}: another process prepares it; wait until it has ended'
        ) from error
    yield
  finally:
    os.close(descriptor)


def _check_same(
  before: dict[str, Any], asked: dict[str, Any], out: str
) -> None:
  """Raises ValueError where a corpus was made of something else."""
  changed = [name for name in asked if before.get(name) != asked[name]]
  if changed:
    raise ValueError(
      f'--out={out}: holds what was prepared with another '
      f'{", ".join(changed)}; give another directory'
    )


def _begun(directory: epath.Path, asked: dict[str, Any], out: str) -> bool:
  """Tells whether this was begun; refuses to mix it with something else."""
  path = directory / _JOB
  if path.exists():
    _check_same(prepared.read_json(path), asked, out)
    return True
  if not all(x.endswith(prepared.INCOMPLETE) for x in _names(directory)):
    raise ValueError(f'--out={out}: is not empty; give another directory')
  return False


def _names(directory: epath.Path) -> set[str]:
  """Lists a directory; in a bucket it is there when something is in it."""
  try:
    return {path.name for path in directory.iterdir()}
  except FileNotFoundError:
    return set()


def _begin(
  directory: epath.Path,
  asked: dict[str, Any],
  parts: list[Part],
  tokenizer: Tokenizer,
) -> None:
  """Writes down what is prepared."""
  job = {
    'parts': parts,
    'tokenizer_json': tokenizer.to_json(),
    'vocabulary': tokenizer.vocabulary,
    'end_of_document': tokenizer.end_of_document_token,
  }
  prepared.write_json(directory / _JOB, asked | job)


def _to_be_learnt(name: str) -> int:
  """Returns the N of bpe:N, and 0 for the name of a file."""
  kind, _, count = name.partition(':')
  if kind != 'bpe':
    return 0
  if (
    not re.fullmatch('[0-9]{1,9}', count)
    or not SMALLEST_VOCABULARY <= int(count) <= MOST_VOCABULARY
  ):
    raise ValueError(
      f'--tokenizer={name}: after bpe: comes the number of tokens, '
      f'{SMALLEST_VOCABULARY} or more and {MOST_VOCABULARY} or less'
    )
  return int(count)


def _learn(parts: list[Part], text_field: str, vocabulary: int) -> Tokenizer:
  """Learns a tokenizer from beginnings of parts all over the source."""
  cache.log('learning a tokenizer')
  chosen = parts[:: max(1, len(parts) // 64)]

  def sample() -> Iterator[str]:
    for part in chosen:
      left = SAMPLE_BYTES // len(chosen)
      for text in parts_lib.read_part(part, text_field):
        yield text[:left]
        left -= len(text)
        if left <= 0:
          break

  return Tokenizer.train(sample(), vocabulary)


def make_part(out: str, content: str, number: int) -> dict[str, Any]:
  """Tokenizes a part into its shards; returns what the manifest needs.

  Args:
    out: the directory, whose job.json says what to do.
    content: which job it is.
    number: of the part.
  """
  job = _opened(out, content)
  directory, tokenizer = epath.Path(out), job.tokenizer
  part = job.parts[number]
  splits = {
    name: _Split(directory, f'{name}-{number:05d}', tokenizer.dtype)
    for name in _SPLITS
  }
  end_of_document = np.array([tokenizer.end_of_document], tokenizer.dtype)
  texts = parts_lib.read_part(part, job.text_field)
  for group in groups(
    _stretches(texts, job.validation), STRETCH, lambda each: len(each.text)
  ):
    with reading_with_any_library(f'{part[0].path}: the tokenizer fails'):
      encoded = tokenizer.encode_batch([each.text for each in group])
    for each, ids_N in zip(group, encoded, strict=True):
      split = splits[each.split]
      split.tokens += ids_N.tobytes()
      if each.document_bytes:
        split.tokens += end_of_document.tobytes()
        split.end_document(each.document_bytes)
  done = {name: split.close() for name, split in splits.items()}
  prepared.write_json(directory / _record(number), done)
  return done


@functools.lru_cache(maxsize=1)
def _opened(out: str, content: str) -> Job:
  """Reads a job once in each process."""
  job = prepared.read_json(epath.Path(out) / _JOB)
  if job['content'] != content:
    raise ValueError(f'--out={out}: another corpus is prepared there meanwhile')
  return Job(
    [[Piece(*piece) for piece in part] for part in job['parts']],
    job['text_field'],
    job['validation'],
    Tokenizer.from_json(
      job['tokenizer_json'], job['vocabulary'], job['end_of_document']
    ),
  )


class _Stretch(NamedTuple):
  """Text to be encoded by itself: a document, or a stretch of a long one.

  Attributes:
    text: of it.
    split: that the document belongs to.
    document_bytes: of the document, at its end; 0 elsewhere.
  """

  text: str
  split: str
  document_bytes: int


def _stretches(texts: Iterator[str], validation: float) -> Iterator[_Stretch]:
  """Chooses the split of each document, and divides long ones."""
  for text in texts:
    data = text.encode()
    size = len(data)
    draw = int.from_bytes(hashlib.sha256(data).digest()[:8]) / 2**64
    split = 'validation' if draw < validation else 'train'
    del data
    for stretch, is_last in stretches(text, anywhere=True):
      yield _Stretch(stretch, split, size if is_last else 0)


class _Split:
  """The shards that a part gives to a split.

  Attributes:
    tokens: bytes of those that are not written yet.
  """

  def __init__(self, directory: epath.Path, stem: str, dtype: np.dtype):
    self._directory, self._stem, self._dtype = directory, stem, dtype
    self._shards: list[prepared.Shard] = []
    self._forget()

  def _forget(self) -> None:
    self.tokens = bytearray()
    self._documents = self._bytes = 0

  def end_document(self, size: int) -> None:
    """Counts a document; writes a shard where there is enough for one."""
    self._documents += 1
    self._bytes += size
    if len(self.tokens) >= SHARD_TOKENS * self._dtype.itemsize:
      self._write()

  def _write(self) -> None:
    file = f'{self._stem}-{len(self._shards):03d}.tok'
    tokens_N = np.frombuffer(self.tokens, self._dtype)
    crc32 = prepared.write_shard(self._directory / file, tokens_N)
    counts = len(tokens_N), self._documents, self._bytes
    self._shards.append(prepared.Shard(file, *counts, crc32))
    self._forget()

  def close(self) -> list[dict[str, Any]]:
    """Writes what is left; returns all shards."""
    if self.tokens:
      self._write()
    return [shard._asdict() for shard in self._shards]


def in_threads(
  make: Make, numbers: list[int], total: int, *, workers: int = 0
) -> None:
  """Makes parts on all cores: the tokenizer works without Python's lock."""
  progress = _Progress(total, len(numbers))
  workers = workers or os.cpu_count() or 1
  with futures.ThreadPoolExecutor(workers) as pool:
    waiting = [pool.submit(make, number) for number in numbers]
    try:
      for future in futures.as_completed(waiting):
        progress.add(future.result())
    finally:
      pool.shutdown(cancel_futures=True)
      progress.close()


def on_beam(
  make: Make, numbers: list[int], total: int, *, flags: Sequence[str]
) -> None:
  """Makes parts on Apache Beam, by whatever runner its flags name."""
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise ValueError(
      "--beam: needs Apache Beam; pip install 'moe_jax[beam]'"
    ) from error
  cache.log(f'{len(numbers)} of {total} parts are left to Apache Beam')
  with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
    _ = pipeline | beam.Create(numbers) | beam.Reshuffle() | beam.Map(make)


class _Progress:
  """Shows parts, tokens, and the rate."""

  def __init__(self, total: int, left: int):
    from rich.console import Console
    from rich.progress import Progress

    self._total, self._left = total, left
    self._bytes = self._tokens = 0
    self._started = self._shown = time.monotonic()
    console = Console(stderr=True)
    self._bar = Progress(console=console, disable=not console.is_terminal)
    self._task = self._bar.add_task('parts', total=left)
    self._bar.start()

  def add(self, done: dict[str, Any]) -> None:
    shards = list(itertools.chain(*done.values()))
    self._bytes += sum(shard['bytes'] for shard in shards)
    self._tokens += sum(shard['tokens'] for shard in shards)
    self._left -= 1
    self._bar.update(self._task, advance=1, description=self._told())
    if time.monotonic() > self._shown + 5:
      self._print()

  def close(self) -> None:
    self._bar.stop()
    self._print()

  def _told(self) -> str:
    seconds = max(time.monotonic() - self._started, 1e-3)
    return (
      f'{self._total - self._left} of {self._total} parts, '
      f'{self._tokens / 1e6:.1f} M tokens, '
      f'{self._bytes / seconds / 1e6:.1f} MB/s'
    )

  def _print(self) -> None:
    self._shown = time.monotonic()
    if self._bar.disable:
      print(f'data: {self._told()}', file=sys.stderr, flush=True)


def _record(number: int) -> str:
  return f'part-{number:05d}.json'


def _write_manifest(
  directory: epath.Path, asked: dict[str, Any], count: int, licence: str
) -> None:
  with futures.ThreadPoolExecutor(32) as pool:  # A bucket answers slowly.
    paths = [directory / _record(number) for number in range(count)]
    records = list(pool.map(prepared.read_json, paths))
  splits = {}
  for name in _SPLITS:
    shards = [shard for record in records for shard in record[name]]
    splits[name] = {
      key: sum(shard[key] for shard in shards)
      for key in ('tokens', 'documents', 'bytes')
    } | {'shards': shards}
  if not splits['train']['documents']:
    raise ValueError(f'--source={asked["source"]}: holds no text to train on')
  job = prepared.read_json(directory / _JOB)
  tokenizer = job['tokenizer_json'].encode()
  prepared.write_file(directory / 'tokenizer.json', tokenizer)
  manifest = asked | {
    'format': prepared.FORMAT,
    'licence': licence,
    'vocabulary': job['vocabulary'],
    'end_of_document': job['end_of_document'],
    'tokenizer_sha256': hashlib.sha256(tokenizer).hexdigest(),
    'splits': splits,
  }
  prepared.write_json(directory / prepared.MANIFEST, manifest)


def _tidy(directory: epath.Path) -> None:
  """Removes what a whole corpus has no need of."""
  ends = _JOB, prepared.INCOMPLETE
  with futures.ThreadPoolExecutor(32) as pool:
    for path in directory.iterdir():
      if path.name.endswith(ends) or re.fullmatch(r'part-\d+\.json', path.name):
        pool.submit(path.unlink, missing_ok=True)


def _verify(out: str, workers: int) -> int:
  """Checks every shard; returns the program's exit code."""
  corpus = prepared.Prepared(out, option='--out')
  code = 0
  for tokens in corpus.splits.values():
    for line in tokens.damage(workers or os.cpu_count() or 1):
      print(f'error: {one_line(line)}', file=sys.stderr)
      code = 2
  if not code:
    _print_sizes(corpus)
  return code


def _print_sizes(corpus: prepared.Prepared) -> None:
  for name, split in corpus.manifest['splits'].items():
    print(
      f'{name}: {split["documents"]} documents, {split["tokens"]} tokens, '
      f'{split["bytes"]} bytes'
    )


def _prepare(values: argparse.Namespace, rest: list[str]) -> int:
  run = functools.partial(in_threads, workers=values.workers)
  if values.beam:
    run = functools.partial(on_beam, flags=rest)
  corpus = prepare(
    values.source,
    values.tokenizer,
    values.out,
    text_field=values.text_field,
    tfds_dir=values.tfds_dir,
    validation=values.validation,
    licence=values.licence,
    run=run,
  )
  _print_sizes(corpus)
  return 0


def main(argv: Sequence[str]) -> int:
  """Runs the program; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m moe_jax.data.prepare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    exit_on_error=False,
  )
  for name in ('source', 'tokenizer', 'out'):
    parser.add_argument(f'--{name}', default='')
  parser.add_argument('--text_field', default='text')
  for name in ('tfds_dir', 'licence'):
    parser.add_argument(f'--{name}', default='')
  parser.add_argument('--validation', type=float, default=0.005)
  parser.add_argument('--workers', type=int, default=0)
  parser.add_argument('--beam', action='store_true')
  parser.add_argument('--verify', action='store_true')
  try:
    values, rest = parser.parse_known_args(argv[1:])
    needed = ('out',) if values.verify else ('source', 'tokenizer', 'out')
    for name in needed:
      if not getattr(values, name):
        raise ValueError(f'--{name}=...: missing; --help says what it is')
    if values.workers < 0:
      raise ValueError(f'--workers={values.workers}: must be 0 or more')
    if rest and not values.beam:
      raise ValueError(f'{rest[0]}: unknown; --help lists the flags')
    if values.verify:
      return _verify(values.out, values.workers)
    return _prepare(values, rest)
  except (argparse.ArgumentError, ValueError, OSError) as error:
    print(f'error: {one_line(error)}', file=sys.stderr)
    return 2


if __name__ == '__main__':
  # Workers on other machines import what they are to call by its full name.
  from moe_jax.data.prepare import main as importable

  sys.exit(importable(sys.argv))
