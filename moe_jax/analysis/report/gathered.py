"""What the report page knows of its runs."""

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from moe_jax.analysis import tables
from moe_jax.analysis.naming import name_paths
from moe_jax.analysis.run import Run


class Gathered(NamedTuple):
  """Runs by their names, and what is known of them.

  Attributes:
    named: the runs.
    summaries: of each, what `tables.summarize` returns.
    compared: what `tables.comparison` returns; None where it refuses.
    refusal: why it does.
  """

  named: dict[str, Run]
  summaries: dict[str, dict[str, Any]]
  compared: dict[str, Any] | None
  refusal: str


def gather(runs: Sequence[Run], tell: Callable[[str], None]) -> Gathered:
  """Reads the runs.

  Args:
    runs: each with one step at least.
    tell: called with what is being done.

  Raises:
    FileNotFoundError, ValueError: a file is missing or damaged, a run has no
      step yet, or is there twice.
  """
  names = name_paths([run.workdir for run in runs])
  named = dict(zip(names, runs, strict=True))
  summaries, methods = {}, defaultdict(list)
  for name, run in named.items():
    tell(f'reading {run.workdir}')
    try:
      summaries[name] = tables.summarize(run)
    except KeyError as error:
      raise ValueError(
        f'{run.workdir}: no run of this version: {error} is missing'
      ) from error
    methods[run.method].append(run)
  try:
    return Gathered(named, summaries, tables.comparison(methods), '')
  except ValueError as error:
    return Gathered(named, summaries, None, str(error))


def notes(gathered: Gathered) -> list[str]:
  """Returns what a reader must know before believing the tables."""
  said = []
  for name, run in gathered.named.items():
    summary = gathered.summaries[name]
    steps, total = summary['steps'], run.config['steps']
    if not summary['finished']:
      said.append(f'{name} is not finished: step {steps:,} of {total:,}.')
    if summary['first_non_finite_step'] is not None:
      step = summary['first_non_finite_step']
      said.append(f'{name} diverged: no finite loss at step {step:,}.')
    for evaluated, reason in run.facts.get('not_evaluated', {}).items():
      said.append(f'Not evaluated on {evaluated}: {reason}.')
  if gathered.compared is None:
    said.append(f'Not comparable in every respect: {gathered.refusal}.')
  else:
    said += [
      f'{fact} differs between runs of one seed.'
      for fact in gathered.compared['differing_facts']
    ]
  seeds = {summary['seed'] for summary in gathered.summaries.values()}
  if len(gathered.named) > 1 and len(seeds) == 1:
    said.append(
      'All have one seed: how much chance does is not known, and small '
      'differences in loss mean nothing.'
    )
  return list(dict.fromkeys(said))  # Runs say the same of evaluation sets.
