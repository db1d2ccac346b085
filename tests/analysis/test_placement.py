"""Placements by hand, against all placements, and of recorded loads."""

import dataclasses
import itertools
import json

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from moe_jax import nn
from moe_jax.analysis import load_prediction as prediction
from moe_jax.analysis import placement
from moe_jax.analysis import placement_policies as policies
from moe_jax.analysis.placement_study import simulate
from moe_jax.analysis.step_time import step_time
from moe_jax.nn.latent_attention import LatentAttention


def test_greedy_by_hand():
  load_LxE = np.array([[5.0, 4, 3, 3, 2, 1], [10, 1, 1, 1, 1, 1]])
  device_LxE = policies.greedy(load_LxE, 3).argmax(-1)
  # 5 + 1, 4 + 2, 3 + 3; and 10 has to have company.
  assert device_LxE.tolist() == [[0, 1, 2, 2, 1, 0], [0, 1, 2, 1, 2, 0]]
  share = policies.greedy(load_LxE, 3)
  np.testing.assert_allclose(policies.imbalance(load_LxE, share), [1, 2.2])
  in_order = policies.contiguous(6, 3)
  np.testing.assert_allclose(policies.imbalance(load_LxE, in_order), [1.5, 2.2])


def test_replicas_by_hand():
  """10 gets two copies: 4, 10/3 | 10/3 and 0, and 10/3 and 2 on the other."""
  load_LxE = np.array([[10.0, 4, 2, 0]])
  share = policies.replicas(load_LxE, 2, 2)
  np.testing.assert_allclose(share[0], [[1 / 3, 2 / 3], [1, 0], [0, 1], [1, 0]])
  np.testing.assert_allclose(policies.imbalance(load_LxE, share), 26 / 24)
  split = policies.best_split(load_LxE[0], share[0])  # 4 + 4, 6 + 2
  np.testing.assert_allclose(split[0], [0.4, 0.6])
  np.testing.assert_allclose(policies.imbalance(load_LxE[0], split), 1)


def test_the_optimum_where_greedy_misses_it():
  load_E = np.array([3.0, 3, 2, 2, 2, 0])
  share = policies.greedy(load_E[None], 2)
  np.testing.assert_allclose(policies.imbalance(load_E[None], share), 7 / 6)
  found = policies.optimum(load_E, 2)  # 3 + 3 + 0, 2 + 2 + 2
  np.testing.assert_allclose(found, (1, 1))
  heavy = policies.optimum(np.array([10.0, 1, 1, 1]), 2)  # 10 + 1, 1 + 1
  np.testing.assert_allclose(heavy, (22 / 13, 22 / 13))


loads = st.lists(st.integers(0, 50), min_size=6, max_size=6).map(np.float64)


@settings(max_examples=30, deadline=None)
@given(loads, st.sampled_from([2, 3]))
def test_no_placement_is_better_than_the_optimum(load_E, devices):
  slots = 6 // devices
  best = min(
    policies.imbalance(load_E, np.eye(devices)[list(device)])
    for device in set(itertools.permutations(np.repeat(range(devices), slots)))
  )
  found = policies.optimum(load_E, devices)
  assert found.bound <= best + 1e-6
  assert best - 1e-6 <= found.imbalance <= 1.01 * best + 1e-6


