"""Runs tasks of lm-evaluation-harness on a checkpoint of a run.

    python -m moe_jax.analysis.harness --run=DIR --tasks=NAME[,NAME] \\
        [--OPTION=VALUE ...]

Accuracies and the like beside perplexity, with q frozen, as in a deployed
model. It needs `pip install -r requirements-harness.txt`; most tasks fetch
their data from a network when they are first used.

    --run      work directory of a run with a checkpoint.
    --tasks    by their names in the harness; see `lm_eval ls tasks`.
    --step     of the checkpoint (the newest).
    --include  directory with YAML files of more tasks.
    --shots    examples in front of each question (as many as the task says).
    --limit    questions of each task (0: all).
    --out      JSON file with all numbers.

Prints Markdown. Exit codes: 0 answered; 2 refused (bad input).
"""

from collections.abc import Sequence
import importlib.util
import itertools
import json
import pathlib
import sys
from typing import Any

from moe_jax.analysis.checkpoint import Checkpoint
from moe_jax.analysis.command_line import Parser, answer, check_output, table
from moe_jax.analysis.likelihood import log_likelihoods
from moe_jax.analysis.run import Run
from moe_jax.options import Option

_BATCH = 8  # sequences on each device


def language_model(run: Run, checkpoint: Checkpoint):
  """Returns a checkpoint as the `lm_eval.api.model.LM` that tasks ask.

  A request begins as a text of the model does: with `tokenizer.beginning`, or
  at the end of a document, as in training. An answer ends with its document.
  What is longer than a sequence of the training loses its beginning, and a
  longer continuation is read in parts.
  """
  from lm_eval.api.model import LM

  tokenizer, longest = run.tokenizer, checkpoint.config.sequence_length
  end = tokenizer.end_of_document
  start = tokenizer.beginning or [end]

  def scored(requests):
    return log_likelihoods(
      checkpoint.model,
      requests,
      longest=longest,
      batch=_BATCH * checkpoint.mesh.size,
    )

  def pair(context, continuation):
    # Tokens often begin with a space, and none should be parted from its word.
    words = context.rstrip()
    continuation, context = context[len(words) :] + continuation, words
    whole = tokenizer.encode(context + continuation)
    before = len(tokenizer.encode(context)) if context else 0
    return [*start, *whole[:before]], whole[before:]

  class WorkDirectory(LM):
    """Answers with the model of a work directory."""

    def loglikelihood(self, requests, disable_tqdm=False):
      found = scored([pair(*request.args) for request in requests])
      return [tuple(each) for each in found]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      texts = (tokenizer.encode(request.args[0]) for request in requests)
      return [each.log for each in scored([(start, text) for text in texts])]

    def generate_until(self, requests, disable_tqdm=False):
      answers = []
      for request in requests:
        prompt, options = request.args
        stops = options.get('until', [])
        tokens = options.get('max_gen_toks', 256)
        if tokens >= longest:
          raise ValueError(
            f'max_gen_toks={tokens}: must be less than the sequence_length of '
            f'the run, {longest}; set it in generation_kwargs of the task'
          )
        found = checkpoint.continue_ids(
          [*start, *tokenizer.encode(prompt)][tokens - longest :],
          tokens=tokens,
          temperature=options.get('temperature', 0.0),
        )
        document = itertools.takewhile(lambda token: token != end, found)
        text = tokenizer.decode(list(document))
        for stop in [stops] if isinstance(stops, str) else stops:
          text = text.partition(stop)[0] if stop else text
        answers.append(text)
      return answers

  return WorkDirectory()


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  return answer(lambda: _answer(argv))


def _answer(argv: Sequence[str] | None) -> str:
  parser = Parser(description=__doc__)
  for name in ('run', 'tasks'):
    parser.add_argument(f'--{name}', required=True)
  for name in ('include', 'out'):
    parser.add_argument(f'--{name}', default='')
  parser.add_argument('--shots', default=None, type=int)
  for name in ('step', 'limit'):
    parser.add_argument(f'--{name}', default=0, type=int)
  options = parser.parse_args(argv)
  for name in ('step', 'shots', 'limit'):
    value = getattr(options, name) or 0
    Option(least=0, most=2**31 - 1).check(f'--{name}', value)
  check_output('out', options.out)
  if not importlib.util.find_spec('lm_eval'):
    raise ValueError(
      'lm_eval is not installed; pip install -r requirements-harness.txt'
    )
  run = Run(options.run)
  checkpoint = run.restore(options.step or None)
  found = evaluated(run, checkpoint, options)
  if options.out:
    text = json.dumps(found, indent=1, default=str)
    pathlib.Path(options.out).write_text(text + '\n')
  return table(
    ['task', 'metric', 'value', 'standard error'],
    [
      [task, name.partition(',')[0], value, _error(values, name)]
      for task, values in found['results'].items()
      for name, value in values.items()
      if isinstance(value, float) and '_stderr' not in name
    ],
  )


def evaluated(run: Run, checkpoint: Checkpoint, options: Any) -> dict[str, Any]:
  """Returns what `lm_eval.simple_evaluate` found, without the samples.

  Raises:
    ValueError: there is no such task.
  """
  import lm_eval
  from lm_eval.tasks import TaskManager

  manager = TaskManager(include_path=options.include or None)
  tasks = options.tasks.split(',')
  for task in tasks:
    if task not in manager.all_tasks:
      raise ValueError(
        f'--tasks={task}: the harness has no such task; see lm_eval ls tasks'
      )
  return lm_eval.simple_evaluate(
    model=language_model(run, checkpoint),
    tasks=tasks,
    num_fewshot=options.shots,
    limit=options.limit or None,
    task_manager=manager,
    log_samples=False,
  )


def _error(values: dict[str, Any], name: str) -> Any:
  metric, _, filtered = name.partition(',')
  error = values.get(f'{metric}_stderr,{filtered}', '-')
  return error if isinstance(error, float) else '-'


if __name__ == '__main__':
  sys.exit(main())
