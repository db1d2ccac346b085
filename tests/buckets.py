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

  def ls(self, path, detail=True, **options):
    """Keeps what it listed, whatever others write."""
    path = self._strip_protocol(path)
    if path not in self.dircache:
      self.dircache[path] = found = super().ls(path, True, **options)
    else:
      found = self.dircache[path]
    return found if detail else sorted(entry['name'] for entry in found)


def empty() -> Bucket:
  """Returns what gs:// stands for from now on, without any file."""
  for name in Bucket.protocol:
    fsspec.register_implementation(name, Bucket, clobber=True)
  Bucket.store.clear()
  Bucket.pseudo_dirs[:] = ['']
  return fsspec.filesystem('gs')
