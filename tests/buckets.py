"""A bucket kept in memory. One class: epath keeps its first instance."""

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
  """Stands in for gcsfs: a folder is there when something is in it."""

  protocol = ('gs', 'gcs')
  store, pseudo_dirs = {}, ['']

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.rpartition('://')[2])

  def makedirs(self, path, exist_ok=False):
    pass

  mkdir = makedirs


def empty() -> Bucket:
  """Returns what gs:// stands for from now on, without any file."""
  for name in Bucket.protocol:
    fsspec.register_implementation(name, Bucket, clobber=True)
  Bucket.store.clear()
  return fsspec.filesystem('gs')
