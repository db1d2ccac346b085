"""A checkpoint holds everything that a router remembers."""

import math
import shutil
from unittest import mock

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe_jax import config as config_lib
from moe_jax import storage
from moe_jax.options import Refused
from moe_jax.parallel import mesh as meshes
from moe_jax.runs import checkpoints as checkpoint_lib
from moe_jax.runs import checksums as checksum_lib
from moe_jax.runs import files
from moe_jax.runs.saver import Saver
from moe_jax.train import state as state_lib
from tests import buckets
from tests.train import tiny


def open_saver(directory, config, run='name', losses=None, largest=0):
  options, losses = config_lib.to_dict(config), {} if losses is None else losses
  return Saver(directory, options, run, losses=losses, largest=largest)


def save(directory, config, items, position, run='name'):
  with open_saver(directory, config, run) as saver:
    saver.save(items, position, record={'step': position.step})


def restore(directory, training, run='name'):
  return checkpoint_lib.restore_newest(
    directory, run, lambda config: checkpoint_lib.items_of(training.abstract)
  )


@pytest.mark.parametrize(
  'method',
  [
    pytest.param('midpoint_lag', marks=pytest.mark.long),
    'quantile_histogram',
  ],
)
def test_pending_prices_and_histograms_come_back(method, tmp_path):
  config = tiny.tiny_config(tmp_path, method)
  mesh = meshes.make_mesh(1, 1, devices=jax.devices()[:1])
  training = state_lib.make_training(config, mesh)
  state = training.init()
  leaves, structure = jax.tree.flatten(state.router)
  leaves = [
    leaf + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape) + i
    for i, leaf in enumerate(leaves)
  ]
  items = checkpoint_lib.items_of(state) | {
    'router': structure.unflatten(leaves)
  }
  shapes = {leaf.shape for leaf in leaves}
  layers, experts = config.model.layers, config.model.experts
  if method == 'midpoint_lag':  # Prices and those that wait; loads so far.
    kinds = sorted(leaf.dtype.name for leaf in leaves if leaf.ndim == 2)
    assert kinds == ['float32', 'float32', 'int32']
    assert shapes == {(layers, experts), (layers,)}
  else:
    assert (layers, experts, 1000) in shapes
  position = checkpoint_lib.Position(3, 24, skipped=2, skipped_in_a_row=1)
  save(tmp_path / 'saved', config, items, position)
  saved = restore(tmp_path / 'saved', training)
  jax.tree.map(
    np.testing.assert_array_equal, saved.items['router'], items['router']
  )
  assert saved.position == position
  assert saved.record == {'step': 3}
  assert saved.config == config_lib.to_dict(config)


MESHES = (
  (1, 1, False),
  (2, 1, False),
  (1, 2, False),
  (4, 2, True),
  (2, 4, False),
  (1, 8, False),
  (8, 1, True),
  (1, 1, False),
)


