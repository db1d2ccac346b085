"""Summaries and comparisons, against values worked by hand."""

import json
import statistics

import pytest

from moe_jax.analysis import Run, comparison, comparison_markdown, summarize
from moe_jax.analysis.cells import of_differences
from moe_jax.analysis.table import over_seeds, tabulate


def cells(markdown, row, heading):
  """The cells of the first row of that name below a heading."""
  below = markdown.split(f'# {heading}\n', 1)[1].splitlines()
  line = next(line for line in below if line.startswith(f'| {row} |'))
  return [cell.strip() for cell in line.strip('|').split('|')][1:]


def test_balance(write_run):
  summary = summarize(Run(write_run()))
  # Model: (1.0, 0.5, 0.25). Layers: (1.5, 0, 0) and (0.5, 1, 0.5).
  assert summary['average_max_violation'] == pytest.approx(1.75 / 3)
  assert summary['sup_max_violation'] == 1.0
  assert summary['first_max_violation'] == 1.0
  assert summary['last_max_violation'] == 0.25
  assert summary['worst_average_layer'] == 'layer_01'
  assert summary['worst_average_max_violation'] == pytest.approx(2 / 3)
  assert summary['worst_sup_layer'] == 'layer_00'
  assert summary['worst_sup_max_violation'] == 1.5
  assert summary['average_max_violation/layer_00'] == 0.5
  assert summary['sup_max_violation/layer_01'] == 1.0


def test_the_first_step_is_not_the_worst_one(write_run, records):
  records[0]['router/max_violation'] = 0.125
  summary = summarize(Run(write_run(records=records)))
  assert summary['first_max_violation'] == 0.125
  assert summary['sup_max_violation'] == 0.5


def test_quality_is_that_of_the_last_evaluation(write_run):
  summary = summarize(Run(write_run()))
  assert summary['eval/validation/step'] == 3
  assert summary['eval/validation/perplexity'] == 20.125
  assert summary['eval/validation/bits_per_byte'] == 1.5
  assert summary['eval/validation/perplexity_solved'] == 19.0
  assert summary['eval/validation/bits_per_byte_solved'] == 1.4
  assert summary['gap_to_unigram'] == -0.5
  # Perplexity 40 after step 2, 20.125 after step 3; the unigram model has 30.
  assert summary['tokens_to_unigram'] == 24


@pytest.mark.parametrize(
  ('facts', 'gap'),
  [
    ({'unigram_perplexity': 20.125, 'unigram_bits_per_byte': 1.5}, 0.0),
    ({'unigram_perplexity': None, 'unigram_bits_per_byte': None}, None),
  ],
)
def test_unigram_never_beaten_or_not_known(write_run, facts, gap):
  summary = summarize(Run(write_run(facts=facts)))
  assert summary['gap_to_unigram'] == gap
  assert summary['tokens_to_unigram'] is None


def test_what_the_run_is(write_run):
  summary = summarize(Run(write_run('bip', seed=7)))
  assert summary['method'] == 'bip'
  assert summary['balancer'].startswith('bip(iterations=4, clip=True, ')
  assert (summary['seed'], summary['steps']) == (7, 3)
  assert (summary['tokens'], summary['finished']) == (24, True)


def test_texts_of_a_mixture(write_run, records):
  """A step that had none of a text has no loss on it."""
  losses, shares, epochs = [5.0, None, 4.0], [0.25, 0.0, 0.5], [0.5, 0.5, 1.5]
  for record, *values in zip(records, losses, shares, epochs, strict=True):
    keys = 'train/loss/code', 'data/share/code', 'data/epochs/code'
    record.update(zip(keys, values, strict=True))
  runs = {'bip': [Run(write_run(records=records))]}
  summary = summarize(runs['bip'][0])
  assert summary['train/loss/code'] == 4.5
  assert summary['data/share/code'] == 0.25
  assert summary['data/epochs/code'] == 1.5
  markdown = comparison_markdown(comparison(runs))
  assert cells(markdown, 'bip', 'Trained on code') == ['4.500', '25.0%', '1.50']
  others = {
    'bip': runs['bip'][0],
    'again': Run(write_run('again', records=records)),
  }
  headings = of_differences(tabulate(others))[0].texts.index
  assert {'train loss [nats/token], code', 'share, code'} <= set(headings)
  assert {'perplexity, validation', 'AvgMaxVio'} <= set(headings)


