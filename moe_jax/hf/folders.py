"""Folders that are there whole or not at all."""

from collections.abc import Iterator
import contextlib

from etils import epath

from moe_jax.runs import files

# In a work directory: what an imported model was, to be exported as it was.
PUBLIC = 'public.json'
# Beside its tensors: what is exported as it came.
BESIDE = (
  'generation_config.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
)


@contextlib.contextmanager
def made(path: str, flag: str) -> Iterator[epath.Path]:
  """Yields a folder to fill, which is at `path` when all went well.

  Args:
    path: must not exist, or be empty.
    flag: that it was given by, for messages.

  Raises:
    ValueError: there is something.
  """
  place = files.absolute(path)
  if place.exists() and (not place.is_dir() or any(place.iterdir())):
    raise ValueError(f'{flag}={path}: is not empty; choose another place')
  partial = place.parent / f'{place.name}.partial'
  if partial.exists():
    partial.rmtree()  # Of a program that was ended.
  partial.mkdir(parents=True)
  try:
    yield partial
  except BaseException:
    partial.rmtree()
    raise
  if place.exists():
    place.rmdir()
  partial.rename(place)
