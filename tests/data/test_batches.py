"""Batches: complete, shuffled, seekable, and the same for any sharding."""

import dataclasses
import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from moe_jax import data

S = 4
TOKENS = np.arange(101, dtype=np.uint16)  # 25 sequences; row i starts at 4 i.


def batches(count, tokens=TOKENS, **options):
  options = {'sequence_length': S, 'batch_size': 8, 'seed': 3} | options
  sources = [data.Source('text', tokens)]
  iterator = data.training_batches(sources, **options)
  return list(itertools.islice(iterator, count))


def rows(count, **options):
  """Which sequences come, in order."""
  taken = batches(count, **options)
  return np.concatenate([batch['inputs'][:, 0] for batch in taken]) // S


@functools.cache
def one_by_one():
  """The first 240 rows."""
  return rows(240, batch_size=1)


# --- Training ----------------------------------------------------------------


def test_targets_are_the_inputs_one_further():
  for batch in batches(5):
    assert batch['inputs'].shape == batch['targets'].shape == (8, S)
    assert batch['inputs'].dtype == batch['targets'].dtype == np.int32
    assert (batch['inputs'][:, 0] % S == 0).all()
    steps = batch['inputs'][:, :1] + np.arange(S)
    np.testing.assert_array_equal(batch['inputs'], steps)
    np.testing.assert_array_equal(batch['targets'], steps + 1)


@pytest.mark.parametrize('size, expected', [(4 * 6, 5), (4 * 6 + 1, 6)])
def test_last_sequence_needs_its_last_target(size, expected):
  assert len(set(rows(9, tokens=TOKENS[:size]))) == expected


def test_every_sequence_comes_once_an_epoch_in_another_order():
  epochs = rows(20, batch_size=5).reshape(4, 25)
  np.testing.assert_array_equal(np.sort(epochs), [np.arange(25)] * 4)
  assert len({tuple(epoch) for epoch in [*epochs, range(25)]}) == 5


def test_order_depends_on_the_seed_alone():
  np.testing.assert_array_equal(rows(9), rows(9))
  assert (rows(9) != rows(9, seed=4)).any()


def test_neighbouring_seeds_share_no_epoch():
  orders = [
    tuple(epoch)
    for seed in range(4)
    for epoch in rows(20, batch_size=5, seed=seed).reshape(4, 25)
  ]
  assert len(set(orders)) == len(orders)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(start=st.integers(0, 200), batch_size=st.integers(1, 12))
