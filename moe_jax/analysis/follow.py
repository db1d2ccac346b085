"""Follows a run that is being trained, reading only what is new."""

from collections import deque
import os
import pathlib

from moe_jax.analysis.results import pace
from moe_jax.runs.reader import Reader
from moe_jax.runs.records import NAME
from moe_jax.runs.records import Record
from moe_jax.runs.records import Tail

_STEPS = 1000  # so many of the last steps are kept
_LAYER = 'router/max_violation/'
# Between two steps there may be an evaluation or a checkpoint.
_SECONDS_OF_SILENCE = 60.0
_STEPS_OF_SILENCE = 20


class Followed:
  """What is known of a run so far.

  Attributes:
    workdir: the work directory; it need not exist yet.
    name: what it is called on the screen.
    steps: records of the last steps, without lists; NaN is what was not finite.
    evaluations: of each set, the step and perplexity (q frozen) of the last.
    total: steps in total; 0 if that is not known yet.

  Raises:
    ValueError: the work directory is remote.
  """

  def __init__(self, workdir: str | os.PathLike[str], name: str):
    if '://' in os.fspath(workdir):
      raise ValueError(
        f'{workdir}: a run there uploads its metrics with each checkpoint '
        'only; watch a copy'
      )
    self.workdir, self.name, self.total = pathlib.Path(workdir), name, 0
    self.steps: deque[Record] = deque(maxlen=_STEPS)
    self.evaluations: dict[str, tuple[int, float]] = {}
    self._tail = Tail(self.workdir / NAME)

  def look(self) -> None:
    """Reads what was written since the last look.

    Raises:
      ValueError: a line is damaged.
      OSError: the files cannot be read.
    """
    records, void = self._tail.look()
    if void:
      self.steps.clear()
      self.evaluations.clear()
    if records:
      self.total = Reader(self.workdir).config['steps']
    for record in records:
      self.steps.append(
        {k: v for k, v in record.items() if not isinstance(v, list)}
      )
      for key, value in record.items():
        if key.startswith('eval/') and key.endswith('/perplexity'):
          self.evaluations[key.split('/')[1]] = (record['step'], value)

  @property
  def last(self) -> Record:
    """The record of the last step."""
    return self.steps[-1]

  @property
  def step(self) -> int:
    """The last step; 0 before the first."""
    return self.last['step'] if self.steps else 0

  @property
  def layers(self) -> dict[str, list[float]]:
    """MaxVio of each layer over the steps that are kept."""
    layers = sorted(key for key in self.last if key.startswith(_LAYER))
    return {
      key.removeprefix(_LAYER): [step[key] for step in self.steps]
      for key in layers
    }

  @property
  def finished(self) -> bool:
    """Whether the last of the configured steps was completed."""
    return self.step == self.total > 0

  @property
  def step_seconds(self) -> float:
    """Median time of the last steps."""
    return pace([step['time/step_seconds'] for step in self.steps])

  def silent(self, now: float) -> float:
    """Returns for how many seconds nothing was written; now is since 1970."""
    return now - self._tail.written

  def state(self, now: float) -> str:
    """Returns no step yet, running, silent, gave up, or finished.

    Args:
      now: seconds since the epoch.
    """
    if not self.steps:
      return 'no step yet'
    if self.finished:
      return 'finished'
    dump = f'not_finite_step_{self.step:08d}.json'
    if (self.workdir / dump).exists():
      return 'gave up'
    patience = max(_SECONDS_OF_SILENCE, _STEPS_OF_SILENCE * self.step_seconds)
    return 'silent' if self.silent(now) > patience else 'running'
