"""Makes a corpus of tokens, ready to be trained on, of text from anywhere.

  python -m moe_jax.data.prepare --source='texts/*.parquet' \\
      --tokenizer=tokenizer.json --out=DIR [--text_field=text] \\
      [--validation=0.005] [--licence=...] [--workers=2] [--beam ...]

--source: comma-separated paths and globs of .txt (one document a file), .jsonl
(one a line), .gz and .zst of both, .parquet, folders of Hugging Face's
`datasets`, and tfds:NAME; local, gs://, or whatever fsspec opens.
--tokenizer: a tokenizer.json, a SentencePiece model, a folder with either, or
bpe:N, which learns N tokens from a sample of the source.
--out: a directory, local or gs://..., to be given to --config.data.corpus.
--validation: share of the documents that are held out, by their hash.
--beam: runs on Apache Beam; further flags are its own (--runner=...).

Killed, the same command resumes: what is finished is kept. With --verify and
--out alone, every block of a corpus is read and checked. Exit codes: 0 done,
2 refused, 1 anything else.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import functools
import hashlib
import itertools
import json
import os
import sys
import time
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from moe_jax.data import parts as parts_lib
from moe_jax.data import prepared, pretrained
from moe_jax.data.parts import Part
from moe_jax.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer, groups
from moe_jax.options import one_line

SHARD_TOKENS = 1 << 25
SAMPLE_BYTES = 1 << 25  # Of text that bpe:N learns from.
_GROUP = 1 << 20  # Characters that are encoded at once.
_SPLITS = ('train', 'validation')


class Job(NamedTuple):
  """All that decides what the shards hold.

  Attributes:
    out: the directory.
    parts: of the source.
    validation: share of the documents that are held out.
    tokenizer_json: of the tokenizer.
    vocabulary: its number of ids.
    end_of_document: its token.
  """

  out: str
  parts: list[Part]
  validation: float
  tokenizer_json: str
  vocabulary: int
  end_of_document: str


def prepare(
  source: str,
  tokenizer: str,
  out: str,
  *,
  text_field: str = 'text',
  validation: float = 0.005,
  licence: str = '',
  run: Callable[[Job, list[int]], None] | None = None,
) -> prepared.Prepared:
  """Makes a prepared corpus, or what is missing of it.

  Args:
    source, tokenizer, out, text_field, validation, licence: as the flags.
    run: calls `make_part` for each of some numbers; by default in threads.

  Raises:
    ValueError: the input is bad, or the directory holds another corpus.
  """
  if not 0 <= validation < 1:
    raise ValueError(f'--validation={validation}: must be in [0, 1)')
  directory = epath.Path(out).expanduser()
  found = parts_lib.find_parts(source, text_field)
  directory.mkdir(parents=True, exist_ok=True)
  asked = {
    'source': source,
    'tokenizer': tokenizer,
    'text_field': text_field,
    'validation': validation,
    'sizes': [[part.path, part.size] for part in found],
  }
  _check_same(directory, out, asked)
  if (directory / prepared.MANIFEST).exists():
    return prepared.Prepared(out)
  made = _tokenizer(directory, tokenizer, found)
  job = Job(
    os.fspath(directory),
    found,
    validation,
    made.to_json(),
    made.vocabulary,
    made.end_of_document_token,
  )
  missing = [
    number for number in range(len(found)) if not _done(directory, number)
  ]
  (run or in_threads)(job, missing)
  _write_manifest(directory, job, asked, licence)
  return prepared.Prepared(out)


def _check_same(directory: epath.Path, out: str, asked: dict) -> None:
  """Writes down what is prepared, or refuses to mix it with something else."""
  path = directory / 'job.json'
  if path.exists():
    before = json.loads(path.read_text())
    changed = [name for name in asked if before.get(name) != asked[name]]
    if changed:
      names = ', '.join('source' if n == 'sizes' else n for n in changed)
      raise ValueError(
        f'--out={out}: holds what was prepared with another {names}; give '
        'another directory'
      )
  elif any(directory.iterdir()):
    raise ValueError(f'--out={out}: is not empty; give another directory')
  else:
    _write(path, json.dumps(asked, indent=1))


def _tokenizer(
  directory: epath.Path, name: str, found: list[Part]
) -> Tokenizer:
  """Opens the tokenizer, or learns it once from a sample of the source."""
  path, count = directory / 'tokenizer.json', name.removeprefix('bpe:')
  if count == name:
    tokenizer = pretrained.open_tokenizer(name)
  elif not count.isdigit() or int(count) < SMALLEST_VOCABULARY:
    raise ValueError(
      f'--tokenizer={name}: after bpe: comes the number of tokens, '
      f'{SMALLEST_VOCABULARY} or more'
    )
  elif path.exists():
    tokenizer = Tokenizer.from_json(path.read_text(), int(count))
  else:
    print('data: learning a tokenizer', file=sys.stderr, flush=True)
    tokenizer = Tokenizer.train(_sample(found), int(count))
  if not path.exists():
    _write(path, tokenizer.to_json())
  return tokenizer


def _sample(found: list[Part]) -> Iterator[str]:
  """Yields documents from the beginnings of parts all over the source."""
  chosen = found[:: max(1, len(found) // 64)]
  for part in chosen:
    left = SAMPLE_BYTES // len(chosen)
    for text in parts_lib.read_part(part):
      yield text
      left -= len(text)
      if left < 0:
        break


def make_part(job: Job, number: int) -> dict[str, Any]:
  """Tokenizes one part into its shards; returns what the manifest needs."""
  tokenizer = _opened(job.tokenizer_json, job.vocabulary, job.end_of_document)
  directory = epath.Path(job.out)
  splits = {name: _Split(directory, name, number) for name in _SPLITS}
  end_N = np.array([tokenizer.end_of_document], tokenizer.dtype)
  texts_of_part = parts_lib.read_part(job.parts[number])
  for texts in groups(texts_of_part, _GROUP):
    encoded = tokenizer.encode_batch(texts)
    for text, ids_N in zip(texts, encoded, strict=True):
      data = text.encode()
      draw = int.from_bytes(hashlib.sha256(data).digest()[:8]) / 2**64
      split = splits['validation' if draw < job.validation else 'train']
      split.add(len(data), ids_N, end_N)
  done = {name: split.close() for name, split in splits.items()}
  _write(directory / _record(number), json.dumps(done))
  return done


@functools.lru_cache(maxsize=1)
def _opened(text: str, vocabulary: int, end_of_document: str) -> Tokenizer:
  return Tokenizer.from_json(text, vocabulary, end_of_document)


class _Split:
  """The shards that a part gives to a split."""

  def __init__(self, directory: epath.Path, name: str, number: int):
    self._directory, self._stem = directory, f'{name}-{number:05d}'
    self._shards: list[prepared.Shard] = []
    self._forget()

  def _forget(self) -> None:
    self._tokens: list[np.ndarray] = []
    self._count = self._documents = self._bytes = 0

  def add(self, size: int, *tokens: np.ndarray) -> None:
    self._tokens += tokens
    self._count += sum(map(len, tokens))
    self._documents += 1
    self._bytes += size
    if self._count >= SHARD_TOKENS:
      self._write()

  def _write(self) -> None:
    file = f'{self._stem}-{len(self._shards):03d}.tok'
    tokens_N = np.concatenate(self._tokens)
    crc32 = prepared.write_shard(self._directory / file, tokens_N)
    counts = len(tokens_N), self._documents, self._bytes
    self._shards.append(prepared.Shard(file, *counts, crc32))
    self._forget()

  def close(self) -> list[dict[str, Any]]:
    """Writes what is left; returns all shards."""
    if self._count:
      self._write()
    return [shard._asdict() for shard in self._shards]


def in_threads(job: Job, numbers: list[int], workers: int = 0) -> None:
  """Makes parts on all cores: the tokenizer works without Python's lock."""
  progress = _Progress(job, numbers)
  workers = workers or os.cpu_count() or 1
  with futures.ThreadPoolExecutor(workers) as pool:
    waiting = [pool.submit(make_part, job, number) for number in numbers]
    try:
      for future in futures.as_completed(waiting):
        progress.add(future.result())
    finally:
      pool.shutdown(cancel_futures=True)
      progress.close()