@settings(max_examples=50, deadline=None)
@given(loads, loads, st.sampled_from([2, 3, 6]), st.integers(0, 2))
def test_laws_of_placements(load_E, guess_E, devices, each):
  """By a wrong guess as well: the true load is conserved, and bounds hold."""
  in_order = policies.contiguous(6, devices)
  greedy = policies.greedy(guess_E[None], devices)[0]
  copies = policies.replicas(guess_E[None], devices, each * devices)[0]
  split = policies.best_split(load_E, copies)
  for share in (in_order, greedy, copies, split):
    np.testing.assert_allclose(share.sum(1), 1)
    assert share.min() > -1e-9
  for share in (in_order, greedy):
    np.testing.assert_array_equal((share > 0).sum(0), 6 // devices)
  assert (copies > 0).sum(0).max() <= 6 // devices + each
  found = [
    policies.imbalance(load_E, share).item()
    for share in (split, copies, greedy, in_order)
  ]
  assert 1 - 1e-6 <= found[0] <= found[1] + 1e-6
  bound = policies.optimum(load_E, devices).bound
  assert bound <= min(found[2:]) + 1e-6
  if not each:
    np.testing.assert_array_equal(copies, greedy)


@settings(max_examples=30, deadline=None)
@given(loads)
def test_copies_make_the_highest_load_a_copy_least(load_E):
  added = itertools.combinations_with_replacement(range(6), 4)
  best = min(
    np.max(load_E / (1 + np.bincount(experts, minlength=6)))
    for experts in added
  )
  copies_E = policies.copies(load_E[None], 4)[0]
  assert copies_E.sum() == 10
  assert np.max(load_E / copies_E) == pytest.approx(best)


@pytest.mark.parametrize('name', prediction.PREDICTORS)
def test_predictions_do_not_see_the_future(name):
  random = np.random.default_rng(0)
  first, other = random.integers(1, 9, (2, 40, 3, 4)).astype(float)
  other[:30] = first[:30]
  predict = prediction.predictors(4, 0.1)[name]
  before, after = predict(first, 3), predict(other, 3)
  np.testing.assert_allclose(before[:30], after[:30])
  assert not np.allclose(before[30:], after[30:])


@pytest.mark.parametrize('name', prediction.PREDICTORS)
def test_constant_loads_are_predicted(name):
  same = np.tile([[[3.0, 5.0, 0.0]]], (50, 2, 1))
  wrong = prediction.errors(same, prediction.PREDICTORS[name], 7)
  assert wrong.shape == (43, 2)
  np.testing.assert_allclose(wrong, 0, atol=1e-12)


def test_predictors_by_hand():
  line = np.array([[[4.0, 12.0]], [[6.0, 10.0]], [[8.0, 8.0]]])
  trend = prediction.trend(line, 2)
  np.testing.assert_allclose(trend[1:, 0], [[10, 6], [12, 4]])
  np.testing.assert_allclose(prediction.trend(line, 9)[2, 0], [16, 0])
  wrong = prediction.errors(line, prediction.last, 1)
  np.testing.assert_allclose(wrong, 4 / 16)
  ema = prediction.ema(line, 1)
  np.testing.assert_allclose(ema[1, 0, 0], (0.09 * 4 + 0.1 * 6) / 0.19)


def test_drift_and_settling_by_hand():
  """Shares move from 1/4 to 3/4 at once; windows are of two records."""
  loads_NxLxE = np.array([[1.0, 3]] * 4 + [[3, 1]] * 6)[:, None] * [[[1], [5]]]
  drift = prediction.drift(loads_NxLxE, 2)
  wanted = [np.nan] * 3 + [0, 0.25, 0.5, 0.25, 0, 0, 0]
  np.testing.assert_allclose(drift, np.transpose([wanted] * 2))
  assert prediction.settled_since(drift, 0.1) == [7, 7]
  assert prediction.settled_since(drift, 0.5) == [3, 3]
  assert prediction.settled_since(drift[:6], 0.1) == [None, None]
  regime = prediction.regime(loads_NxLxE, 1, 2, 0.1)
  np.testing.assert_allclose(regime[6], loads_NxLxE[6])  # the last record
  np.testing.assert_allclose(regime[7], loads_NxLxE[7])  # the mean of four
  noisy = loads_NxLxE + [[[0, 0]], [[1, 0]]] * 5
  means = prediction.regime(noisy, 1, 2, 1.0)
  np.testing.assert_allclose(means[9], noisy[6:].mean(0))


def test_simulation_by_hand():
  """The placement after record 0 is for records 1 and 2."""
  loads = np.array([[[9.0, 1, 1, 1]], [[1, 9, 1, 1]], [[9, 0, 0, 3]]])
  placed = simulate(loads, loads, lambda x: policies.greedy(x, 2), interval=2)
  # Begins with experts 0 and 2, 1 and 3; then 0 and 3, 1 and 2.
  np.testing.assert_allclose(placed.imbalance_NxL, [[10 / 6], [12 / 6]])
  assert placed.moves == 1 / 2


def test_step_time_by_hand():
  config = {
    'model': {
      'width': 4,
      'hidden': 3,
      'experts': 8,
      'experts_per_token': 2,
      'shared_experts': 1,
      'layers': 3,
      'dense_layers': 1,
      'dense_hidden': 5,
      'heads': 2,
      'kv_heads': 1,
      'head_size': 0,
    },
    'data': {'vocabulary': 10},
  }
  time = step_time(config, pairs=32, devices=2, flops=1e3, bandwidth=1e2)
  # Two layers, 16 pairs a device: 216 FLOPs, 4 x 4 numbers, half of them sent.
  assert time.even == pytest.approx(2 * 16 * (216 / 1e3 + 16 / 1e2))
  # Attention 48 x 3, shared expert and router 68 x 2, dense 60, output 40.
  assert time.other == pytest.approx(6 * 380 * 16 / 2 / 1e3)
  assert time.move == pytest.approx(2 * 36 * 12 / 1e2)
  assert time.copy == pytest.approx(2 * 36 * 8 / 1e2)
  assert time.seconds(1.5, moves=0.5, copies=2) == pytest.approx(
    time.other + 1.5 * time.even + 0.5 * time.move + 2 * time.copy
  )


@pytest.mark.parametrize('queries', [0, 24])
def test_latent_attention_costs_its_own_matrices(queries):
  """Priced are the parameters of the layer, but for its norms."""
  model = nn.DecoderConfig(
    width=16,
    layers=1,
    heads=4,
    head_size=8,
    rotary_size=2,
    latent_size=12,
    query_latent_size=queries,
    value_size=6,
    shared_experts=0,
  )
  layer = LatentAttention(model, rngs=nnx.Rngs(0))
  parameters = sum(
    leaf.size for leaf in jax.tree.leaves(nnx.state(layer)) if leaf.ndim == 2
  )
  config = {'model': dataclasses.asdict(model), 'data': {'vocabulary': 10}}
  time = step_time(config, pairs=16, devices=1, flops=1.0, bandwidth=1.0)
  # With the router's 16 x 16 and the output's 16 x 10, for 16 / 4 tokens.
  assert time.other == 6 * (parameters + 256 + 160) * 4


def test_a_run_is_told(write_run, tmp_path, capsys):
  """Loads of layer 0: 10 4 2 0, then 4 4 4 4 twice; of layer 1 see conftest."""
  workdir = write_run()
  command = [f'--run={workdir}', '--devices=2', '--interval=1', '--window=2']
  out, name = tmp_path / 'out.json', tmp_path / 'figure'
  outputs = [f'--out={out}', f'--figure={name}']
  assert placement.main([*command, *outputs]) == 0
  page = capsys.readouterr().out
  told = json.loads(out.read_text())
  by_policy = {(r['policy'], r['predictor']): r for r in told['policies']}
  # In order: layer 0 1 and 1, layer 1 16/8 and 10/8.
  in_order = by_policy['contiguous', '-']
  assert in_order['max / mean'] == pytest.approx((1 + 2 + 1 + 1.25) / 4)
  assert in_order['worst layer'] == pytest.approx(1.625)
  assert in_order['worst record'] == pytest.approx(1.5)
  # By the last record, layer 1: 6 6 2 2 pairs 0 with 2, then 8 8 0 0 likewise.
  assert by_policy['greedy', 'last']['max / mean'] == pytest.approx(4.125 / 4)
  even = by_policy['even loads', '-']
  assert even['step, us'] < in_order['step, us']
  assert even['over even, %'] == pytest.approx(0)
  for row in told['hindsight'].values():
    best = row['bound of that optimum']
    assert best <= row['optimum without copies, loads known'] + 1e-9
    assert best <= min(row['contiguous'], row['greedy']) + 1e-9
    assert 1 - 1e-9 <= row['replicas, tokens split at best']
    assert row['replicas, tokens split at best'] <= row['replicas'] + 1e-9
  # 12 of 16 in layer 0, then 0; 8 of 16 in layer 1, then 12.
  assert told['errors']['last']['1 ahead'] == pytest.approx(0.5)
  assert told['settled'] == [None, None]
  assert 'Loads settle in 0 of 2 layers up to step 3' in page
  assert told['errors']['last']['settled'] is None
  assert '| greedy | last |' in page
  for suffix in ('png', 'svg'):
    assert name.with_suffix(f'.{suffix}').stat().st_size > 1000


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ([], '--devices=8: must divide the 4 experts; 2, 4 would do'),
    (['--devices=1'], '--devices=1: must be 2 or more'),
    (['--devices=two'], 'argument --devices: invalid int value'),
    (['--predictor=oracle'], "--predictor='oracle': must be one of"),
    (['--flops=nan'], '--flops=nan: must be greater than 0'),
    (['--devices=2', '--redundant=3'], 'must be a multiple of --devices=2'),
    (['--devices=2', '--interval=3'], 'must be less than the 3 records'),
    (['--out=/nowhere/a.json'], 'must be a file in an existing directory'),
    (['--run=/nowhere'], '/nowhere'),
    (['--loads=3'], 'unrecognized arguments: --loads=3'),
  ],
)
def test_refuses_in_one_line(options, words, write_run, capsys):
  assert placement.main([f'--run={write_run()}', *options]) == 2
  captured = capsys.readouterr()
  assert captured.out == ''
  assert words in captured.err
  assert captured.err.count('\n') == 1


def test_a_run_without_loads_is_refused(write_run, capsys):
  records = [{'step': 1, 'train/loss': 1.0, 'router/max_violation': 0.0}]
  assert placement.main([f'--run={write_run(records=records)}']) == 2
  assert (
    'has loads of 0 steps; at least 2 are needed' in capsys.readouterr().err
  )
