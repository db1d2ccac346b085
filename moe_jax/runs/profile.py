"""Traces of a few steps, for TensorBoard's page 'Profile' and for xprof."""

from collections.abc import Iterable, Iterator
import os

import jax


def profiled(
  steps: Iterable[int], window: str, workdir: str | os.PathLike[str]
) -> Iterator[int]:
  """Yields steps; while those of a window run, the profiler does.

  Args:
    steps: numbers of steps, increasing.
    window: 'START:STEPS', or '' for none.
    workdir: local; the trace goes to its folder plugins/profile.
  """
  first, count = map(int, (window or '0:0').split(':'))
  running = False
  try:
    for step in steps:
      # A step is waited for when the next one is under way.
      if running and step > first + count:
        jax.profiler.stop_trace()
        running = False
      # Also where a run goes on within its window.
      if not running and first <= step < first + count:
        jax.profiler.start_trace(workdir)
        running = True
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        yield step
  finally:
    if running:
      jax.profiler.stop_trace()
