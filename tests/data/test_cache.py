"""What is cached is whole, private, and found again."""

from concurrent import futures
import errno
import fcntl
import os
import threading
import time

import pytest

from moe_jax.data import cache


def test_new_directories_are_private_and_old_ones_are_left_alone(tmp_path):
  old = tmp_path / 'old'
  old.mkdir(mode=0o755)
  made = cache.open_cache(str(old / 'a' / 'b'))
  assert made == old / 'a' / 'b'
  modes = [path.stat().st_mode & 0o777 for path in (made, made.parent, old)]
  assert modes == [0o700, 0o700, 0o755]


def test_default_is_in_the_users_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
  assert cache.open_cache('') == tmp_path / 'xdg' / 'moe_jax'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert cache.open_cache('') == tmp_path / '.cache' / 'moe_jax'


def test_impossible_directory_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r'data\.cache_dir=.*file/below'):
    cache.open_cache(str(tmp_path / 'file' / 'below'))


def test_remote_directory_is_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  message = r'^data\.cache_dir=gs://b/c: not a local directory; .* path on '
  with pytest.raises(ValueError, match=message):
    cache.open_cache('gs://b/c')
  assert not list(tmp_path.iterdir())


def test_key_depends_on_each_part_and_their_order():
  parts = [('a', 1), ('a', 2), (1, 'a'), ('a', '1'), ('a1',), (['a'], 1)]
  assert len({cache.content_key(*part) for part in parts}) == len(parts)


def test_interrupted_file_leaves_the_old_one(tmp_path):
  path = tmp_path / 'file'
  path.write_bytes(b'old')
  with pytest.raises(KeyboardInterrupt):
    with cache.atomic_file(path) as file:
      file.write(b'half of the n')
      raise KeyboardInterrupt
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_after_a_week(tmp_path):
  week = 7 * 24 * 3600
  for name, age in (('old', week + 60), ('new', week - 60)):
    (tmp_path / f'.incomplete-{name}').mkdir()
    (tmp_path / f'.incomplete-{name}.npy').write_text('')
    for path in tmp_path.glob(f'*{name}*'):
      os.utime(path, times=(time.time() - age,) * 2)
  (tmp_path / 'kept').write_text('')
  os.utime(tmp_path / 'kept', times=(0, 0))
  cache.open_cache(str(tmp_path))
  left = {path.name for path in tmp_path.iterdir()}
  assert left == {'.incomplete-new', '.incomplete-new.npy', 'kept'}


def test_damage_is_found(tmp_path):
  path = tmp_path / 'file'
  with cache.atomic_file(path) as file:
    file.write(b'content')
  assert cache.check_file(path) == len(b'content')
  for content in (b'', b'content', path.read_bytes().replace(b'c', b'C', 1)):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
      cache.check_file(path)


def _load(path, size):
  return path.read_bytes()[:size]


def test_one_makes_a_file_and_the_others_wait(tmp_path, monkeypatch, capsys):
  path, made, waiting = tmp_path / 'file', [], threading.Semaphore(0)
  log = cache.log
  monkeypatch.setattr(cache, 'log', lambda m: (log(m), waiting.release()))
  monkeypatch.setattr(cache, '_SECONDS_BETWEEN_TRIES', 0.01)

  def make(file):
    for _ in range(3):  # Until all others wait.
      assert waiting.acquire(timeout=60)
    made.append(1)
    file.write(b'content')

  with futures.ThreadPoolExecutor(4) as pool:
    found = [
      pool.submit(cache.load_or_make, path, _load, make) for _ in range(4)
    ]
    assert {future.result() for future in found} == {b'content'}
  assert len(made) == 1
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 3
  assert all(f'another process makes {path}; waiting' in x for x in lines)
  assert list(tmp_path.iterdir()) == [path]


def test_waiting_has_a_bound(tmp_path, monkeypatch, capsys):
  path = tmp_path / 'file'
  monkeypatch.setattr(cache, '_SECONDS_TO_WAIT', 0.0)
  with cache._turn(path):
    assert cache.load_or_make(path, _load, lambda f: f.write(b'x')) == b'x'
  assert 'waited in vain' in capsys.readouterr().err


def test_without_locks_nobody_waits(tmp_path, monkeypatch):
  path = tmp_path / 'file'
  monkeypatch.setattr(fcntl, 'flock', _refuse)
  with cache._turn(path):
    assert cache.load_or_make(path, _load, lambda f: f.write(b'x')) == b'x'


def _refuse(*arguments):
  raise OSError(errno.ENOLCK, 'no locks')
