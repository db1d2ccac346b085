"""Tells whether routes and predictions depend on the tokens that follow.

    python -m moe_jax.analysis.causality --run=DIR [--OPTION=VALUE ...]

The tokens after a position are replaced by random ones, in all sequences of a
batch. What the model did for the tokens up to it must not change: their routes,
and the logits of what follows them.

    --run        work directory of a run with a checkpoint.
    --step       of the checkpoint (the newest).
    --text       UTF-8 file; without it, the run's own text, from its first
                 evaluation set.
    --sequences  of the batch (as many as a microbatch of the run has).
    --positions  as 15,31; without it, at a quarter, half and three quarters of
                 a sequence.
    --seed       of the random tokens (0).
    --out        JSON file with all numbers.

Prints Markdown. Exit codes: 0 answered, whatever was found; 2 refused (bad
input).
"""

from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

import numpy as np

from moe_jax import data
from moe_jax.analysis.causality_audit import (
  PASSES,
  Leak,
  Pass,
  causality,
  decoding,
)
from moe_jax.analysis.checkpoint import Checkpoint
from moe_jax.analysis.command_line import Parser, answer, check_output, table
from moe_jax.analysis.run import Run
from moe_jax.options import Option


def text_of(
  run: Run, checkpoint: Checkpoint, path: str = '', sequences: int = 0
) -> np.ndarray:
  """Reads a batch of text as a run has it.

  Args:
    run: of the checkpoint; its tokenizer makes tokens of a file.
    checkpoint: its config tells the text and the sizes.
    path: a file; '' takes the run's first evaluation set.
    sequences: 0 takes as many as a microbatch has.

  Returns:
    int32 [sequences, sequence_length], from the beginning of the text.

  Raises:
    ValueError: the text is too short, is no longer that of the run, or there
      is none.
    OSError: it cannot be read.
  """
  config = checkpoint.config
  if path:
    tokens_N = run.tokenizer.encode(pathlib.Path(path).read_text('utf-8'))
  else:
    if 'text_fingerprint' not in run.facts:
      raise ValueError(
        '--text: this model has no text of its own, it was imported; give a '
        'file'
      )
    text = data.load_text(config.data)
    if text.fingerprint != run.facts['text_fingerprint']:
      raise ValueError(
        '--text: the text that the options of the run name has changed since; '
        'give a file'
      )
    tokens_N = next(iter(text.evaluation.values()), text.train[0].tokens)
  count = sequences or config.batch_size // config.accumulation
  length = config.sequence_length
  if len(tokens_N) < count * length:
    raise ValueError(
      f'--sequences={count}: the text has {len(tokens_N)} tokens, enough for '
      f'{len(tokens_N) // length} sequences of {length}'
    )
  return np.int32(tokens_N[: count * length]).reshape(count, length)


def markdown(found: dict[str, Any]) -> str:
  """Writes what was found as a page of Markdown."""
  passes = found['passes']
  loss = passes['frozen'].loss
  return '\n\n'.join(
    [
      f'# Causality of {found["method"]}',
      f'{found["run"]}, step {found["step"]}, {found["sequences"]} sequences.',
      table(
        ['pass', 'routes flipped', 'logits differ by', 'loss', 'gap'],
        [
          [
            name,
            f'{each.flipped:.3%}',
            f'{each.logits:.2g}',
            f'{each.loss:.4f}',
            f'{each.loss - loss:+.4f}',
          ]
          for name, each in passes.items()
        ],
      ),
      '\n'.join(f'- *{name}*: {PASSES[name]}.' for name in passes),
      '*routes flipped*: share of the routes up to a position that change when '
      'the tokens after it are replaced in all sequences, mean over positions; '
      '*logits differ by*: the most, up to the position; *loss*: nats a token; '
      '*gap*: to the frozen pass.',
      table(
        ['pass', 'position', 'routes flipped', 'by layer'],
        [
          [
            name,
            leak.position,
            f'{leak.flipped:.3%}',
            ' '.join(f'{share:.2%}' for share in leak.flipped_layers),
          ]
          for name, each in passes.items()
          for leak in each.leaks
        ],
      ),
      found['decoded'],
    ]
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  return answer(lambda: _answer(argv))


def _answer(argv: Sequence[str] | None) -> str:
  parser = Parser(description=__doc__)
  parser.add_argument('--run', required=True)
  for name in ('text', 'positions', 'out'):
    parser.add_argument(f'--{name}', default='')
  for name in ('step', 'sequences', 'seed'):
    parser.add_argument(f'--{name}', default=0, type=int)
  options = parser.parse_args(argv)
  for name in ('step', 'sequences', 'seed'):
    Option(least=0, most=2**31 - 1).check(f'--{name}', getattr(options, name))
  check_output('out', options.out)
  run = Run(options.run)
  checkpoint = run.restore(options.step or None)
  config = checkpoint.config
  positions = _positions(options.positions, config.sequence_length)
  tokens_BxS = text_of(run, checkpoint, options.text, options.sequences)
  in_documents = None
  if not config.data.cross_documents:
    in_documents = data.document_positions(
      tokens_BxS, run.tokenizer.end_of_document
    )
  limited = config.capacity_factor or config.model.round_to_capacity
  found = {
    'run': str(run.workdir),
    'method': run.method,
    'step': checkpoint.step,
    'sequences': len(tokens_BxS),
    'passes': causality(
      checkpoint.model,
      tokens_BxS,
      positions,
      passes=tuple(PASSES) if limited else ('frozen', 'solved'),
      seed=options.seed,
      document_positions_BxS=in_documents,
    ),
  }
  try:
    found['decoding'] = decoded = decoding(checkpoint.model, tokens_BxS)
    found['decoded'] = (
      f'Fed token by token, {decoded.flipped:.3%} of the routes differ from '
      f'those of the frozen pass, and logits by {decoded.logits:.2g}.'
    )
  except ValueError as error:
    found['decoded'] = f'Not fed token by token: {error}.'
  if options.out:
    text = json.dumps(_plain(found), indent=1)
    pathlib.Path(options.out).write_text(text + '\n')
  return markdown(found)


def _positions(text: str, sequence: int) -> list[int]:
  if not text:
    return [part * sequence // 4 - 1 for part in (1, 2, 3)]
  try:
    positions = [int(part) for part in text.split(',')]
  except ValueError:
    positions = [-1]
  if not all(0 <= position < sequence - 1 for position in positions):
    raise ValueError(
      f'--positions={text}: must be like 15,31, each from 0 to {sequence - 2}'
    )
  return positions


def _plain(found: Any) -> Any:
  if isinstance(found, Pass | Leak):
    return _plain(found._asdict())
  if isinstance(found, dict):
    return {key: _plain(value) for key, value in found.items()}
  return [_plain(x) for x in found] if isinstance(found, list) else found


if __name__ == '__main__':
  sys.exit(main())
