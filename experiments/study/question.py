"""What the questions of the study share: arms in a table, beside a baseline."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import pathlib
from typing import NamedTuple

from matplotlib.figure import Figure
import numpy as np
import pandas as pd

from experiments.study import audits, runs
from experiments.study.runs import Arm
from experiments.study.statistics import paired
from moe_jax import analysis
from moe_jax.analysis.command_line import Parser, answer, table

ENDING = '### What follows'
PERPLEXITY = 'eval/validation/perplexity'
# Key of a summary -> heading and format.
COLUMNS = {
  'average_max_violation': ('AvgMaxVio', '.3f'),
  'sup_max_violation': ('SupMaxVio', '.3f'),
  'first_max_violation': ('first step', '.3f'),
  'last_max_violation': ('last fifth', '.3f'),
  'worst_sup_max_violation': ('SupMaxVio, worst layer', '.3f'),
  'sequence_violation': ('sequence MaxVio', '.3f'),
  runs.LOSS: ('loss [nats]', '.4f'),
  PERPLEXITY: ('perplexity, q frozen', '.2f'),
  'eval/validation/perplexity_solved': ('q solved', '.2f'),
}


@dataclasses.dataclass(frozen=True)
class Table:
  """Arms of one experiment, side by side, of the seeds that all of them have.

  Attributes:
    heading: of the table.
    arms: a row each.
    baseline: the arm that the others are compared with, seed by seed.
    columns: keys of summaries, with heading and format.
  """

  heading: str
  arms: Sequence[Arm]
  baseline: Arm
  columns: Mapping[str, tuple[str, str]] = dataclasses.field(
    default_factory=lambda: COLUMNS
  )

  def frame(self, results: pathlib.Path) -> pd.DataFrame:
    """Returns `runs.frame` of these seeds, the baseline's included."""
    found = runs.frame([*self.arms, self.baseline], results)
    if not len(found):
      return found
    seeds = set.intersection(*(set(arm.seeds) for arm in self.arms))
    return found[found.index.isin(seeds, 'seed')]

  def told(self, results: pathlib.Path) -> str:
    """Says how even its arms are, and how their losses differ."""
    return (
      f'{self.heading}: AvgMaxVio (last fifth) {self.balance(results)}. Loss '
      f'in nats: {self.differences(results)}.'
    )

  def balance(self, results: pathlib.Path) -> str:
    """Says AvgMaxVio (and that of the last fifth), evenest arm first."""
    mean = self.frame(results).groupby('arm').mean(numeric_only=True)
    average, last = mean['average_max_violation'], mean['last_max_violation']
    return ', '.join(
      f'`{arm.name}` {average[arm.name]:.3f} ({last[arm.name]:.3f})'
      for arm in self.evenest(results)
    )

  def evenest(
    self, results: pathlib.Path, key: str = 'average_max_violation'
  ) -> list[Arm]:
    """Returns the arms, the evenest first: that of the least mean `key`."""
    mean = self.frame(results)[key].groupby('arm').mean()
    return sorted(self.arms, key=lambda arm: mean[arm.name])

  def differences(self, results: pathlib.Path) -> str:
    """Says by how much each arm's loss is above the baseline's, in nats."""
    baseline = self.baseline.name
    loss = self.frame(results)[runs.LOSS]
    others = [arm.name for arm in self.arms if arm.name != baseline]
    return '; '.join(
      f'`{name}` - `{baseline}`: {paired(loss, name, baseline).told}'
      for name in others
    )


class Audit(NamedTuple):
  """What is found out about the checkpoints of some arms.

  Attributes:
    heading: of its table.
    audit: one of `audits`.
    arms: of which the last seed is audited.
  """

  heading: str
  audit: Callable[[analysis.Run], audits.Rows]
  arms: Sequence[Arm]


