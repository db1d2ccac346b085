"""A run, opened from its work directory."""

from typing import Any

import jax
from jax.sharding import Mesh
import pandas as pd

from moe_jax.analysis.checkpoint import Checkpoint
from moe_jax.analysis.expert_statistics import saturation
from moe_jax.analysis.results import Results
from moe_jax.analysis.routed_text import RoutedText
from moe_jax.analysis.table import difference
from moe_jax.parallel import mesh as meshes


class Run(Results):
  """What one training run left in its work directory.

  The run may be under way, or copied here from another machine. Files are read
  when first asked for and kept: open a new `Run` to see more of a run that is
  under way.

  Attributes:
    workdir: the work directory, local or gs://...
  """

  _checkpoint: Checkpoint | None = None

  def restore(
    self, step: int | None = None, *, mesh: Mesh | None = None
  ) -> Checkpoint:
    """Opens a checkpoint; the last one opened is kept.

    Reads little: `restore().q` reads no parameters, `restore().model` all.

    Args:
      step: one of `checkpoints`; None takes the newest.
      mesh: where to put the model; None takes the first device.

    Raises:
      FileNotFoundError: there is no such checkpoint, or a part is missing.
      ValueError: it is damaged, or of another version.
    """
    steps = self.checkpoints
    step = steps[-1] if step is None and steps else step
    if step not in steps:
      raise FileNotFoundError(
        f'{self}: no checkpoint of step {step}; there are {steps or "none"}'
      )
    mesh = mesh or meshes.make_mesh(1, 1, devices=jax.devices()[:1])
    kept = self._checkpoint
    if kept is None or (kept.step, kept.mesh) != (step, mesh):
      self._checkpoint = Checkpoint(self, step, mesh)
    return self._checkpoint

  def route(self, text: str, step: int | None = None) -> RoutedText:
    """Tells where the model sends each token; see `Checkpoint.route`."""
    return self.restore(step).route(text)

  def saturation(self, text: str) -> pd.DataFrame:
    """Tells when routes settle: the share that the last checkpoint has as well.

    Args:
      text: whose tokens every checkpoint routes, with its own q.

    Returns:
      A row for each checkpoint but the last, by its step; a column a layer.

    Raises:
      ValueError: there are no two checkpoints, or the text is empty.
    """
    *steps, newest = self.checkpoints or [0]
    if not steps:
      raise ValueError(f'{self}: has no two checkpoints')
    last = self.route(text, newest)
    found = [saturation(self.route(text, step), last) for step in steps]
    return pd.DataFrame(found, index=pd.Index(steps, name='step'))

  def generate(
    self, prompt: str, *, step: int | None = None, **options: Any
  ) -> str:
    """Continues a text; see `Checkpoint.generate` for its options."""
    return self.restore(step).generate(prompt, **options)

  def compare(self, other: 'Run') -> pd.DataFrame:
    """Sets this run beside another one; see `difference`."""
    return difference(self, other)
