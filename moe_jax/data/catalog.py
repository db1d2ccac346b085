"""TFDS data sets by name, read without TensorFlow.

Importing this takes seconds, because it imports tensorflow_datasets.
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import difflib
import functools
import importlib
import os
import re

from absl import logging
from etils import epath
import tensorflow_datasets as tfds

from moe_jax.data import cache, documents, prepared
from moe_jax.data.config import DataConfig
from moe_jax.data.documents import Corpus
from moe_jax.options import shown

_FORMAT = 1  # Part of every key: raise it when this file reads differently.


def open_corpora(
  config: DataConfig, known: Sequence[str] = ()
) -> dict[str, Corpus]:
  """Opens a TFDS data set that is prepared as array_record.

  Args:
    config: has its name, such as 'lm1b' or 'wikipedia/20230601.en:1.0.0', the
      name of a text feature and where TFDS data sets are prepared.
    known: names of other sources, for a hint at a name that is misspelt.

  Returns:
    The corpora 'train' and 'validation'; the latter is the split validation,
    else test, else the last 5 % of train.

  Raises:
    ValueError: there is no such data set or field, it is not prepared or
      cannot be read here.
  """
  where = f'data.dataset={config.dataset}'
  builder = _open_builder(config, where, 'data.', known)
  field = config.text_field
  # TFDS promises that name and version determine the content.
  name = builder.info.full_name
  content = sorted(prepared.file_sizes(builder.data_path).items())
  corpora = {}
  for ours, theirs in _choose_splits(builder, where).items():
    source = _open_split(builder, theirs, where, 'data.')
    key = cache.content_key('tfds', _FORMAT, name, theirs, field, content)
    read = functools.partial(texts, source, field, where, range(len(source)))
    corpora[ours] = Corpus(key, read)
  return corpora


def open_training_split(config: DataConfig) -> Sequence[dict]:
  """Opens the split 'train' of a TFDS data set for the flags of `prepare`.

  Returns:
    The records by number.

  Raises:
    ValueError: as of `open_corpora`.
  """
  where = f'--source=tfds:{config.dataset}'
  builder = _open_builder(config, where, '--')
  return _open_split(builder, 'train', where, '--')


def _open_builder(
  config: DataConfig, where: str, prefix: str, known: Sequence[str] = ()
) -> tfds.core.DatasetBuilder:
  """Finds a data set that has the text.

  Args:
    config: as of `open_corpora`.
    where: the start of messages.
    prefix: of the names of options in them.
    known: as of `open_corpora`.
  """
  builder = _find_builder(config, where, prefix, known)
  field, features = config.text_field, builder.info.features
  if field not in features or not isinstance(
    features[field], tfds.features.Text
  ):
    raise ValueError(
      f'{prefix}text_field={field}: {where} has no such text; it has the '
      f'fields {", ".join(features)}'
    )
  return builder


def _find_builder(
  config: DataConfig, where: str, prefix: str, known: Sequence[str]
) -> tfds.core.DatasetBuilder:
  hint = f'give {", ".join([*known, "a TFDS name such as lm1b"])}'
  # Names with a namespace would be looked up on the network.
  pattern = r'\w+(/\w[\w.+-]*)?(:\d+\.\d+\.\d+)?'
  if not re.fullmatch(pattern, config.dataset, re.A):
    raise ValueError(f'{where}: not a data set name; {hint}')
  # Without TensorFlow, TFDS leaves its older text data sets unregistered.
  importlib.import_module('tensorflow_datasets.text')
  data_dir = config.tfds_dir and str(epath.Path(config.tfds_dir).expanduser())
  with _told(where), _quiet(), _known_features():
    try:
      builder = tfds.builder(config.dataset, data_dir=data_dir or None)
      is_prepared = builder.is_prepared()
    except tfds.core.DatasetNotFoundError as error:
      names = [*known, *tfds.list_builders(with_community_datasets=False)]
      close = difflib.get_close_matches(
        re.split('[/:]', config.dataset)[0], names
      )
      hint = f'did you mean {" or ".join(close)}?' if close else hint
      raise LookupError(f'no such data set; {hint}') from error
  if not is_prepared:
    raise ValueError(
      f'{where}: not prepared in {builder.data_path}; install TensorFlow, for '
      'some data sets also Apache Beam, and prepare it by tfds build '
      f'{config.dataset} --file_format=array_record --data_dir=DIR, then set '
      f'{prefix}tfds_dir to that directory'
    )
  return builder


def _choose_splits(
  builder: tfds.core.DatasetBuilder, where: str
) -> dict[str, str]:
  """Maps our splits to those of a TFDS data set."""
  splits = list(builder.info.splits)
  if 'train' not in splits:
    raise ValueError(f'{where}: has no split train, only {", ".join(splits)}')
  for split in ('validation', 'test'):
    if split in splits:
      return {'train': 'train', 'validation': split}
  return {'train': 'train[:95%]', 'validation': 'train[95%:]'}


def _open_split(
  builder: tfds.core.DatasetBuilder, split: str, where: str, prefix: str
) -> Sequence[dict]:
  """Opens a split, whose files must be in the data set's own directory."""
  folder = os.path.normpath(builder.data_path)
  for path in builder.info.splits[split.partition('[')[0]].filepaths:
    if os.path.dirname(os.path.normpath(path)) != folder:
      raise ValueError(
        f'{where}: prepared in {builder.data_path}, but its split {split} is '
        f'in {shown(str(path))}'
      )
  if not builder.info.splits[split].num_examples:
    raise ValueError(f'{where}: no documents in split {split}')
  with _told(f'{where}: cannot be read from {builder.data_path}'):
    try:
      return builder.as_data_source(split)
    except NotImplementedError as error:
      raise ValueError(
        f'prepared as {builder.info.file_format.value}, but only array_record '
        'can be read; prepare it so in another directory and set '
        f'{prefix}tfds_dir to that'
      ) from error


def texts(
  source: Sequence[dict], field: str, where: str, numbers: Iterable[int]
) -> Iterator[str]:
  """Yields the texts of a TFDS data source that have these numbers."""
  for i in numbers:
    with _told(f'{where}: document {i} cannot be read'):
      text = source[i][field]
    with documents.reading(f'{where}: document {i}'):
      text = documents.decode(text) if isinstance(text, bytes) else text
    yield text


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
  """Turns errors, of any kind in TFDS, into one line that begins with `where`.

  Prepared data may hold anything, and builders may do anything.
  """
  try:
    yield
  except Exception as error:
    line = str(error).strip().partition('\n')[0] or type(error).__name__
    raise ValueError(f'{where}: {line}') from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences TFDS, which warns of data that is not prepared."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _known_features() -> Iterator[None]:
  """Keeps TFDS from importing modules that prepared data name.

  `features.json` names the classes of its features; TFDS imports the module of
  those that it does not know, and runs its code. A directory from elsewhere
  must not choose what is run.
  """
  feature = tfds.features.FeatureConnector
  known, original = feature._registered_features, vars(feature)['cls_from_name']

  def cls_from_name(name: str) -> type[tfds.features.FeatureConnector]:
    if name not in known:
      raise ValueError(f'features.json names {shown(name)}, no feature of TFDS')
    return known[name]

  feature.cls_from_name = staticmethod(cls_from_name)
  try:
    yield
  finally:
    feature.cls_from_name = original
