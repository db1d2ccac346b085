"""Files of tensors in the format of safetensors, read and written one by one.

A file is the length of its header, 8 bytes; the header, JSON: name -> dtype,
shape and place; and the tensors, row by row, little-endian. The library of that
name maps files into memory and writes from all tensors at once; a model that
just fits into memory is read and written here. Nothing in a file can run code.
"""

from collections.abc import Callable, Iterable, Mapping
import json
import math
from typing import Any, NamedTuple, Optional

from etils import epath
import jax.numpy as jnp
import numpy as np

from moe_jax.options import shown
from moe_jax.runs import files as run_files

# What a tensor may be made of.
DTYPES = {
  'F32': np.dtype(np.float32),
  'BF16': np.dtype(jnp.bfloat16),
  'F16': np.dtype(np.float16),
}
# What means nothing without its scale.
FP8 = 'F8_E4M3'
_SIZED = DTYPES | {FP8: np.dtype(jnp.float8_e4m3fn)}
INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
_LARGEST_HEADER = 100_000_000  # As of the format's own library.
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
_SHARD = 5 * 10**9  # Bytes of tensors in a file that is written.


class Tensor(NamedTuple):
  """Where a tensor is.

  Attributes:
    file: path.
    dtype: as the format calls it, such as 'BF16'.
    shape: sizes of its axes.
    start: first byte.
    scale: [rows / block, columns / block], rounded up: the factor of each block
      of a matrix; None where there is none.
    block: rows and columns that have one factor.
  """

  file: epath.Path
  dtype: str
  shape: tuple[int, ...]
  start: int
  scale: Optional['Tensor'] = None
  block: tuple[int, int] = (0, 0)

  def read(self) -> np.ndarray:
    """Returns its values, float32.

    Raises:
      OSError: the file is shorter than it was.
    """
    dtype, count = _SIZED[self.dtype], math.prod(self.shape)
    with self.file.open('rb') as file:
      file.seek(self.start)
      data = file.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
      raise OSError(f'{self.file}: ends too early')
    values = np.frombuffer(data, dtype.newbyteorder('<')).reshape(self.shape)
    values = values.astype(np.float32, copy=False)
    if self.scale is not None:
      rows, columns = (
        np.arange(size) // block
        for size, block in zip(self.shape, self.block, strict=True)
      )
      values *= self.scale.read()[np.ix_(rows, columns)]
    return values


def find(folder: epath.Path) -> dict[str, Tensor]:
  """Finds the tensors of a checkpoint, one file or many; reads headers alone.

  Args:
    folder: has model.safetensors, or an index of several files.

  Raises:
    ValueError: there is none of these, or one is damaged.
  """
  if (folder / INDEX).exists():
    return _indexed(folder)
  if (folder / SINGLE).exists():
    return read_header(folder / SINGLE)
  files = sorted(path.name for path in folder.iterdir())
  pickles = [f for f in files if f.endswith(('.bin', '.pt', '.pth'))]
  why = (
    f'{pickles[0]} is a pickle, which could run code: convert it to safetensors'
    if pickles
    else f'it has {names(files) or "no file"}'
  )
  raise ValueError(f'{folder}: no {SINGLE} nor {INDEX}; {why}')


