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

Shape letters: V variants of a batch, B batch, S sequence, L layers, K chosen.
"""

from collections.abc import Sequence
import functools
import json
import pathlib
import sys
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax import data
from moe_jax.analysis.checkpoint import Checkpoint
from moe_jax.analysis.command_line import Parser, answer, check_output, table
from moe_jax.analysis.run import Run
from moe_jax.nn import Decoder
from moe_jax.options import Option

PASSES = {
  'frozen': 'q as it was saved, as in evaluation and in a deployed model',
  'solved': 'q solved on the batch, neither capacity nor rounding, as '
  'perplexity_solved is',
  'training': 'as a training step routes: q solved, with capacity and rounding '
  'where the run has them',
}


class Leak(NamedTuple):
  """What changed when the tokens after a position were replaced.

  Attributes:
    position: the last one whose token was kept, counted from 0.
    flipped: share of the routes up to it that changed; a route is a token's
      choice of one expert in a layer, whatever its rank.
    flipped_layers: the same of each MoE layer.
    logits: largest absolute difference up to the position. Where no route
      flips, sums of other tokens in another order may change last bits.
  """

  position: int
  flipped: float
  flipped_layers: list[float]
  logits: float


class Pass(NamedTuple):
  """One way to run a model.

  Attributes:
    loss: nats a token, on the tokens as they were.
    leaks: one for each position.
  """

  loss: float
  leaks: list[Leak]

  @property
  def flipped(self) -> float:
    """Share of routes that flipped, mean over positions."""
    return float(np.mean([leak.flipped for leak in self.leaks]))

  @property
  def logits(self) -> float:
    """Largest difference of logits at any position."""
    return max(leak.logits for leak in self.leaks)


def causality(
  model: Decoder,
  tokens_BxS: jax.Array,
  positions: Sequence[int],
  *,
  passes: Sequence[str] = tuple(PASSES),
  seed: int = 0,
) -> dict[str, Pass]:
  """Replaces what follows and looks for changes in what came before.

  The tokens after a position are replaced in all sequences: a price that was
  solved on the batch has seen all of them. The model is not changed.

  Args:
    model: as trained, on any mesh that the batch divides over.
    tokens_BxS: int32 [batch, sequence].
    positions: the last ones to be kept, each from 0 to S - 2.
    passes: which of `PASSES` to run.
    seed: of the random tokens.

  Returns:
    What was found, by pass.

  Raises:
    ValueError: a position or a pass is impossible.
  """
  sequence = tokens_BxS.shape[1]
  if not positions:
    raise ValueError('positions: none is given; give at least one')
  for position in positions:
    Option(least=0, most=sequence - 2).check('positions', position)
  for name in passes:
    Option(among=tuple(PASSES)).check('passes', name)
  random = np.random.default_rng(seed)
  vocabulary = model.embedding.num_embeddings
  variants = [np.asarray(tokens_BxS)]
  for position in positions:
    others = random.integers(0, vocabulary, variants[0].shape)
    after = np.arange(sequence) > position
    variants.append(np.where(after, others, variants[0]))
  graphdef, state = nnx.split(model)
  found = _compare(
    graphdef,
    state,
    np.stack(variants).astype(np.int32),
    np.array([sequence - 1, *positions]),
    passes=tuple(passes),
  )
  return {
    name: Pass(float(loss_V[0]), _leaks(positions, flipped_VxL, logits_V))
    for name, (loss_V, flipped_VxL, logits_V) in jax.device_get(found).items()
  }


def _leaks(positions, flipped_VxL, logits_V) -> list[Leak]:
  return [
    Leak(position, float(flipped_L.mean()), flipped_L.tolist(), float(logits))
    for position, flipped_L, logits in zip(
      positions, flipped_VxL[1:], logits_V[1:], strict=True
    )
  ]


@functools.partial(jax.jit, static_argnames=('graphdef', 'passes'))
def _compare(graphdef, state, tokens_VxBxS, positions_V, *, passes):
  """Compares variants with the first one; returns (loss, flipped, logits)."""

  def run(name, tokens_BxS):
    model = nnx.merge(graphdef, state, copy=True)
    model.set_attributes(dropless=name != 'training')
    logits, outputs = model(tokens_BxS, train=name != 'frozen')
    return logits, _routes(outputs, tokens_BxS.shape)

  def compare(first, variant):
    """Carries the first variant's results along: logits are large."""
    tokens_BxS, position, is_first = variant
    found = {name: run(name, tokens_BxS) for name in passes}
    first = jax.tree.map(
      lambda old, new: jnp.where(is_first, new, old), first, found
    )
    kept_S = jnp.arange(tokens_BxS.shape[1]) <= position
    return first, {
      name: (
        _loss(found[name][0], tokens_BxS),
        *difference(first[name], found[name], kept_S),
      )
      for name in passes
    }

  abstract = jax.eval_shape(
    lambda tokens_BxS: {name: run(name, tokens_BxS) for name in passes},
    tokens_VxBxS[0],
  )
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
  is_first_V = jnp.arange(len(tokens_VxBxS)) == 0
  _, found = lax.scan(compare, nothing, (tokens_VxBxS, positions_V, is_first_V))
  return found