def test_times_leave_out_the_first_two_steps(write_run, records):
  more = [records[2] | {'step': step} for step in (4, 5, 6, 7)]
  for record, seconds in zip(more, [0.1, 0.2, 0.4, 0.5], strict=True):
    record['time/step_seconds'] = seconds
    record['time/tokens_per_second'] = 8 / seconds
  records[2]['time/step_seconds'] = 0.3
  records[2]['time/tokens_per_second'] = 8 / 0.3
  summary = summarize(Run(write_run(records=records + more, steps=7)))
  # 0.1, 0.2, 0.3, 0.4, 0.5 remain of 60, 60 and these.
  assert summary['step_seconds'] == 0.3
  assert summary['step_seconds_25'] == 0.2
  assert summary['step_seconds_75'] == 0.4
  assert summary['tokens_per_second'] == 8 / 0.3
  # Dropped: 0.01, 0.02 and five times 0.03.
  assert summary['dropped'] == pytest.approx(0.18 / 7)


def test_final_loss_is_the_mean_of_ten_steps(write_run, records):
  base = records[2]
  many = [base | {'step': s, 'train/loss': 2.0 * s} for s in range(1, 13)]
  summary = summarize(Run(write_run(records=many, steps=12)))
  assert summary['train_loss'] == 2.0 * statistics.mean(range(3, 13))


def test_a_metric_that_came_later_is_unknown(write_run, records):
  for record in records:
    del record['router/dropped']
  run = Run(write_run(records=records))
  assert summarize(run)['dropped'] is None
  markdown = comparison_markdown(comparison({'bip': [run]}))
  assert cells(markdown, 'bip', 'Cost')[-1] == '–'


def test_spread(write_run, records, spread):
  """Beside an older run, which knows nothing of it."""
  today = Run(write_run('bip', records=spread))
  older = Run(write_run('loss_free', records=records))
  summary = summarize(today)
  assert summary['sequence_violation'] == 1.25
  assert summary['worst_sequence_violation'] == 2.5
  assert summary['dead_experts'] == 0.125
  assert summary['used_experts'] == 0.75
  assert summary['device_load'] == 1.5
  assert summarize(older)['device_load'] is None
  for runs in ({'loss_free': [older]}, {'loss_free': [older], 'bip': [today]}):
    markdown = comparison_markdown(comparison(runs))
    assert cells(markdown, 'loss_free', 'Spread') == ['–'] * 5
  written = ['1.250', '2.500', '12.50%', '75.0%', '1.500']
  assert cells(markdown, 'bip', 'Spread') == written


def test_a_run_that_diverged_is_a_result(write_run, records):
  for record in records[1:]:
    record['train/loss'] = None
    record['eval/validation/perplexity'] = None
  run = Run(write_run(records=records))
  summary = summarize(run)
  assert summary['diverged_at'] == 2
  assert summary['train_loss'] is None
  assert summary['eval/validation/step'] is None
  markdown = comparison_markdown(comparison({'bip': [run]}))
  told = '- bip, seed 0 diverged: no step is finite from step 2 on.'
  assert told in markdown
  assert cells(markdown, 'bip', 'Training') == ['–', '–', '–']


def test_a_skipped_step_is_no_divergence(write_run, records):
  """Of losses 8, 7, 6; a gradient may be infinite where the loss is finite."""
  records[1]['train/loss'] = None
  run = Run(write_run('bip', records=records))
  other = [record | {'train/gradient_norm': 1.0} for record in records]
  other[0]['train/gradient_norm'] = None
  summary = summarize(run)
  assert summary['skipped_steps'] == 1
  assert summary['diverged_at'] is None
  assert summary['train_loss'] == (8 + 6) / 2
  other = Run(write_run('loss_free', records=other))
  assert summarize(other)['skipped_steps'] == 2
  assert summarize(other)['train_loss'] == 6
  markdown = comparison_markdown(comparison({'bip': [run]}))
  assert 'seed 0 skipped steps that were not finite: 1.' in markdown
  assert 'diverged:' not in markdown


