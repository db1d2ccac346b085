"""The study: its arms, what is stored of them, and the report made of that."""

import json
import math
import re
import types

import numpy as np
import pandas as pd
import pytest

from experiments.study import (
  audits,
  balance,
  demo,
  figures,
  online,
  plan,
  question,
  report,
  runs,
  step_times,
  tuning,
)
from experiments.study.runs import Arm
from experiments.study.statistics import paired, saving
from moe_jax import config
from moe_jax import main as command_line

MAIN = balance.MAIN
ARMS = [arm for each in report.QUESTIONS for arm in each.arms]


def test_every_arm_is_accepted():
  for arm in ARMS:
    options, _ = command_line.parse(arm.command(0, 'runs/x')[1:])
    config.freeze(options)


def test_an_arm_has_one_meaning():
  meanings = {}
  for arm in ARMS:
    meaning = meanings.setdefault((arm.experiment, arm.name), arm)
    assert arm.command(0, 'x') == meaning.command(0, 'x')


def test_the_report_is_that_of_the_stored_runs():
  text = report.report()
  assert (runs.RESULTS / 'REPORT.md').read_text() == text
  for name in re.findall(r'\]\((\w+\.png)\)', text):
    assert (runs.RESULTS / name).exists()
  assert (runs.RESULTS / 'PLAN.md').read_text() == plan.plan()


@pytest.mark.parametrize('page', ['README.md', 'docs/pages/measurements.md'])
def test_pages_have_the_numbers_of_the_report(page):
  assert report.in_short() in (runs.ROOT / page).read_text()


def test_stored_runs_say_where_they_come_from():
  stored = {
    arm.path(seed): (arm, seed, run)
    for arm in ARMS
    for seed, run in arm.stored().items()
  }
  assert stored.keys() == set(runs.RESULTS.glob('runs/*/*.json'))
  for arm, seed, run in stored.values():
    command = run['command'].split()
    assert command == ['python', *arm.command(seed, 'DIR')]
    assert len(run['commit']) == 40  # Of files that had not changed.
    assert run['config']['seed'] == run['summary']['seed'] == seed
    assert run['summary']['finished']
    assert run['facts']['versions']['jax']
    steps = run['config']['steps']
    assert {len(curve) for curve in run['curves'].values()} == {steps}


def test_every_seed_of_a_mean_is_summed_up():
  """A key that one run lacks would leave it out of a mean, and not say so."""
  renamed = {'diverged_at', 'skipped_steps', 'first_non_finite_step'}
  for arm in ARMS:
    keys = {
      frozenset(run['summary']) - renamed for run in arm.stored().values()
    }
    assert len(keys) <= 1, arm.name


def test_audits_are_of_the_arms_as_they_are():
  files = {
    audits.path(each.audit, arm): arm
    for asked in report.QUESTIONS
    for each in asked.audits
    for arm in each.arms
  }
  stored = set(runs.RESULTS.glob('audits/*/*/*.json'))
  assert stored <= files.keys()
  for file in stored:
    audit, arm = json.loads(file.read_text()), files[file]
    command = ['python', *arm.command(max(arm.seeds), 'DIR')]
    assert audit['command'].split() == command
    assert len(audit['commit']) == 40


def test_runs_of_a_seed_begin_alike():
  """But for the number of experts and of sequences."""
  groups = {}
  for arm in ARMS:
    for seed, run in arm.stored().items():
      model = run['config']['model']
      alike = arm.experiment, seed, model['experts'], model['hidden']
      groups.setdefault(alike, set()).add(
        (
          run['facts']['initial_parameters_digest'],
          run['facts']['text_fingerprint'],
        )
      )
  assert all(len(group) == 1 for group in groups.values())


def test_the_learning_rate_is_the_lowest_of_the_best():
  stored = {
    rate: arm.stored()[tuning.SEEDS[0]]['summary'][question.PERPLEXITY]
    for rate, arm in tuning.LEARNING_RATES.items()
  }
  best = min(stored.values())
  good = [rate for rate, found in stored.items() if found < 1.01 * best]
  assert min(good) == tuning.LEARNING_RATE
  assert min(stored) < tuning.LEARNING_RATE < max(stored)


@pytest.mark.parametrize('asked', report.QUESTIONS, ids=lambda x: x.title)
def test_a_question_ends_when_all_is_there(asked, tmp_path):
  row = {'purity': 0.5, audits.DOMAIN: 0.2, 'token information [nats]': 0.5} | {
    'MaxVio': 0.1,
    'regret [%]': 2.0,
    'bytes a layer': 64,
  }
  rows = dict.fromkeys(['validation', *online.RULES], row)
  for each in asked.audits:
    for arm in each.arms:
      assert not asked.can_end(tmp_path)
      runs.write({'found': rows}, audits.path(each.audit, arm, tmp_path))
  stored = MAIN['bip'].stored()[0]
  for arm in asked.arms:
    for seed in arm.seeds:
      assert not asked.can_end(tmp_path)
      runs.write(stored, arm.path(seed, tmp_path))
  *_, heading, conclusion = question.section(asked, tmp_path)
  assert heading == question.ENDING
  assert conclusion and 'nan' not in conclusion
  for draw in asked.figures.values():
    (axes,) = draw(tmp_path).axes
    assert axes.get_xlabel() and axes.has_data()


