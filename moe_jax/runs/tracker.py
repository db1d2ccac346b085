"""Weights & Biases, beside metrics.jsonl and TensorBoard, where asked for.

What is sent is what the work directory says in config.json, run.json and
metrics.jsonl: no code, no output, nothing about the machine. Who is logged in,
where to, and whether online at all, is between the user and wandb (`wandb
login`, WANDB_MODE, WANDB_BASE_URL); no key passes through here.
"""

from collections.abc import Mapping
import pathlib
import sys
from typing import Any

import jax

from moe_jax.options import one_line
from moe_jax.runs.events import Shown

_SECONDS_TO_UPLOAD = 20.0  # at the end; a preempted run has not many more


def check(tracker: str) -> None:
  """Raises ValueError unless a tracker could be used, or none is wanted."""
  if not tracker or jax.process_index() > 0:  # The first process writes.
    return
  try:
    import wandb

    settings = wandb.setup().settings
  # A folder of wandb's own runs is a module, too, but an empty one.
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f'tracker={tracker}: needs a package that is not installed; '
      "pip install -e '.[wandb]'"
    ) from error
  # Or it would ask, with nobody there to answer.
  online = settings.mode == 'online'
  if online and not wandb.login(prompt=False, verify=False):
    raise ValueError(
      f'tracker={tracker}: no account is known here; run `wandb login`, or set '
      'WANDB_MODE=offline to keep all in the work directory'
    )


class Tracker:
  """Shows records in a run of Weights & Biases.

  Whatever fails there is a warning, once: the metrics are in other files, too.
  A run that resumes goes on in the same run there, by its name in run.json;
  steps that are computed again appear a second time, with the same values. It
  counts as failed until its last step is shown.

  Args:
    directory: where wandb writes; None for its own choice.
    project: that the run is in.
    label: its name on the screen.
    options: its config.
    facts: its `run.json`.
    step: steps completed before.
    steps: steps in total.
  """

  def __init__(
    self,
    directory: pathlib.Path | None,
    *,
    project: str,
    label: str,
    options: Mapping[str, Any],
    facts: Mapping[str, Any],
    step: int,
    steps: int,
  ):
    self._shown = Shown(step=step, steps=steps)
    self._step, self._steps = step, steps
    self._wandb = self._run = None

    def begin():
      import wandb

      self._wandb = wandb
      self._run = wandb.init(
        id=facts.get('run') or None,
        resume='allow',
        project=project,
        name=label,
        config={**options, 'facts': dict(facts)},
        allow_val_change=True,  # Some options may change in a run.
        dir=directory,
        settings=wandb.Settings(
          console='off',
          save_code=False,
          disable_git=True,
          finish_timeout=_SECONDS_TO_UPLOAD,
          x_disable_meta=True,
          x_disable_machine_info=True,
          x_disable_stats=True,
          x_save_requirements=False,
        ),
      )
      # Not wandb's own count of steps, which never goes back: it would forget
      # an evaluation that a run makes up for when it resumes.
      self._run.define_metric('*', step_metric='step')

    self._try(begin)

  def show(self, record: Mapping[str, Any]) -> None:
    """Shows the record of a step."""
    self._step = record['step']
    scalars, lists = self._shown.of(record)
    if self._run is not None:
      self._try(lambda: self._log(scalars, lists))

  def sync(self) -> None:
    """Does nothing: wandb uploads by itself."""

  def close(self) -> None:
    """Waits a little while for what is not uploaded yet."""
    if self._run is not None:
      done = self._step == self._steps
      self._try(lambda: self._run.finish(exit_code=0 if done else 1))
      self._run = None

  def _log(self, scalars, lists):
    histogram = self._wandb.Histogram
    histograms = {name: histogram(values) for name, values in lists.items()}
    self._run.log({'step': self._step, **scalars, **histograms})

  def _try(self, call):
    try:
      call()
    except Exception as error:
      print(f'warning: no more for wandb: {one_line(error)}', file=sys.stderr)
      self._run = None