def test_seeking_equals_skipping(start, batch_size):
  sought = rows(-(-30 // batch_size), start=start, batch_size=batch_size)
  expected = one_by_one()[start : start + 30]
  np.testing.assert_array_equal(sought[:30], expected)


def test_seeking_far_is_as_good_as_near():
  (batch,) = batches(1, start=10**18, batch_size=25)
  np.testing.assert_array_equal(np.sort(batch['inputs'][:, 0]), TOKENS[:-1:S])


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
  start=st.integers(0, 60), processes=st.sampled_from([1, 2, 4, 8])
)
def test_shards_make_up_the_global_batch(start, processes):
  expected = batches(4, start=start)
  shards = [
    batches(4, start=start, process_index=i, process_count=processes)
    for i in range(processes)
  ]
  for step, batch in enumerate(expected):
    for name, whole in batch.items():
      parts = [shard[step][name] for shard in shards]
      assert {len(part) for part in parts} == {8 // processes}
      np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_processes_may_change_on_the_way():
  expected = rows(6)
  before = [rows(2, process_index=i, process_count=2) for i in range(2)]
  after = [
    rows(4, start=16, process_index=i, process_count=4) for i in range(4)
  ]
  joined = [
    *np.stack([r.reshape(2, 4) for r in before], 1).reshape(-1),
    *np.stack([r.reshape(4, 2) for r in after], 1).reshape(-1),
  ]
  np.testing.assert_array_equal(joined, expected)


def test_longest_sequence_is_possible():
  (batch,) = batches(1, sequence_length=100, batch_size=1)
  np.testing.assert_array_equal(batch['targets'], [TOKENS[1:]])


# --- Mixtures ----------------------------------------------------------------


def three_sources(weights=(0.5, 0.3, 0.2), later=(0, 0, 0)):
  """Their tokens tell where they are from."""
  return [
    data.Source(name, 10_000 * i + np.arange(25 * S + 1), *of_stages)
    for i, (name, *of_stages) in enumerate(
      zip('abc', weights, later, strict=True)
    )
  ]


def mixed(count, *weights, batch_size=8, **options):
  """Rows of three sources."""
  sources = three_sources(*weights)
  options = {'sequence_length': S, 'seed': 0} | options
  iterator = data.training_batches(sources, batch_size=batch_size, **options)
  batches = list(itertools.islice(iterator, count))
  return np.concatenate([batch['inputs'][:, 0] for batch in batches])


def test_a_mixture_has_its_shares_after_any_number_of_rows():
  source = mixed(40) // 10_000
  rows = np.arange(1, len(source) + 1)
  for i, weight in enumerate((0.5, 0.3, 0.2)):
    assert np.all(np.abs(np.cumsum(source == i) - weight * rows) <= 1.5)


def test_each_source_has_epochs_of_its_own():
  rows = mixed(60)
  for i in range(3):
    own = rows[rows // 10_000 == i] % 10_000 // S
    for epoch in range(len(own) // 25):
      part = own[epoch * 25 : (epoch + 1) * 25]
      np.testing.assert_array_equal(np.sort(part), np.arange(25))
  # Its order does not depend on the others' weights.
  other = mixed(60, (1, 1, 1))
  first, second = (x[x < 10_000][:50] for x in (rows, other))
  np.testing.assert_array_equal(first, second)


def test_a_mixture_is_found_at_any_row_by_any_processes():
  rows = mixed(20)
  np.testing.assert_array_equal(mixed(10, start=80), rows[80:])
  np.testing.assert_array_equal(mixed(40, batch_size=4), rows)
  parts = [mixed(20, process_index=i, process_count=2) for i in range(2)]
  together = np.stack([part.reshape(20, 4) for part in parts], axis=1)
  np.testing.assert_array_equal(together.reshape(-1), rows)


def test_shares_are_exact_however_long_a_run_is():
  sources = three_sources((0.7, 0.2, 0.1))
  rows = data.Mixture(sources, S).rows(10**15)
  assert rows == [7 * 10**14, 2 * 10**14, 10**14]


def test_rows_say_which_source_they_are_of():
  iterator = data.training_batches(
    three_sources(), sequence_length=S, batch_size=8, seed=0
  )
  for batch in itertools.islice(iterator, 4):
    of_BxN = batch['inputs'][:, :1] // 10_000 == np.arange(3)
    np.testing.assert_array_equal(batch['sources'], of_BxN)
  assert batches(1)[0].keys() == {'inputs', 'targets'}


def test_epochs_of_each_source_are_counted():
  mixture = data.Mixture(three_sources(), S)
  assert mixture.epochs(50) == {'a': 1.0, 'b': 0.6, 'c': 0.4}


# Of row 100 on, the first source has another share, the second none.
STAGES = (0.5, 0.5, 0), (0.2, 0, 0.8)


def annealed(count, **options):
  return mixed(count, *STAGES, anneal_from=100 * S - 1, **options)


def test_an_annealed_mixture_changes_at_a_token():
  source = annealed(25) // 10_000
  assert [np.sum(source[:100] == i) for i in range(3)] == [50, 50, 0]
  assert [np.sum(source[100:] == i) for i in range(3)] == [20, 0, 80]
  # One token later: one row more.
  later = mixed(25, *STAGES, anneal_from=100 * S + 1)
  assert np.sum(later[:101] // 10_000 == 2) == 0
  # With longer sequences: at the same token.
  long = mixed(25, *STAGES, anneal_from=100 * S, sequence_length=2 * S)
  source = long // 10_000
  assert (source[:50] < 2).all() and source[50] == 0 and source[51] == 2


def test_a_source_of_both_mixtures_continues_its_own_order():
  rows, before = annealed(25), mixed(50, (0.5, 0.5, 0))
  own, same = (x[x < 10_000][:70] for x in (rows, before))
  np.testing.assert_array_equal(own, same)
  np.testing.assert_array_equal(np.sort(own[:25]) // S, np.arange(25))
  np.testing.assert_array_equal(np.sort(own[25:50]) // S, np.arange(25))


def test_an_annealed_mixture_is_found_at_any_row_by_any_processes():
  rows = annealed(25)
  for start in (8, 96, 100, 104, 192):
    found = annealed(1, start=start)
    np.testing.assert_array_equal(found, rows[start : start + 8])
  np.testing.assert_array_equal(annealed(50, batch_size=4), rows)
  parts = [annealed(25, process_index=i, process_count=2) for i in range(2)]
  together = np.stack([part.reshape(25, 4) for part in parts], axis=1)
  np.testing.assert_array_equal(together.reshape(-1), rows)


@hypothesis.settings(deadline=None)
@hypothesis.given(
  stages=st.tuples(
    *[st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any)] * 2
  ),
  switch=st.integers(0, 40),
)
def test_each_row_is_the_next_of_one_source(stages, switch):
  tokens = np.arange(101)
  sources = [
    data.Source(str(i), tokens, *weights)
    for i, weights in enumerate(zip(*stages, strict=True))
  ]
  mixture = data.Mixture(sources, S, switch * S)
  seen = [0] * 4
  for row in range(80):
    source, index = mixture[row]
    now = stages[1 if 0 < switch <= row else 0]
    assert now[source] > 0 and index == seen[source]
    seen[source] += 1
    assert mixture.rows(row + 1) == seen


# --- Evaluation --------------------------------------------------------------


@hypothesis.settings(deadline=None)
@hypothesis.given(
  size=st.integers(2, 60),
  sequence_length=st.integers(1, 9),
  rows_each=st.integers(1, 4),
  processes=st.integers(1, 4),
)
def test_every_token_but_the_first_is_predicted_once_in_order(
  size, sequence_length, rows_each, processes
):
  tokens = np.arange(100, 100 + size, dtype=np.uint16)
  shards = [
    data.evaluation_batches(
      tokens,
      sequence_length=sequence_length,
      batch_size=rows_each * processes,
      process_index=i,
      process_count=processes,
    )
    for i in range(processes)
  ]
  targets = []
  for parts in zip(*shards, strict=True):
    batch = {
      name: np.concatenate([p[name] for p in parts]) for name in parts[0]
    }
    assert batch['mask'].shape == (rows_each * processes, sequence_length)
    assert batch['inputs'].dtype == batch['targets'].dtype == np.int32
    assert batch['mask'].dtype == np.bool_
    mask = batch['mask']
    targets.extend(batch['targets'][mask])
    np.testing.assert_array_equal(
      batch['inputs'][mask] + 1, batch['targets'][mask]
    )
    assert not batch['inputs'][~mask].any()
    assert not batch['targets'][~mask].any()
  assert targets == list(range(101, 100 + size))


def test_evaluation_can_be_cut_short():
  found = list(
    data.evaluation_batches(
      TOKENS, sequence_length=S, batch_size=2, maximum_sequences=3
    )
  )
  assert len(found) == 2
  assert sum(batch['mask'].sum() for batch in found) == 3 * S
  np.testing.assert_array_equal(found[-1]['inputs'][0], [8, 9, 10, 11])


def test_a_single_token_cannot_be_predicted():
  with pytest.raises(ValueError, match='evaluation set of 1 tokens'):
    data.evaluation_batches(TOKENS[:1], sequence_length=S, batch_size=2)


# --- Documents ---------------------------------------------------------------


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_positions_begin_anew_after_the_end_of_a_document(tokens):
  expected, position = [], 0
  for token in tokens:
    expected.append(position)
    position = 0 if token == 1 else position + 1
  found = data.document_positions(np.array([tokens, tokens]), 1)
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, [expected, expected])


# --- Loading -----------------------------------------------------------------


def test_second_load_is_identical_and_makes_nothing(sotu, sotu_config, capsys):
  capsys.readouterr()
  again = data.load_text(sotu_config)
  assert capsys.readouterr() == ('', '')
  assert again.fingerprint == sotu.fingerprint
  assert again.tokenizer.to_json() == sotu.tokenizer.to_json()
  np.testing.assert_array_equal(again.train[0].tokens, sotu.train[0].tokens)
  for name in ('validation', 'shakespeare'):
    np.testing.assert_array_equal(again.evaluation[name], sotu.evaluation[name])


def test_tokens_are_mapped_and_small(sotu):
  assert isinstance(sotu.train[0].tokens, np.memmap)
  assert sotu.train[0].tokens.dtype == np.uint16
  assert sotu.tokenizer.vocabulary == 6400
  # All ids are learnt, and tokens are words more often than bytes.
  assert (sotu.tokenizer.token_bytes_V > 1).sum() == 6400 - 257
  assert 11_341_941 / len(sotu.train[0].tokens) > 4


def test_token_counts_are_exact_over_chunks(sotu, monkeypatch):
  counts = data.token_counts(sotu.train[0].tokens, 6400)
  np.testing.assert_array_equal(
    counts, np.bincount(sotu.train[0].tokens, minlength=6400)
  )
  assert counts.dtype == np.int64


def test_long_work_is_reported(sotu_config, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('moe_jax.data.text._SECONDS_BETWEEN_REPORTS', 0.0)
  for i in range(3):
    (tmp_path / f'{i}.txt').write_text(f'{i}' * 10)
  config = dataclasses.replace(
    sotu_config,
    dataset='text_files',
    files=f'{tmp_path}/*.txt',
    evaluation_sets='',
    cache_dir=str(tmp_path / 'cache'),
  )
  data.load_text(config)
  message = 'data: tokenized (train): 2 documents, 0.0 M characters\n'
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  'options, message',
  [
    ({'vocabulary': 100}, r'data\.vocabulary=100: must be 257 or more'),
    ({'maximum_documents': -1}, r'data\.maximum_documents=-1: '),
    ({'dataset': 'text_files'}, r'data\.files=: '),
    ({'files': 'a.txt'}, r'data\.files=a\.txt: .*data\.dataset=sotu'),
    ({'validation_files': 'a.txt'}, r'data\.validation_files=a\.txt: '),
    (
      {'evaluation_sets': 'validation,shakespear'},
      r'data\.evaluation_sets=shakespear: unknown; did you mean shakespeare\?',
    ),
  ],
)
def test_impossible_config_is_named(options, message):
  with pytest.raises(ValueError, match=message):
    data.DataConfig(**options)


def test_config_has_only_plain_fields():
  config = data.DataConfig()
  for field in dataclasses.fields(config):
    assert type(getattr(config, field.name)) in (int, float, str, bool)