def values_of(**arms):
  return pd.Series(
    {(arm, seed): x for arm in arms for seed, x in enumerate(arms[arm])}
  ).rename_axis(['arm', 'seed'])


def test_differences_are_paired():
  values = values_of(a=[1.0, 5.0, 9.0, 2.0], b=[0.5, 4.5, 8.5])
  assert paired(values, 'a', 'b') == (0.5, 0.0)
  assert str(paired(values_of(a=[1.0], b=[0.5]), 'a', 'b')) == '+0.500'


@pytest.mark.parametrize(
  ('values', 'told', 'exceeds'),
  [
    ([1.0], '+1.000 (one seed)', 'Not shown'),
    ([1.0, -1.0], '+0.000 ± 12.706 (no difference shown)', 'Not shown'),
    ([-1.0, -1.0], '-1.000 ± 0.000 (lower)', 'No'),
    ([2.0, 2.0], '+2.000 ± 0.000 (higher)', 'Yes'),
  ],
)
def test_a_difference_says_whether_it_is_shown(values, told, exceeds):
  found = paired(values_of(a=values, b=[0.0] * len(values)), 'a', 'b')
  assert found.told == told
  assert found.exceeds(0.5) == exceeds


def test_savings_are_shares_of_the_other():
  found = saving(values_of(a=[3.0, 4.5], b=[4.0, 6.0]), 'a', 'b')
  assert found == (0.25, 0.0)


def test_an_interval_is_that_of_so_few_seeds():
  found = paired(values_of(a=[1.0, 2.0, 3.0], b=[1.0] * 3), 'a', 'b')
  # Student's t of two degrees of freedom, by the error of the mean.
  assert found == pytest.approx((1.0, 4.302653 / 3**0.5))


def test_loss_of_a_mixture_is_the_mean_over_its_texts(tmp_path):
  arm = Arm('bip', 'bip', {})
  summary = {
    'eval/validation_a/perplexity': math.exp(2.0),
    'eval/validation_b/perplexity': math.exp(4.0),
    'eval/shakespeare/perplexity': 9.0,
    'average_max_violation': 0.5,
    'last_max_violation': 0.25,
    'device_load_4': 1.0,
  }
  curves = {'train/loss': [1.5, None]}
  config = {'model': {'experts': 16}}
  stored = {'config': config, 'summary': summary, 'curves': curves}
  runs.write(stored, arm.path(0, tmp_path))
  assert arm.stored(tmp_path)[0]['curves'] == curves
  found = runs.frame([arm], tmp_path)
  assert found[runs.LOSS]['bip', 0] == pytest.approx(3.0)
  table = question.Table('One', [arm], arm)
  asked = question.Question('Which?', 'One arm.', [table])
  assert (
    '| bip | 1 | 0.500 | 0.250 | 3.0000 | – |'
    in list(question.section(asked, tmp_path))[-1]
  )


@pytest.mark.parametrize(
  ('devices', 'seconds'),
  [
    (4, 3 / 4 / 450e9),
    (16, 7 / 16 / 450e9 + 8 / 16 / 50e9),  # Half goes to the other node.
  ],
)
def test_a_planned_step_grows_with_the_experts_part_of_it(devices, seconds):
  # By hand: products of a routed expert, 18 x 512 x 1408 for a pair, and four
  # exchanges of 512 bfloat16 numbers, of so many seconds a byte.
  pair = 18 * 512 * 1408 / 989.4e12 + 8 * 512 * seconds
  attention = 2 * 512 * 64 * (8 + 2) * 8
  rest = attention + 8 * (3 * 512 * 1408 + 512 * 16) + 512 * 6400
  token = 6 * rest / 989.4e12
  even = 8 * 4 * pair / (8 * 4 * pair + token)
  assert step_times.over_even(devices, 1.5) == pytest.approx(1 + even / 2)


def test_solves_take_the_latency_of_their_all_reduces():
  # 8 layers, T = 4; 10 microseconds within a node, 20 across.
  assert step_times.solves(8, 'bip') == pytest.approx(8 * 4 * 8 * 10e-6)
  assert step_times.solves(16, 'midpoint') == pytest.approx(8 * 4 * 10 * 20e-6)


