"""A work directory, read: of a run that is finished, training, or copied."""

import functools
import os
from typing import Any

from moe_jax.runs import checkpoints, files, records


class Reader:
  """What a run left in its work directory.

  Files are read when first asked for and kept. A missing one raises
  FileNotFoundError, a damaged one ValueError; both name it.

  Attributes:
    workdir: absolute path of the work directory, or gs://...
  """

  def __init__(self, workdir: str | os.PathLike[str]):
    self.workdir = files.absolute(workdir)

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """The nested options, as the version that wrote `config.json` had them."""
    return files.read_json(self.workdir / 'config.json')

  @functools.cached_property
  def facts(self) -> dict[str, Any]:
    """What the run found out about itself, from `run.json`."""
    return files.read_json(self.workdir / 'run.json')

  @functools.cached_property
  def tokenizer(self) -> dict[str, Any]:
    """What made tokens of the text, from `tokenizer.json`."""
    return files.read_json(self.workdir / 'tokenizer.json')

  @functools.cached_property
  def records(self) -> list[records.Record]:
    """What `metrics.jsonl` says of each completed step."""
    return records.read(self.workdir / records.NAME)

  @functools.cached_property
  def not_finite(self) -> dict[int, dict[str, Any]]:
    """What is known of the steps after which the run gave up; by step."""
    dumps = sorted(self.workdir.glob('not_finite_step_*.json'))
    return {dump['step']: dump for dump in map(files.read_json, dumps)}

  @property
  def checkpoints(self) -> list[int]:
    """Steps that there are whole checkpoints of now, ascending."""
    return checkpoints.steps(self.workdir / 'checkpoints')[::-1]