def test_no_step_yet_is_an_error(write_run):
  with pytest.raises(ValueError, match='no step'):
    summarize(Run(write_run(records=[])))


@pytest.fixture
def two_methods(write_run, records):
  """bip with seeds 0 and 1, loss_free with the same."""
  runs = {'loss_free': [], 'bip': []}
  for name, scale in (('loss_free', 2.0), ('bip', 1.0)):
    for seed in (0, 1):
      changed = [
        r | {'router/max_violation': (scale + seed / 8) * v}
        for r, v in zip(records, (1.0, 0.5, 0.25), strict=True)
      ]
      workdir = write_run(
        f'{name}_{seed}',
        records=changed,
        seed=seed,
        method=name,
      )
      runs[name].append(Run(workdir))
  return runs


def test_comparison_over_seeds(two_methods):
  compared = comparison(two_methods)
  assert compared.index.to_list() == [
    ('loss_free', 0),
    ('loss_free', 1),
    ('bip', 0),
    ('bip', 1),
  ]
  mean, deviation = over_seeds(compared)
  # SupMaxVio 1.0 and 1.125.
  assert mean.at['bip', 'sup_max_violation'] == 1.0625
  assert deviation.at['bip', 'sup_max_violation'] == pytest.approx(
    0.125 / 2**0.5
  )
  assert compared['config.model.experts'].tolist() == [4] * 4
  assert set(compared['facts.versions.jax']) == {'0.10.2'}


def test_a_comparison_can_be_stored(two_methods, tmp_path):
  table = comparison(two_methods).reset_index()
  table.to_json(tmp_path / 'table.json', orient='records', double_precision=15)
  stored = json.loads((tmp_path / 'table.json').read_text())
  assert [run['seed'] for run in stored] == [0, 1, 0, 1]
  assert stored[3]['sup_max_violation'] == 1.125
  assert stored[3]['diverged_at'] is None


def test_one_seed_has_no_deviation(two_methods):
  compared = comparison({'bip': two_methods['bip'][:1]})
  assert over_seeds(compared)[1]['sup_max_violation'].isna().all()
  assert 'One seed (bip)' in comparison_markdown(compared)
  assert 'One seed' not in comparison_markdown(comparison(two_methods))


def test_other_weights_for_one_seed_are_reported(write_run):
  runs = {
    'bip': [Run(write_run('bip'))],
    'loss_free': [
      Run(write_run('loss_free', facts={'initial_parameters_digest': 'x'}))
    ],
  }
  assert (
    'Facts that differ between runs of one seed: initial_parameters_digest.'
    in comparison_markdown(comparison(runs))
  )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'learning_rate': 2e-3}, r'learning_rate: 0\.001 and 0\.002'),
    ({'model': {'layers': 2, 'experts': 8}}, r'model\.experts: 4 and 8'),
    ({'facts': {'text_fingerprint': 'other'}}, 'text_fingerprint'),
  ],
)
def test_runs_of_different_configs_are_refused(write_run, change, message):
  runs = {
    'bip': [Run(write_run('bip'))],
    'loss_free': [Run(write_run('loss_free', **change))],
  }
  with pytest.raises(ValueError, match=message):
    comparison(runs)


def test_one_method_has_one_balancer_and_a_run_a_seed(write_run):
  first = Run(write_run('first', method='bip'))
  other = {'name': 'bip', 'iterations': 8}
  second = Run(write_run('second', method='bip', seed=1, balancer=other))
  with pytest.raises(ValueError, match=r'balancer\.iterations: 4 and 8'):
    comparison({'bip': [first, second]})
  with pytest.raises(ValueError, match='share a seed'):
    comparison({'bip': [first, first]})
  with pytest.raises(ValueError, match='no runs'):
    comparison({'bip': []})