def test_layers_are_summed_up_step_by_step():
  losses = pd.DataFrame({'train/loss': [5.0, 4, 4, 4, 4, 5.1, 5.1, 5.5]})
  run = types.SimpleNamespace(
    config={'model': {'layers': 2, 'dense_layers': 1, 'experts': 8}},
    metrics=losses,
    # Experts of one device have all of the second half's tokens.
    loads=lambda layer: pd.DataFrame([[1] * 8] * 4 + [[4, 4] + [0] * 6] * 4),
    prices=lambda layer: pd.DataFrame(
      np.outer([0, 1, 0, 1, 0, 1, 3, 5], [0.1] * 8)
    ),
  )
  assert runs._of_layers(run) == {
    'device_load_4': pytest.approx(2.5),
    'price_change': pytest.approx(0.5 / 3),  # Of the last three steps.
    'loss_spikes': 1,  # 5.5; 5.1 is not 0.2 above the first.
  }


@pytest.mark.parametrize('main', [demo.main, tuning.QUESTION.main])
def test_a_wrong_flag_is_refused_in_one_line(main, capsys):
  assert main(['--workdri=runs/x']) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert '--workdir' in error


def test_information_is_that_of_rows_and_columns():
  label_S = np.array([0, 1, 1, 2])
  chosen_SxE = np.eye(3, dtype=bool)[label_S]
  counts = audits._counts(label_S, chosen_SxE)
  np.testing.assert_array_equal(counts, np.diag([1, 2, 1]))
  # The entropy of a label that the expert tells.
  assert audits._information(counts) == pytest.approx(1.5 * np.log(2))
  assert audits._information(np.outer([1, 3], [2, 5])) == pytest.approx(0)


def test_chance_tells_nothing():
  """Of many labels, even routes by chance have information in so few tokens."""
  random = np.random.default_rng(0)
  label_S = random.integers(0, 500, 2000)
  chosen_SxE = np.eye(16, dtype=bool)[random.integers(0, 16, 2000)]
  assert audits._information(audits._counts(label_S, chosen_SxE)) > 1
  assert abs(audits._beyond_chance(label_S, chosen_SxE)) < 0.05


@pytest.mark.long
def test_what_is_interrupted_is_continued_and_stored(tmp_path, monkeypatch):
  options = {
    'steps': 12,  # Placements are for ten each.
    'warmup_steps': 0,
    'batch_size': 8,
    'sequence_length': 64,
    'eval_every': 0,
    'eval_sequences': 4,
    'model.layers': 1,
    'model.width': 32,
    'model.hidden': 16,
  }
  arms = [
    Arm(method, method, options, (0, 1), experiment='demo')
    for method in ('unbalanced', 'midpoint')
  ]
  workdir, results = tmp_path / 'runs', tmp_path / 'results'
  runs.run(arms[1], 0, workdir, results)
  before = arms[1].path(0, results).stat().st_mtime_ns
  runs.run_all(arms, workdir, results)
  assert arms[1].path(0, results).stat().st_mtime_ns == before
  assert [list(arm.stored(results)) for arm in arms] == [[0, 1]] * 2
  stored = json.loads(arms[1].path(0, results).read_text())
  assert 'step_seconds' not in stored['summary']
  monkeypatch.setattr(audits, 'ARRIVALS', 64)
  monkeypatch.setattr(audits, 'TOKENS', 300)
  of_all = [
    *(audits.causality, audits.specialisation, audits.online),
    audits.placement,
  ]
  for audit in of_all:
    audits.run(audit, arms[1], workdir, results)
  leaks, said, assigned, placed = (
    audits.stored(audit, arms[1], results) for audit in of_all
  )
  assert (
    leaks['frozen']['routes flipped'] == 0 < leaks['solved']['routes flipped']
  )
  assert said['validation']['purity'] >= 0.5  # Of two domains.
  assert assigned['exact']['regret [%]'] < assigned['top-k']['regret [%]']
  even = placed['8 devices']
  assert 1 <= even['optimum without copies, loads known'] <= 1.1
  assert 1 <= even['contiguous'] < 1.2
  asked = question.Question(
    'Which?',
    'Two arms.',
    [question.Table('Two', arms, arms[0])],
    [question.Audit('Rules', audits.online, arms)],
    lambda _: 'Neither.',
  )
  parts = list(question.section(asked, results))
  assert parts[0] == '## Which?'
  assert 'Neither.' not in parts  # One checkpoint is not audited.
  assert '| midpoint | 2 |' in parts[3]
  assert parts[5] == '1 of 2 checkpoints are audited.'
  assert parts[6] == 'Checkpoints of seed 1.'
  assert '| midpoint | 10 bins |' in parts[7]
  figure = figures.curves(arms, results)
  labels = [line.get_label() for line in figure.axes[0].lines]
  assert labels == ['unbalanced', 'midpoint']
  assert 'seeds (2)' in figure.axes[0].get_title('left')