@pytest.mark.parametrize(
  'path',
  [
    # Fewer and more devices, both axes, with and without fsdp.
    pytest.param([MESHES[i] for i in (0, 3, 5, 7)], id='quick'),
    pytest.param(MESHES, id='all', marks=pytest.mark.long),
  ],
)
def test_checkpoints_move_between_meshes(path, tmp_path):
  """Saved on one mesh, restored on the next, every bit and every sharding."""
  first = None
  directory = tmp_path / 'saved'
  for step, (data, expert, fsdp) in enumerate(path):
    config = tiny.tiny_config(
      tmp_path, **{'mesh.fsdp': fsdp, 'model.remat': fsdp}
    )
    mesh = meshes.make_mesh(
      data, expert, devices=jax.devices()[: data * expert]
    )
    training = state_lib.make_training(config, mesh)
    if first is None:
      items = checkpoint_lib.items_of(training.init())
      first = jax.device_get(items)
    else:
      items = restore(directory, training).items
    planned = jax.tree.leaves(checkpoint_lib.items_of(training.abstract))
    for leaf, plan in zip(jax.tree.leaves(items), planned, strict=True):
      assert leaf.sharding == plan.sharding
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(items), first)
    save(directory, config, items, checkpoint_lib.Position(step))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A state on one device, with its checkpoints of steps 1, 2 and 3."""
  directory = tmp_path_factory.mktemp('trained')
  config = tiny.tiny_config(directory, checkpoints_kept=3)
  mesh = meshes.make_mesh(1, 1, devices=jax.devices()[:1])
  training = state_lib.make_training(config, mesh)
  items = checkpoint_lib.items_of(training.init())
  with open_saver(directory / 'checkpoints', config) as saver:
    for step in (1, 2, 3):
      saver.save(items, checkpoint_lib.Position(step, 8 * step), record={})
  return directory / 'checkpoints', training


@pytest.fixture
def saved(trained, tmp_path):
  shutil.copytree(trained[0], tmp_path / 'checkpoints')
  return tmp_path / 'checkpoints', trained[1]


def data_files(directory):
  """Files that hold arrays, some of them twice."""
  return [path for path in directory.rglob('d/*') if path.is_file()]


def truncate(path):
  for file in data_files(path / 'params'):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(path):
  for file in data_files(path / 'optimizer'):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_a_number(path):
  """In the config that it was saved under: still JSON."""
  file = path / 'meta' / 'metadata'
  file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))


def change_the_data(path):
  (path / 'data' / 'metadata').write_text('{"next_sequence": 16}')


def delete_half(path):
  shutil.rmtree(path / 'router')


def empty(path):
  for file in path.rglob('*'):
    if file.is_file():
      file.write_bytes(b'')


def swap_an_item(path):
  """From another checkpoint of the same run, with values of its own."""
  file = path / 'meta' / 'metadata'
  file.write_text((path.parent / '2' / 'meta' / 'metadata').read_text())


@pytest.mark.parametrize(
  ('damage', 'why'),
  [
    (truncate, 'Error'),
    (flip_a_bit, ''),
    (flip_a_number, 'not as they were written'),
    (change_the_data, 'not as they were written'),
    (delete_half, 'Error'),
    (empty, 'JSONDecodeError'),
    (swap_an_item, 'not as they were written'),
  ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
  saved, capsys, damage, why
):
  directory, training = saved
  damage(directory / '3')
  assert restore(directory, training).position.step == 2
  warning = capsys.readouterr().err
  assert f'{directory / "3"}: ' in warning and why in warning
  assert f'moved to {directory.parent / "damaged" / "3"}' in warning
  assert checkpoint_lib.steps(directory) == [2, 1]
  assert (directory.parent / 'damaged' / '3').is_dir()


def test_a_damaged_checkpoint_in_a_bucket_is_moved_aside():
  buckets.empty()
  runs = files.absolute('gs://bucket/run')
  for step in (3, 3):
    (runs / f'checkpoints/{step}/params').write_text('damaged')
    checkpoint_lib._move_aside(
      runs / f'checkpoints/{step}', runs / 'damaged', 'values changed'
    )
  assert not (runs / 'checkpoints/3').exists()
  names = {path.name for path in (runs / 'damaged').iterdir()}
  assert names == {'3', '3.txt', '3_2', '3_2.txt'}
  assert (runs / 'damaged/3_2.txt').read_text() == 'values changed\n'


class RefreshError(Exception):
  """Stands in for one of a library that speaks to a network."""

  __module__ = 'google.auth.exceptions'


@pytest.mark.parametrize(
  ('error', 'passes'),
  [
    (ConnectionResetError(), True),
    (OSError(116, 'stale file handle'), True),
    (MemoryError(), True),
    (RefreshError(), True),
    (ValueError('INTERNAL: reading x [OS error 5: EIO]'), True),
    (ValueError('NOT_FOUND: reading x [OS error 2: ENOENT]'), False),
    (ValueError('DATA_LOSS: checksum of google.cloud differs'), False),
    (FileNotFoundError(), False),
    (NotADirectoryError(), False),
    (KeyError('kernel'), False),
  ],
)
def test_errors_of_the_network_are_not_those_of_damage(error, passes):
  assert storage.may_pass(error) == passes


@pytest.mark.parametrize(
  'error', [PermissionError('no'), ValueError('UNAVAILABLE: bucket')]
)
def test_what_cannot_be_read_now_is_not_taken_for_damaged(
  saved, monkeypatch, error
):
  directory, training = saved
  monkeypatch.setattr(storage, 'PAUSES', (0.0, 0.0))
  errors = [error] * 3
  restore_item = ocp.PyTreeCheckpointHandler.restore

  def fail(self, path, args):
    if errors:
      raise Exception('wrapped') from errors.pop()
    return restore_item(self, path, args=args)

  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, 'restore', fail)
  with pytest.raises(OSError, match=str(error)):
    restore(directory, training)
  assert checkpoint_lib.steps(directory) == [3, 2, 1]
  errors += [error] * 2  # Good again when asked for the third time.
  assert restore(directory, training).position.step == 3


def test_values_that_changed_are_named(saved, capsys):
  """As if they had changed on their way to the disk."""
  directory, training = saved
  items = restore(directory, training).items
  checksums = checksum_lib.checksums

  def other(tree):
    sums = checksums(tree)
    sums['params.embedding.embedding'] ^= 1
    return sums

  with mock.patch.object(checksum_lib, 'checksums', other):
    save(
      directory, tiny.tiny_config(directory), items, checkpoint_lib.Position(4)
    )
  assert restore(directory, training).position.step == 3
  warning = capsys.readouterr().err
  assert 'values changed since it was written: params.embedding' in warning


@hypothesis.given(
  index=st.integers(0, 59), bit=st.integers(0, 31), other=st.integers(0, 59)
)
@hypothesis.settings(max_examples=50, deadline=None)
def test_a_checksum_sees_a_flipped_bit_and_a_swap(index, bit, other):
  x = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
  before = checksum_lib.checksums({'x': x})
  flipped = x.copy()
  flipped.view(np.uint32).reshape(-1)[index] ^= np.uint32(1 << bit)
  assert checksum_lib.checksums({'x': flipped}) != before
  swapped = x.copy()
  flat = swapped.reshape(-1)
  flat[[index, other]] = flat[[other, index]]
  assert (checksum_lib.checksums({'x': swapped}) == before) == (index == other)


def test_another_runs_checkpoint_is_not_used(saved, capsys):
  directory, training = saved
  shutil.copytree(directory, directory.parent / 'other')
  shutil.rmtree(directory / '3')
  config = tiny.tiny_config(directory)
  items = restore(directory, training).items
  save(directory, config, items, checkpoint_lib.Position(3), run='other')
  assert restore(directory, training).position.step == 2
  assert 'of step 3 of another run' in capsys.readouterr().err


def test_without_a_checkpoint_of_use_nothing_is_moved(saved):
  directory, training = saved
  with pytest.raises(Refused, match='3: .*2: .*1: .*another run'):
    restore(directory, training, run='other')
  assert checkpoint_lib.steps(directory) == [3, 2, 1]
  assert not (directory.parent / 'damaged').exists()


def test_a_half_written_checkpoint_is_none(saved):
  directory, training = saved
  (directory / '3').rename(directory / '3.orbax-checkpoint-tmp')
  assert restore(directory, training).position.step == 2


def test_newest_best_and_every_so_many_are_kept(trained, tmp_path):
  """The second is the best; NaN is not."""
  config = tiny.tiny_config(
    tmp_path,
    checkpoints_kept=2,
    checkpoints_kept_every=4,
    checkpoints_kept_best=1,
    eval_every=1,
  )
  items = restore(*trained).items
  losses = {1: math.nan, 2: 1.0, 3: 8.0, 4: 2.0, 5: 7.0, 7: 6.0, 8: 5.0, 9: 3.0}
  known = {}
  for part in (range(1, 6), range(6, 10)):  # The best is known again later.
    with open_saver(tmp_path / 'saved', config, losses=known) as saver:
      for step in part:
        saver.save(items, checkpoint_lib.Position(step), record={})
        if step in losses:  # The evaluation comes after the save.
          known[step] = losses[step]
  assert checkpoint_lib.steps(tmp_path / 'saved') == [9, 8, 4, 2]


def test_a_failed_save_is_tried_again(saved, monkeypatch, capsys):
  directory, training = saved
  monkeypatch.setattr(storage, 'PAUSES', (0.0, 0.0))
  saves = iter([OSError('disk full')] * 2)
  manager_save = ocp.CheckpointManager.save

  def fail_twice(self, *args, **kwargs):
    for error in saves:
      raise error
    return manager_save(self, *args, **kwargs)

  monkeypatch.setattr(ocp.CheckpointManager, 'save', fail_twice)
  items = restore(directory, training).items
  config = tiny.tiny_config(directory)
  save(directory, config, items, checkpoint_lib.Position(4))
  assert (
    capsys.readouterr().err.count('no checkpoint of step 4: disk full') == 2
  )
  assert restore(directory, training).position.step == 4
  saves = iter([OSError('disk full')] * 3)
  with pytest.raises(OSError, match='of step 5 cannot be written .disk full'):
    save(directory, config, items, checkpoint_lib.Position(5))
  assert restore(directory, training).position.step == 4


@pytest.mark.long
def test_an_array_of_more_than_a_gigabyte(tmp_path):
  """orbax writes none that is larger than the memory it may take."""
  config = tiny.tiny_config(tmp_path)
  zeros = jnp.zeros((280, 10**6))
  items = {
    'params': {'a': zeros},
    'optimizer': {'b': zeros[0]},
    'router': {'c': zeros[0]},
  }
  directory = tmp_path / 'checkpoints'
  with open_saver(directory, config, largest=zeros.nbytes) as saver:
    saver.save(items, checkpoint_lib.Position(1), record={})
  read = checkpoint_lib.read_item(tmp_path / 'checkpoints/1', 'params')
  assert read['a'].shape == zeros.shape
