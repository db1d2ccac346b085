"""Writes what the study trains, and what it costs; trains nothing.

  python -m experiments.study.plan

The table goes to experiments/results/study/PLAN.md.
"""

import sys

from experiments.study import report, runs
from moe_jax.analysis.command_line import table

_HEAD = """# What the study trains

Written by `python -m experiments.study.plan`. Hours are estimates, of two cores
that do nothing else; a run is counted where it is first asked for.

What that buys: how methods balance in every step of a million tokens, and by
how much their losses differ there, with the spread over seeds. What it cannot
show: whether differences last over billions of tokens, or in models a hundred
times larger."""


def plan() -> str:
  """Returns the table as Markdown."""
  rows, seen = [], set()
  for question in report.QUESTIONS:
    new = [
      (arm, seed)
      for arm in question.arms
      for seed in arm.seeds
      if arm.path(seed) not in seen
    ]
    seen |= {arm.path(seed) for arm, seed in new}
    done = sum(arm.path(seed).exists() for arm, seed in new)
    hours = sum(arm.minutes for arm, _ in new) / 60
    rows.append([question.title, len(new), done, f'{hours:.1f}'])
  _, *numbers = zip(*rows, strict=True)
  total = [sum(map(float, column)) for column in numbers]
  rows.append(['in total', int(total[0]), int(total[1]), f'{total[2]:.1f}'])
  return f'{_HEAD}\n\n{table(["question", "runs", "done", "hours"], rows)}\n'


def main() -> int:
  """Runs the program; returns its exit code."""
  text = plan()
  (runs.RESULTS / 'PLAN.md').write_text(text)
  print(text)
  return 0


if __name__ == '__main__':
  sys.exit(main())
