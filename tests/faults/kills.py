"""Kills trainings at random moments; the same command must end the same.

  python -m tests.faults.kills --kills=200 --seed=0

prints a summary: where the kills fell, and what was lost; the one so far is in
summary.md. A case can be repeated by its number and the seed: --case=3.
"""

import argparse
import collections
from concurrent import futures
import dataclasses
import datetime
import pathlib
import shutil
import sys
import tempfile
import time

from tests.faults import harness
from tests.train import tiny

# Where kills are aimed at; anywhere: at any time since the start.
TARGETS = (
  *('start', 'data preparation', 'restore', 'compilation', 'step'),
  *('evaluation', 'save', 'save', 'anywhere'),
)
KILLS_OF_A_CASE = 8
METHODS = {
  'bip': {},
  'quantile_histogram': {'accumulation': 2},
  'midpoint_lag': {},
}
# Seconds, until they were measured.
GUESSES = {'start': 2.0, 'restore': 0.2, 'compilation': 2.0, 'evaluation': 1.0}


@dataclasses.dataclass
class Report:
  """What became of some kills."""

  hits: list[str] = dataclasses.field(default_factory=list)
  lost: list[int] = dataclasses.field(default_factory=list)
  runs: int = 0
  starts: int = 0
  wrong: list[str] = dataclasses.field(default_factory=list)
  leftovers: list[str] = dataclasses.field(default_factory=list)
  incomplete: int = 0

  def add(self, other: 'Report') -> None:
    for field in dataclasses.fields(self):
      mine, its = getattr(self, field.name), getattr(other, field.name)
      setattr(self, field.name, mine + its)

  def table(self) -> str:
    """Returns the summary, as Markdown."""
    lost = collections.defaultdict(list)
    for phase, steps in zip(self.hits, self.lost, strict=True):
      lost[phase].append(steps)
    rows = [
      f'| {phase} | {len(steps)} | {sum(steps)} | {max(steps)} |'
      for phase, steps in sorted(lost.items())
    ]
    every = harness.OPTIONS['checkpoint_every']
    return '\n'.join(
      [
        '| killed in | kills | steps computed again | at most |',
        '| --- | ---: | ---: | ---: |',
        *rows,
        f'| all | {len(self.hits)} | {sum(self.lost)} | '
        f'{max(self.lost, default=0)} |',
        '',
        f'{datetime.date.today()}: {self.runs} runs of '
        f'{harness.OPTIONS["steps"]} steps, a checkpoint every {every}; '
        f'{self.starts} starts. Other than the undisturbed run: '
        f'{len(self.wrong)}. Left in finished work directories: '
        f'{len(self.leftovers)} {sorted(set(self.leftovers)) or ""}. Left in '
        f'the caches of tokens: {self.incomplete} incomplete files.',
        *self.wrong,
      ]
    )


def of_method(
  number: int, place: pathlib.Path, text: pathlib.Path, cache: pathlib.Path
) -> harness.Trial:
  """Returns the command of a case."""
  method = [*METHODS][number % len(METHODS)]
  return harness.Trial(place, text, cache, method, METHODS[method])


def case(
  number: int,
  seed: int,
  kills: int,
  expected: str,
  place: pathlib.Path,
  text: pathlib.Path,
  cache: pathlib.Path,
) -> Report:
  """Kills a command until it was killed often enough, then compares.

  Args:
    number: of the case; decides on the method.
    seed: of the random moments, with the number.
    kills: how many.
    expected: digest of an undisturbed run of `of_method`.
    place: an empty directory.
    text: directory of the text.
    cache: of compiled programs; every eighth case has its own.
  """
  random = harness.generator(seed, number)
  report, lengths = Report(), {}
  if number % 8 == 7:
    cache = place / 'xdg'
  while not report.runs or len(report.hits) < kills:
    trial = of_method(number, place / f'run_{report.runs}', text, cache)
    done = False
    while not done and len(report.hits) < kills:
      target, part = random.choice(TARGETS), random.random()
      occurrence = random.choice([1, 1, 2, 3])
      if target == 'restore' and not harness.saved_steps(trial.workdir):
        target, occurrence = 'save', 2  # First there must be one.
      if target in ('start', 'data preparation', 'restore', 'compilation'):
        occurrence = 1
      if target == 'data preparation':
        shutil.rmtree(trial.place / 'tokens', ignore_errors=True)
      done = not kill(trial, target, occurrence, part, lengths, report)
    report.runs += 1
    report.starts += trial.starts
    try:
      found = trial.complete()
      report.starts += 1
      assert found == expected, 'another result'
      report.leftovers += harness.leftovers(trial.workdir)
    except Exception as error:
      report.wrong.append(
        f'seed {seed} case {number} run {report.runs - 1} in {place}: {error}'
      )
    report.incomplete += len(list(trial.place.glob('tokens/.incomplete*')))
  return report