def on_beam(job: Job, numbers: list[int], *, flags: Sequence[str]) -> None:
  """Makes parts on Apache Beam, by whatever runner its flags name."""
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise ValueError(
      "--beam: needs Apache Beam; pip install 'moe_jax[beam]'"
    ) from error
  with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
    _ = (
      pipeline
      | beam.Create(numbers)
      | beam.Reshuffle()
      | beam.Map(functools.partial(make_part, job))
    )


class _Progress:
  """Shows parts, tokens, and the rate."""

  def __init__(self, job: Job, numbers: list[int]):
    from rich.console import Console
    from rich.progress import Progress

    self._total, self._left = len(job.parts), len(numbers)
    self._bytes = self._tokens = 0
    self._started = self._shown = time.monotonic()
    console = Console(stderr=True)
    self._bar = Progress(console=console, disable=not console.is_terminal)
    self._task = self._bar.add_task('parts', total=len(numbers))
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


def _done(directory: epath.Path, number: int) -> bool:
  """Tells whether a part was finished; its record is written last."""
  return (directory / _record(number)).exists()


def _write_manifest(
  directory: epath.Path, job: Job, asked: dict, licence: str
) -> None:
  records = [
    json.loads((directory / _record(number)).read_text())
    for number in range(len(job.parts))
  ]
  splits = {}
  for name in _SPLITS:
    shards = [shard for record in records for shard in record[name]]
    splits[name] = {
      key: sum(shard[key] for shard in shards)
      for key in ('tokens', 'documents', 'bytes')
    } | {'shards': shards}
  if not splits['train']['documents']:
    raise ValueError(f'--source={asked["source"]}: holds no text to train on')
  manifest = {
    'format': prepared.FORMAT,
    'source': asked['source'],
    'text_field': asked['text_field'],
    'licence': licence,
    'validation': job.validation,
    'tokenizer': {
      'name': asked['tokenizer'],
      'vocabulary': job.vocabulary,
      'end_of_document': job.end_of_document,
    },
    'splits': splits,
  }
  _write(directory / prepared.MANIFEST, json.dumps(manifest, indent=1))
  for number in range(len(job.parts)):
    (directory / _record(number)).unlink(missing_ok=True)


