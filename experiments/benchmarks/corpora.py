"""Measures preparation of a corpus, a cold start on a large one, the loader.

  python -m experiments.benchmarks.corpora [--tokens=1e12] [--megabytes=1000] \
      [--batch_size=512] [--sequence_length=2048] [--batches=20]

Preparation: the embedded speeches, over and over, as .jsonl; the tokenizer has
50,257 ids and was learnt of them. A process of its own prepares them on all
cores; its rate is given by the clock and by the time of its cores, beside that
of the tokenizer alone. --megabytes=0 skips it.

Cold start: a corpus of `tokens` is simulated, by a manifest and by shards of
zeros, which are one sparse file with many names. A fresh process opens it,
checks that all shards are there, and gives a batch; then `batches` more, whose
rows lie anywhere. 64 processes of a pod do so at once, each on its machine.

Prints a JSON object and a table.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any
import zlib

from etils import epath
import numpy as np

from moe_jax.data import prepare, prepared
from moe_jax.data.sotu import sotu_files
from moe_jax.data.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 24  # As parts of 64 MB give.
VALIDATION_TOKENS = 80_000

# Of Linux. What getrusage gives is the parent's at first.
PEAK = r"""
def peak():
  import re
  status = open('/proc/self/status').read()
  return int(re.search(r'VmHWM:\s*(\d+) kB', status)[1]) / 1e6
"""
STARTS = r"""
import json, sys, time
from moe_jax import data
from moe_jax.data.prepared import Prepared
directory, batch_size, length, batches = sys.argv[1], *map(int, sys.argv[2:])
began, cores = time.perf_counter(), time.process_time()
found = {}
def lap(name):
  found[name] = time.perf_counter() - began
  found[f'{name}, of its cores'] = time.process_time() - cores
corpus = Prepared(directory)
lap('seconds to open')
corpus.check_files()
lap('seconds until all shards are found')
source = data.Source('train', corpus.splits['train'])
iterator = data.training_batches(
  [source], sequence_length=length, batch_size=batch_size, seed=0)
next(iterator)
lap('seconds to the first batch')
began, cores = time.perf_counter(), time.process_time()
for _ in range(batches):
  next(iterator)
tokens = batches * batch_size * length
found['loader, M tokens/s'] = tokens / 1e6 / (time.perf_counter() - began)
cores = time.process_time() - cores
found['loader, M tokens/s of its cores'] = tokens / 1e6 / cores
found['peak memory of a start, GB'] = peak()
print(json.dumps(found))
"""
PREPARES = r"""
import json, sys, time
from moe_jax.data import prepare
began, cores = time.perf_counter(), time.process_time()
code = prepare.main(sys.argv)
print(json.dumps([
  code, time.perf_counter() - began, time.process_time() - cores, peak()]))
"""


def texts() -> list[str]:
  return [path.read_text() for path in sotu_files()['train']]


def write_source(path: pathlib.Path, size: int) -> None:
  """Writes .jsonl of so many bytes; no two documents are the same."""
  count, documents = 0, texts()
  with path.open('w', encoding='utf-8') as file:
    while file.tell() < size:
      text = f'{count}\n{documents[count % len(documents)]}'
      file.write(json.dumps({'text': text}, ensure_ascii=False) + '\n')
      count += 1


def run(code: str, *arguments: Any) -> Any:
  """Runs a program in a process of its own; returns what it prints last."""
  command = [sys.executable, '-c', PEAK + code, *map(str, arguments)]
  done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def measure_preparation(folder: pathlib.Path, size: int) -> dict[str, float]:
  """Prepares text of so many bytes."""
  tokenizer = Tokenizer.train(texts(), 50_257)
  (folder / 'tokenizer.json').write_text(tokenizer.to_json())
  some = texts()[:40]
  megabytes = sum(len(text.encode()) for text in some) / 1e6
  began = time.process_time()
  tokenizer.encode_batch(some)
  alone = megabytes / (time.process_time() - began)
  write_source(folder / 'text.jsonl', size)
  code, seconds, cores, peak = run(
    PREPARES,
    f'--source={folder}/text.jsonl',
    f'--tokenizer={folder}/tokenizer.json',
    f'--out={folder}/tokens',
  )
  if code:
    raise RuntimeError('the preparation failed')
  megabytes = (folder / 'text.jsonl').stat().st_size / 1e6
  return {
    'MB prepared': megabytes,
    'preparation, MB/s': megabytes / seconds,
    'preparation, MB/s of its cores': megabytes / cores,
    'tokenizer alone, MB/s of its cores': alone,
    'peak memory of preparation, GB': peak,
  }


def simulate(directory: pathlib.Path, tokens: int) -> None:
  """Leaves a corpus of zeros that takes no room."""
  (directory / 'one.txt').write_text('a document of a few words')
  found = prepare.prepare(
    str(directory / 'one.txt'), 'bpe:300', str(directory / 'corpus')
  )
  count = -(-tokens // SHARD_TOKENS)
  splits = {}
  for split, size in (
    ('train', SHARD_TOKENS),
    ('validation', VALIDATION_TOKENS),
  ):
    first = directory / f'{split}.tok'
    crc32 = _write_zeros(first, 2 * size)
    shards = []
    for number in range(count):
      file = f'{split}-{number:05d}-000.tok'
      # A file has fewer names than there are shards.
      if number % 30_000 == 0 and number:
        first = directory / f'{split}-{number}.tok'
        _write_zeros(first, 2 * size)
      (directory / 'corpus' / file).unlink(missing_ok=True)
      os.link(first, directory / 'corpus' / file)
      shard = prepared.Shard(file, size, size // 1000, 4 * size, crc32)
      shards.append(shard._asdict())
    totals = {
      key: sum(shard[key] for shard in shards)
      for key in ('tokens', 'documents', 'bytes')
    }
    splits[split] = totals | {'shards': shards}
  manifest = found.manifest | {'splits': splits}
  path = epath.Path(directory) / 'corpus' / prepared.MANIFEST
  prepared.write_json(path, manifest)


def _write_zeros(path: pathlib.Path, size: int) -> int:
  """Writes a sparse shard; returns the CRC-32 of its checksums."""
  block = prepared.BLOCK
  sizes = [min(block, size - at) for at in range(0, size, block)]
  of_size = {each: zlib.crc32(bytes(each)) for each in set(sizes)}
  table = np.array([of_size[each] for each in sizes], '<u4').tobytes()
  with path.open('wb') as file:
    file.truncate(size)
    file.seek(size)
    file.write(table)
  return zlib.crc32(table)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--tokens', type=float, default=1e12)
  parser.add_argument('--megabytes', type=float, default=1000)
  parser.add_argument('--batch_size', type=int, default=512)
  parser.add_argument('--sequence_length', type=int, default=2048)
  parser.add_argument('--batches', type=int, default=20)
  options = parser.parse_args()
  found: dict[str, float] = {}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    simulate(folder, int(options.tokens))
    found |= run(
      STARTS,
      folder / 'corpus',
      options.batch_size,
      options.sequence_length,
      options.batches,
    )
    manifest = folder / 'corpus' / prepared.MANIFEST
    found['MB of the manifest'] = manifest.stat().st_size / 1e6
    if options.megabytes:
      found |= measure_preparation(folder, int(1e6 * options.megabytes))
  print(json.dumps(found))
  print('\n| what | value |\n| --- | --- |')
  for what, value in found.items():
    print(f'| {what} | {value:.3g} |')


if __name__ == '__main__':
  main()
