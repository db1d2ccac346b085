"""A run resumes at the same token, whatever its batches are then."""

import itertools
import json
import shutil
import types

import numpy as np
import pytest

from moe_jax import analysis
from moe_jax.config import to_dict
from moe_jax.options import Refused
from moe_jax.runs import checkpoints
from moe_jax.train import batches as batches_lib
from moe_jax.train import loop
from moe_jax.train import plan as plan_lib
from tests.train import tiny


def rows(plan, count, sequence=0):
  """Returns the next inputs of a run, as one array."""
  batches = batches_lib.training_batches(
    plan.config, plan.mesh, plan.text, sequence
  )
  taken = itertools.islice(batches, count)
  return np.concatenate([np.asarray(batch.inputs) for batch in taken])


def test_runs_of_other_batch_sizes_see_the_same_rows(text, tmp_path):
  small, large = (
    plan_lib.plan(tiny.tiny_config(text, batch_size=size), tmp_path / 'run')
    for size in (8, 24)
  )
  expected = rows(small, 9)
  np.testing.assert_array_equal(rows(large, 3), expected)
  np.testing.assert_array_equal(rows(large, 2, 24), expected[24:])


def position_now(text, **now):
  """Returns that of a run after 5 steps of 8 sequences of 16 tokens."""
  before = to_dict(tiny.tiny_config(text))
  plan = types.SimpleNamespace(config=tiny.tiny_config(text, **now))
  saved = checkpoints.Saved({}, checkpoints.Position(5, 40), before, {})
  return loop._position_now(plan, before, saved).next_sequence


@pytest.mark.parametrize(
  ('now', 'sequence'),
  [
    ({}, 40),
    ({'batch_size': 32}, 40),
    ({'sequence_length': 32}, 20),
    ({'sequence_length': 8, 'batch_size': 16}, 80),
    ({'sequence_length': 48}, 13),  # 13 * 48 = 624 of 640 tokens.
  ],
  ids=str,
)
def test_the_position_is_that_of_the_token(text, now, sequence):
  assert position_now(text, **now) == sequence


def test_routes_are_not_replayed_on_other_rows(text):
  assert position_now(text, replay_routes='runs/x') == 40
  with pytest.raises(Refused, match='replay_routes=runs/x: not where'):
    position_now(text, replay_routes='runs/x', batch_size=16)


@pytest.mark.long
def test_a_run_resumes_with_other_batches(text, tmp_path, monkeypatch):
  """Three steps of 8 x 16 tokens, two of 16 x 16, one of 8 x 48."""
  workdir, seen = tmp_path / 'run', []

  def watched(config, mesh, text, sequence):
    seen.append((config.batch_size, config.sequence_length, sequence))
    return batches_lib.training_batches(config, mesh, text, sequence)

  monkeypatch.setattr(loop, 'training_batches', watched)
  options = {'checkpoint_every': 1, 'data.evaluation_sets': ''}
  tiny.run(tiny.tiny_config(text, steps=3, **options), workdir)
  larger = tiny.tiny_config(text, steps=5, batch_size=16, **options)
  with pytest.raises(
    ValueError, match='--allow_config_change=batch_size,steps'
  ):
    plan_lib.plan(larger, workdir)
  tiny.run(larger, workdir, ['batch_size', 'steps'])
  options = {'sequence_length': 48, **options}
  longer = tiny.tiny_config(text, steps=6, **options)
  tiny.run(longer, workdir, ['batch_size', 'steps', 'sequence_length'])
  # 24 rows, then 32 more: 896 tokens, of which 18 of the new rows are 864.
  assert seen == [(8, 16, 0), (16, 16, 24), (8, 48, 18)]
  for step, sequence in ((5, 56), (6, 26)):
    path = workdir / f'checkpoints/{step}/data/metadata'
    assert json.loads(path.read_text()) == {'next_sequence': sequence}
  run = analysis.Run(workdir)
  tokens = [128, 256, 384, 640, 896, 1280]
  assert run.tokens.tolist() == tokens
  assert run.facts['tokens_per_step'] == 384
  # Where no checkpoint of the new length is left, the old one is converted.
  shutil.rmtree(workdir / 'checkpoints/6')
  tiny.run(longer, workdir)
  assert seen[-1] == (8, 48, 18)
