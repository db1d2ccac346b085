"""The notebooks: without outputs in git, executed from top to bottom."""

from collections.abc import Iterator
import contextlib
import pathlib
import re
import sys
import tempfile
import textwrap

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
import nbformat
import pytest

from tests import several_processes

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'experiments' / 'notebooks').glob('*.ipynb'))
SECONDS = 240  # for a cell; whole notebooks take less than 60 on two cores


@contextlib.contextmanager
def kernel_manager() -> Iterator[AsyncKernelManager]:
  """Starts kernels with this very Python, on sockets in the file system."""
  # Not tmp_path: the name of such a socket has to be short.
  with tempfile.TemporaryDirectory(prefix='kernel') as directory:
    yield AsyncKernelManager(
      kernel_name='python3',
      # No kernels that others have installed under that name.
      kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
      transport='ipc',
      connection_file=f'{directory}/kernel.json',
    )


def execute(notebook: nbformat.NotebookNode, directory: pathlib.Path) -> None:
  """Runs all cells in a fresh kernel; fails with the cell and its error."""
  with kernel_manager() as manager:
    client = NotebookClient(
      notebook,
      km=manager,
      timeout=SECONDS,
      resources={'metadata': {'path': directory}},
    )
    client.owns_km = True  # That ends the kernel.
    try:
      client.execute()
    except (CellExecutionError, CellTimeoutError) as error:
      pytest.fail(re.sub(r'\x1b\[[\d;]*m', '', str(error)), pytrace=False)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> pathlib.Path:
  """A work directory; all that a notebook writes goes there."""
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.setenv('RUNS', str(tmp_path / 'runs'))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
  # One device, as users have.
  monkeypatch.setenv('XLA_FLAGS', several_processes.flags(1))
  return tmp_path


def names(path: pathlib.Path) -> str:
  return path.name


@pytest.mark.parametrize('path', NOTEBOOKS, ids=names)
def test_git_has_no_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      stripped = cell.execution_count is None and not cell.outputs
      assert stripped, f'run `make strip`: {path.name} has outputs:\n{cell}'


@pytest.mark.long
@pytest.mark.parametrize('path', NOTEBOOKS, ids=names)
def test_runs_from_top_to_bottom(path, elsewhere):
  execute(nbformat.read(path, as_version=4), elsewhere)


def test_a_kernel_is_this_python_keeps_to_loopback_and_says_what_failed(
  elsewhere,
):
  cell = f"""
    import sys, psutil
    assert sys.executable == {sys.executable!r}
    connections = psutil.Process().net_connections('inet')
    assert all(c.laddr.ip == '127.0.0.1' for c in connections)
    1 / 0  # Here.
  """
  notebook = nbformat.v4.new_notebook(
    cells=[nbformat.v4.new_code_cell(textwrap.dedent(cell))]
  )
  with pytest.raises(pytest.fail.Exception) as failure:
    execute(notebook, elsewhere)
  assert '1 / 0  # Here.' in failure.value.msg
  assert 'ZeroDivisionError: division by zero' in failure.value.msg


def test_all_are_there():
  """A directory that was moved would leave nothing to test."""
  assert {path.stem for path in NOTEBOOKS} == {
    'checkpoint',
    'compare',
    'public_model',
    'routing',
    'your_model',
  }