@dataclasses.dataclass(frozen=True)
class Question:
  """One question of the study.

  Attributes:
    title: the question.
    method: what was done, for the report.
    tables: of its arms.
    audits: tables of what is found out about checkpoints.
    conclusion: returns what ends it, from the results in a directory; asked
      when all runs and audits are there.
    figures: by the name of its file, returns a figure; asked when the
      conclusion is.
  """

  title: str
  method: str
  tables: Sequence[Table]
  audits: Sequence[Audit] = ()
  conclusion: Callable[[pathlib.Path], str] | None = None
  figures: Mapping[str, Callable[[pathlib.Path], Figure]] = dataclasses.field(
    default_factory=dict
  )

  @property
  def arms(self) -> list[Arm]:
    """The arms of all tables, each once."""
    arms = [
      arm for table in self.tables for arm in (*table.arms, table.baseline)
    ]
    return list({(arm.experiment, arm.name): arm for arm in arms}.values())

  def can_end(self, results: pathlib.Path) -> bool:
    """Tells whether all is there that the conclusion needs."""
    return runs.complete(self.arms, results) and all(
      audits.path(each.audit, arm, results).exists()
      for each in self.audits
      for arm in each.arms
    )

  def main(self, argv: Sequence[str] | None = None) -> int:
    """Trains and audits what is missing; returns the program's exit code."""
    return answer(lambda: self._answer(argv))

  def _answer(self, argv: Sequence[str] | None) -> str:
    parser = Parser(description=f'Answers: {self.title}')
    parser.add_argument('--workdir', required=True, type=pathlib.Path)
    workdir = parser.parse_args(argv).workdir.absolute()
    runs.run_all(self.arms, workdir)
    for each in self.audits:
      for arm in each.arms:
        if not audits.path(each.audit, arm).exists():
          audits.run(each.audit, arm, workdir)
    return '\n\n'.join(section(self))


def section(
  question: Question, results: pathlib.Path = runs.RESULTS
) -> Iterator[str]:
  """Yields the paragraphs of a question."""
  yield f'## {question.title}'
  yield question.method
  if question.can_end(results):
    yield from (f'![{question.title}]({x}.png)' for x in question.figures)
  for each in question.tables:
    yield f'### {each.heading}'
    yield from _table(each, results)
  for each in question.audits:
    yield f'### {each.heading}'
    yield from _audit(each, results)
  if question.conclusion and question.can_end(results):
    yield ENDING
    yield question.conclusion(results)


def _table(each: Table, results: pathlib.Path) -> Iterator[str]:
  found = each.frame(results)
  names = [arm.name for arm in each.arms]
  done = sum(len(arm.stored(results)) for arm in each.arms)
  planned = sum(len(arm.seeds) for arm in each.arms)
  if done < planned:
    yield f'{done} of {planned} runs are done.'
  if not len(found):
    return
  groups = found.groupby('arm')
  mean, deviation = (f(numeric_only=True) for f in (groups.mean, groups.std))
  keys = [key for key in each.columns if key in mean]
  baseline = each.baseline.name
  rows = []
  for name in filter(mean.index.__contains__, names):
    cells = [
      _with_deviation(
        mean[key][name], deviation[key][name], each.columns[key][1]
      )
      for key in keys
    ]
    difference = '–'
    if name != baseline and baseline in mean.index:
      difference = str(paired(found[runs.LOSS], name, baseline))
    rows.append([name, len(found.loc[name]), *cells, difference])
  headings = [each.columns[key][0] for key in keys]
  yield table(['arm', 'seeds', *headings, f'loss - {baseline} [nats]'], rows)


def _audit(each: Audit, results: pathlib.Path) -> Iterator[str]:
  found = {
    arm.name: rows
    for arm in each.arms
    if (rows := audits.stored(each.audit, arm, results))
  }
  if len(found) < len(each.arms):
    yield f'{len(found)} of {len(each.arms)} checkpoints are audited.'
  if found:
    seeds = {max(arm.seeds) for arm in each.arms if arm.name in found}
    yield f'Checkpoints of seed {", ".join(map(str, sorted(seeds)))}.'
    some = next(iter(next(iter(found.values())).values()))
    yield table(
      ['arm', '', *some],
      [
        [name, row, *columns.values()]
        for name, rows in found.items()
        for row, columns in rows.items()
      ],
    )


def _with_deviation(mean: float, deviation: float, form: str) -> str:
  if np.isnan(deviation):
    return f'{mean:{form}}'
  return f'{mean:{form}} ± {deviation:{form}}'
