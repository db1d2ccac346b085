"""Files of tensors: read as they were written, damage is named."""

import json

from etils import epath
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.hf import tensor_files


def planned(values, dtype='F32'):
  return tensor_files.Planned(dtype, values.shape, lambda: values)


@pytest.fixture
def folder(tmp_path):
  return epath.Path(tmp_path)


def write(folder, **arrays):
  """Writes float32 arrays into one file."""
  tensor_files.write(folder, {k: planned(v) for k, v in arrays.items()})
  return folder / tensor_files.SINGLE


def header_of(path):
  data = path.read_bytes()
  size = int.from_bytes(data[:8], 'little')
  return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(path, header, data):
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data)


@pytest.mark.parametrize('dtype', tensor_files.DTYPES)
def test_values_return_with_the_same_bits(folder, dtype):
  numbers = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  stored = numbers.astype(tensor_files.DTYPES[dtype])
  values = stored.astype(np.float32)
  scalar, nothing = np.float32(2.0).reshape(()), np.zeros((0, 4), np.float32)
  tensors = {'a': values, 'b': scalar, 'c': nothing}
  tensor_files.write(folder, {k: planned(v, dtype) for k, v in tensors.items()})
  found = tensor_files.find(folder)
  assert list(found) == ['a', 'b', 'c']
  for name, value in tensors.items():
    assert found[name].dtype == dtype and found[name].shape == value.shape
    np.testing.assert_array_equal(found[name].read(), value)
  # Byte by byte, as the format says.
  header, data = header_of(folder / tensor_files.SINGLE)
  start, end = header['a']['data_offsets']
  assert data[start:end] == stored.tobytes()


def test_bfloat16_is_rounded_to_nearest(folder):
  values = np.array([1 + 2**-8, 1 + 3 * 2**-9], np.float32)
  tensor_files.write(folder, {'a': planned(values, 'BF16')})
  expected = values.astype(jnp.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(tensor_files.find(folder)['a'].read(), expected)


def test_many_tensors_are_several_files_with_an_index(folder):
  arrays = {f'x{i}': np.full(10, i, np.float32) for i in range(5)}
  tensor_files.write(
    folder, {k: planned(v) for k, v in arrays.items()}, shard=80
  )
  index = json.loads((folder / tensor_files.INDEX).read_text())
  assert index['metadata'] == {'total_size': 200}
  assert len(set(index['weight_map'].values())) == 3
  found = tensor_files.find(folder)
  for name, value in arrays.items():
    np.testing.assert_array_equal(found[name].read(), value)


def test_one_file_that_is_cut_off_or_too_long(folder):
  path = write(folder, a=np.ones(100, np.float32))
  whole = path.read_bytes()
  for data in (whole[:-1], whole + b'x', whole[:40], whole[:4], b''):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f'{path}: .*(cut off|no file)'):
      tensor_files.find(folder)


@pytest.mark.parametrize(
  'entry',
  [
    {'shape': [4, 25]},  # Another file's, of other sizes.
    {'shape': [-4, -25]},
    {'shape': 'ab'},
    {'dtype': None},
    {'data_offsets': [0]},
    {'data_offsets': [0, 1e400]},
    {'data_offsets': [-8, 392]},
  ],
)
def test_a_header_that_lies(folder, entry):
  path = write(folder, a=np.ones((10, 11), np.float32))
  header, data = header_of(path)
  header['a'] |= entry
  with_header(path, header, data)
  if entry == {'dtype': None}:  # Refused by those who need the tensor.
    assert tensor_files.find(folder)['a'].dtype is None
  else:
    with pytest.raises(ValueError, match=f'{path}: its header is damaged'):
      tensor_files.find(folder)


@pytest.mark.parametrize(
  'header', ['[]', '{"a": 3}', '{"a"', '"a"', '[' * 100_000]
)
def test_a_header_that_is_none(folder, header):
  path = folder / tensor_files.SINGLE
  path.write_bytes(len(header).to_bytes(8, 'little') + header.encode())
  with pytest.raises(ValueError, match=f'{path}: its header is damaged'):
    tensor_files.find(folder)


def test_an_index_must_be_true(folder):
  write(folder, a=np.ones(3, np.float32))
  index = folder / tensor_files.INDEX
  for places, message in (
    ({'a': 'other.safetensors'}, "names 'other.safetensors', which is not"),
    ({'a': '../model.safetensors'}, 'which is not there'),
    ({'b': tensor_files.SINGLE}, "has no 'b', which the index says"),
    ({}, 'has no weight_map'),
  ):
    index.write_text(json.dumps({'weight_map': places}))
    with pytest.raises(ValueError, match=message):
      tensor_files.find(folder)
  index.write_text('{')
  with pytest.raises(ValueError, match='damaged, not JSON'):
    tensor_files.find(folder)


def test_pickles_are_never_read(folder):
  (folder / 'pytorch_model.bin').write_bytes(b'\x80\x04')
  with pytest.raises(ValueError, match='pytorch_model.bin is a pickle'):
    tensor_files.find(folder)
