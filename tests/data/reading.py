"""Writes text, loads it, and tells what the tokens say."""

import gzip
import json

import numpy as np

from moe_jax import data


def documents_of(tokens, tokenizer):
  """Splits tokens at the ends of documents and decodes them."""
  ends = np.flatnonzero(tokens == tokenizer.end_of_document)
  assert ends[-1] == len(tokens) - 1
  return [
    tokenizer.decode(part[:-1]) for part in np.split(tokens, ends + 1)[:-1]
  ]


def sizes(tokens, tokenizer):
  """Number of documents and bytes."""
  counts = data.token_counts(tokens, tokenizer.vocabulary)
  return (
    counts[tokenizer.end_of_document],
    counts @ tokenizer.token_bytes_V,
  )


def write(path, documents):
  """Writes documents in the format that the file's name asks for."""
  if '.jsonl' in path.suffixes:
    lines = [json.dumps({'text': text, 'n': 1}) for text in documents]
    content = '\n'.join(lines) + '\n\n'
  else:
    (content,) = documents
  opener = gzip.open if path.suffix == '.gz' else open
  with opener(path, 'wb') as file:
    file.write(content.encode())


def load(folder, files, **options):
  config = data.DataConfig(
    dataset='text_files',
    files=files,
    vocabulary=300,
    evaluation_sets='validation',
    cache_dir=str(folder / 'cache'),
    **options,
  )
  return data.load_text(config)


def train_and_validation(text):
  return (
    documents_of(text.train[0].tokens, text.tokenizer),
    documents_of(text.evaluation['validation'], text.tokenizer),
  )