def _routes(outputs, shape) -> jax.Array:
  experts = outputs.choice.experts
  return experts.reshape(len(experts), *shape, -1)


def difference(
  first: tuple[jax.Array, jax.Array],
  other: tuple[jax.Array, jax.Array],
  kept_S: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Compares logits [B, S, V] and experts [L, B, S, K] at positions kept.

  Returns:
    The share of routes that differ, [L], and the most that logits differ by.
  """
  (logits_BxSxV, experts_LxBxSxK), (logits, experts) = first, other
  same = experts_LxBxSxK[..., :, None] == experts[..., None, :]
  flipped_LxBxSxK = ~jnp.any(same, axis=-1) & kept_S[:, None]
  count = jnp.sum(kept_S) * experts[0].size // len(kept_S)
  difference_BxSxV = jnp.abs(logits_BxSxV - logits) * kept_S[:, None]
  return (
    jnp.sum(flipped_LxBxSxK, axis=(1, 2, 3)) / count,
    jnp.max(difference_BxSxV),
  )


def _loss(logits_BxSxV, tokens_BxS) -> jax.Array:
  """Averages the cross-entropy of all tokens but each sequence's first."""
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(
      logits_BxSxV[:, :-1], tokens_BxS[:, 1:]
    )
  )


def decoding(model: Decoder, tokens_BxS: jax.Array) -> Leak:
  """Feeds a batch token by token, as generation does, and compares.

  Returns:
    How routes and logits differ from those of the frozen pass on whole
    sequences.
  """
  graphdef, state = nnx.split(model)
  flipped_L, logits = jax.device_get(_decode(graphdef, state, tokens_BxS))
  last = tokens_BxS.shape[1] - 1
  return _leaks([last], np.stack([flipped_L] * 2), np.stack([logits] * 2))[0]


@functools.partial(jax.jit, static_argnames='graphdef')
def _decode(graphdef, state, tokens_BxS):
  model = nnx.merge(graphdef, state, copy=True)
  logits_BxSxV, outputs = model(tokens_BxS, train=False)
  whole = logits_BxSxV, _routes(outputs, tokens_BxS.shape)

  def feed(cache, token_B):
    logits_Bx1xV, outputs, cache = model.extend(token_B[:, None], cache)
    return cache, (logits_Bx1xV, _routes(outputs, (len(token_B), 1)))

  cache = model.init_cache(*tokens_BxS.shape)
  _, (logits_SxBx1xV, experts_SxLxBx1xK) = lax.scan(feed, cache, tokens_BxS.T)
  steps = (
    jnp.moveaxis(logits_SxBx1xV[:, :, 0], 0, 1),
    jnp.moveaxis(experts_SxLxBx1xK[..., 0, :], 0, 2),
  )
  return difference(whole, steps, jnp.ones(tokens_BxS.shape[1], bool))


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
    ValueError: the text is too short, or is no longer that of the run.
    OSError: it cannot be read.
  """
  config = checkpoint.config
  if path:
    tokens_N = run.tokenizer.encode(pathlib.Path(path).read_text('utf-8'))
  else:
    text = data.load_text(config.data)
    if text.fingerprint != run.facts['text_fingerprint']:
      raise ValueError(
        '--text: the text that the options of the run name has changed since; '
        'give a file'
      )
    tokens_N = next(iter(text.evaluation.values()), text.train_tokens)
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
  passes, decoded = found['passes'], found['decoding']
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
      f'Fed token by token, {decoded.flipped:.3%} of the routes differ from '
      f'those of the frozen pass, and logits by {decoded.logits:.2g}.',
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
    ),
    'decoding': decoding(checkpoint.model, tokens_BxS),
  }
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