def test_markdown_holds_the_numbers(write_run, records):
  better = [
    r | {'router/max_violation': 0.1, 'router/dropped': 0.0} for r in records
  ]
  runs = {
    'loss_free': [Run(write_run('loss_free'))],
    'bip': [Run(write_run('bip', records=better))],
  }
  markdown = comparison_markdown(comparison(runs))
  balance = cells(markdown, 'loss_free', 'Balance')
  assert balance[:4] == ['0.583', '1.000', '1.000', '0.250']
  assert balance[4:] == ['0.667', 'layer_01', '1.500', 'layer_00']
  # Bold where it is the lowest, and not where the two are equal.
  balance = cells(markdown, 'bip', 'Balance')
  assert balance[:5] == ['**0.100**'] * 4 + ['0.667']
  layer = cells(markdown, 'layer_00', 'AvgMaxVio / SupMaxVio of each layer')
  assert layer == ['0.500 / 1.500', '0.500 / 1.500']
  assert cells(markdown, 'bip', 'Training') == ['7.000', '-0.500', '24']
  validation = cells(markdown, 'bip', 'On validation')
  assert validation == ['20.12', '1.500', '19.00', '1.400', '3']
  cost = cells(markdown, 'loss_free', 'Cost')
  assert cost == ['0.750', '0.750', '0.750', '24', '2.00%']
  assert 'Not evaluated: shakespeare, because not installed.' in markdown
  assert '| parameters | 12,345 |' in markdown
  assert 'loss_free = `loss_free(rate=0.001, ' in markdown
  assert 'not finished' not in markdown


def test_bold_only_where_seeds_leave_no_doubt(two_methods):
  balance = cells(
    comparison_markdown(comparison(two_methods)), 'bip', 'Balance'
  )
  # SupMaxVio: 1.0 and 1.125 against 2.0 and 2.125.
  assert balance[1] == '**1.062 ± 0.088**'
  # The worst layer is the same for both.
  assert balance[4] == '0.667 ± 0.000'


def test_spread_wider_than_the_gap_is_not_bold(write_run, records):
  runs = {}
  for name, values in (('bip', (0.1, 0.9)), ('loss_free', (0.5, 1.3))):
    runs[name] = [
      Run(
        write_run(
          f'{name}_{seed}',
          records=[r | {'router/max_violation': value} for r in records],
          seed=seed,
          method=name,
        )
      )
      for seed, value in enumerate(values)
    ]
  markdown = comparison_markdown(comparison(runs))
  assert cells(markdown, 'bip', 'Balance')[0] == '0.500 ± 0.566'


def test_an_unfinished_run_is_announced(write_run, records):
  run = Run(write_run(records=records[:2]))
  markdown = comparison_markdown(comparison({'bip': [run]}))
  assert '- bip, seed 0 is not finished: step 2 of 3.' in markdown


def test_text_from_runs_cannot_break_a_table(write_run):
  facts = {'device_kind': 'a|b\nc', 'not_evaluated': {'x': 'one.\ntwo.'}}
  run = Run(write_run(facts=facts))
  markdown = comparison_markdown(comparison({'bip': [run]}))
  assert '| device kind | a\\|b c |' in markdown
  assert '- Not evaluated: x, because one. two.\n' in markdown


def test_difference_of_any_two_runs(write_run, records):
  ours = Run(write_run('ours', records=records))
  theirs = Run(
    write_run('theirs', records=records[:2], steps=2, method='midpoint')
  )
  table = ours.compare(theirs)
  assert list(table) == ['ours', 'theirs', 'difference']
  assert table.loc['config.steps'].tolist() == [3, 2, -1]
  assert 'config.batch_size' not in table.index
  assert table.loc['config.balancer.name', 'theirs'] == 'midpoint'
  assert table['difference'].isna()['config.balancer.name']
  row = table.loc['average_max_violation']
  assert row.tolist() == pytest.approx([1.75 / 3, 0.75, 0.75 - 1.75 / 3])
  with pytest.raises(ValueError, match='the same work directory twice'):
    ours.compare(ours)