def _indexed(folder: epath.Path) -> dict[str, Tensor]:
  places = read_json(folder / INDEX).get('weight_map')
  if not isinstance(places, dict) or not places:
    raise ValueError(f'{folder / INDEX}: has no weight_map')
  headers = {}
  for file in set(map(str, places.values())):
    # An index from elsewhere must not name files outside of the folder.
    if epath.Path(file).name != file or not (folder / file).exists():
      raise ValueError(
        f'{folder / INDEX}: names {shown(file)}, which is not there; get all '
        'files of the checkpoint'
      )
    headers[file] = read_header(folder / file)
  found = {}
  for name, file in places.items():
    if name not in headers[file]:
      raise ValueError(
        f'{folder / file}: has no {shown(name)}, which the index says is in it'
      )
    found[name] = headers[file][name]
  return found


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads an object; raises ValueError, with the path, if there is none."""
  try:
    value = run_files.read_json(path)
  except FileNotFoundError as error:
    raise ValueError(f'{path}: is not there') from error
  except RecursionError as error:
    raise ValueError(f'{path}: damaged, not JSON ({error})') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path}: must have an object, not {shown(value)}')
  return value


def read_header(path: epath.Path) -> dict[str, Tensor]:
  """Reads which tensors a file has.

  Raises:
    ValueError: it is cut off, or not such a file.
  """
  size = path.stat().length
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
      raise ValueError(f'{path}: cut off, or no file of safetensors')
    text = file.read(length)
  try:
    header = json.loads(text)
    header.pop('__metadata__', None)
    found = {
      name: _tensor(path, entry, 8 + length) for name, entry in header.items()
    }
    ends = [8 + length + entry['data_offsets'][1] for entry in header.values()]
  except _DAMAGE as error:
    raise ValueError(f'{path}: its header is damaged ({error})') from error
  if max(ends, default=size) != size:
    raise ValueError(
      f'{path}: has {size} bytes, not the {max(ends)} of its tensors: cut off '
      'or overwritten'
    )
  return found


def _tensor(path: epath.Path, entry: dict[str, Any], start: int) -> Tensor:
  dtype, shape = entry['dtype'], tuple(entry['shape'])
  first, end = entry['data_offsets']
  numbers = (*shape, first, end)
  if not all(type(number) is int and number >= 0 for number in numbers):
    raise ValueError(f'no shape or place: {shown(entry)}')
  known = _SIZED.get(dtype)
  if known and end - first != math.prod(shape) * known.itemsize:
    raise ValueError(f'no such size: {shown(entry)}')
  return Tensor(path, dtype, shape, start + first)


class Planned(NamedTuple):
  """A tensor to write.

  Attributes:
    dtype: as the format calls it.
    shape: sizes of its axes.
    values: makes it, float32.
  """

  dtype: str
  shape: tuple[int, ...]
  values: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    """Bytes of it."""
    return math.prod(self.shape) * _SIZED[self.dtype].itemsize


def write(
  folder: epath.Path, tensors: Mapping[str, Planned], shard: int = _SHARD
) -> None:
  """Writes a checkpoint; makes one tensor after the other.

  Args:
    folder: exists.
    tensors: by name.
    shard: bytes of tensors that a file may have, or one tensor.
  """
  groups, room = [], 0
  for name, tensor in sorted(tensors.items()):
    if tensor.size > room:
      groups.append([])
      room = shard
    groups[-1].append(name)
    room -= tensor.size
  if len(groups) == 1:
    _write_file(folder / SINGLE, {name: tensors[name] for name in groups[0]})
    return
  places = {}
  for number, names in enumerate(groups, 1):
    file = f'model-{number:05d}-of-{len(groups):05d}.safetensors'
    _write_file(folder / file, {name: tensors[name] for name in names})
    places |= dict.fromkeys(names, file)
  total = sum(tensor.size for tensor in tensors.values())
  index = {'metadata': {'total_size': total}, 'weight_map': places}
  (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def _write_file(path: epath.Path, tensors: Mapping[str, Planned]) -> None:
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, tensor in tensors.items():
    start, end = end, end + tensor.size
    header[name] = {
      'dtype': tensor.dtype,
      'shape': tensor.shape,
      'data_offsets': [start, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # Tensors begin at a multiple of 8.
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for tensor in tensors.values():
      dtype = _SIZED[tensor.dtype]
      values = tensor.values().astype(dtype.newbyteorder('<'))
      file.write(np.ascontiguousarray(values).tobytes())


def names(several: Iterable[str]) -> str:
  """Returns the first of several names, and how many more there are."""
  several = sorted(several)
  more = f' and {len(several) - 3} more' if len(several) > 3 else ''
  return ', '.join(map(shown, several[:3])) + more