def _write(path: epath.Path, text: str) -> None:
  """Writes a file that is whole or not there."""
  beside = path.with_name(f'{path.name}.incomplete')
  beside.write_text(text)
  beside.replace(path)


def _prepared_by(
  values: argparse.Namespace, rest: list[str]
) -> prepared.Prepared:
  run = functools.partial(in_threads, workers=values.workers)
  if values.beam:
    run = functools.partial(on_beam, flags=rest)
  return prepare(
    values.source,
    values.tokenizer,
    values.out,
    text_field=values.text_field,
    validation=values.validation,
    licence=values.licence,
    run=run,
  )


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
  parser.add_argument('--licence', default='')
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
    if rest and not values.beam:
      raise ValueError(f'{rest[0]}: unknown; --help lists the flags')
    if values.verify:
      corpus = prepared.Prepared(values.out)
      for tokens in corpus.splits.values():
        tokens.verify()
    else:
      corpus = _prepared_by(values, rest)
  # fsspec says so where a protocol needs a package.
  except (argparse.ArgumentError, ImportError, ValueError, OSError) as error:
    print(f'error: {one_line(error)}', file=sys.stderr)
    return 2
  for name, split in corpus.manifest['splits'].items():
    print(
      f'{name}: {split["documents"]} documents, {split["tokens"]} tokens, '
      f'{split["bytes"]} bytes'
    )
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