def kill(trial, target, occurrence, part, lengths, report) -> bool:
  """Starts a command and kills it in a phase; False if it ended before."""
  with trial.started() as program:
    began = time.monotonic()
    if target == 'anywhere':
      seconds = part * lengths.get('all', 6.0)
    elif target == 'start':
      seconds = part * GUESSES['start']
    elif program.reach(target, occurrence):
      guess = GUESSES.get(target, 0.01) if occurrence == 1 else 0.01
      seconds = part * lengths.get((target, occurrence), guess)
    else:
      seconds = 0.0
    time.sleep(seconds)
    program.process.kill()
    program.finish()
    # Of those that were cut short, the length is not known.
    lengths.update({k: s for k, s in lengths_of(program.marks).items() if s})
    if program.code == 0:
      lengths['all'] = time.monotonic() - began
      return False
    if program.code != -9:
      report.wrong.append(program.tail())
  report.hits.append(program.phase())
  # Before that, the records are those that the last kill left.
  stepped = any(mark[2] == 'compilation' for mark in program.marks)
  report.lost.append(harness.lost_steps(trial.workdir) if stepped else 0)
  return True


def lengths_of(marks) -> dict[tuple[str, int], float]:
  """Returns the seconds that a phase lasted the first time, the second..."""
  seconds: dict[tuple[str, int], float] = {}
  for i, (begin, what, phase) in enumerate(marks):
    if what == 'begin':
      number = 1 + sum(key[0] == phase for key in seconds)
      seconds[phase, number] = next(
        (
          mark[0] - begin
          for mark in marks[i + 1 :]
          if phase == 'step' or mark[1:] == ('end', phase)
        ),
        0.0,
      )
  return seconds


def main(arguments: argparse.Namespace) -> int:
  place = pathlib.Path(tempfile.mkdtemp(prefix='kills-'))
  print('in', place)
  (place / 'text').mkdir()
  text, cache = tiny.write_text(place / 'text'), place / 'xdg'
  began, total = time.monotonic(), Report()
  numbers = range(-(-arguments.kills // KILLS_OF_A_CASE))
  if arguments.case >= 0:
    numbers = [arguments.case]
  with futures.ThreadPoolExecutor(arguments.jobs) as pool:
    expected = list(
      pool.map(
        lambda i: of_method(i, place / f'alone_{i}', text, cache).complete(),
        range(len(METHODS)),
      )
    )

    def of_number(i):
      count = min(KILLS_OF_A_CASE, arguments.kills - i * KILLS_OF_A_CASE)
      return case(
        *(i, arguments.seed, count, expected[i % len(METHODS)]),
        *(place / f'case_{i}', text, cache),
      )

    for done in futures.as_completed(
      [pool.submit(of_number, i) for i in numbers]
    ):
      total.add(done.result())
      (place / 'summary.md').write_text(total.table())
      print(
        f'{len(total.hits)} kills, {len(total.wrong)} wrong, '
        f'{time.monotonic() - began:.0f} s',
        flush=True,
      )
  print(f'\n{total.table()}')
  return 1 if total.wrong or total.leftovers else 0


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=200)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--case', type=int, default=-1)
  parser.add_argument('--jobs', type=int, default=2, help='at once')
  sys.exit(main(parser.parse_args()))
