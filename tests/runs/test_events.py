"""What TensorBoard reads of a run is what the run wrote."""

from html import unescape
import itertools
import json

import pytest
from tensorboard import plugin_util
from tensorboard.backend.event_processing import (
  event_accumulator,
  event_file_loader,
)
from tensorboard.data_compat import migrate_value  # What its server does first.
from tensorboard.util import tensor_util
from tensorboardX import event_file_writer

from moe_jax.runs import events

EVERYTHING = event_accumulator.STORE_EVERYTHING_SIZE_GUIDANCE


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
  """Files are named by the second: each begins in another one."""
  clock = itertools.count(10**9)
  monkeypatch.setattr(event_file_writer.time, 'time', lambda: next(clock))


def record(step, **more):
  return {
    'step': step,
    'train/loss': 10.0 - step,
    'router/load/layer_00': [0, 10, 20, 10],
    'router/gates/layer_00': [0.0, 3.0, 1.0, 4.0],
    'router/q/layer_00': [-0.5, 0.0, 0.25, 0.25],
  } | more


def write(directory, steps, *, last=8, records=(), text=''):
  """Writes the events of some steps, of `last` in total."""
  first, *_ = steps
  writer = events.Events(directory, step=first - 1, steps=last, text=text)
  for step in steps:
    writer.show(record(step))
  for extra in records:
    writer.show(extra)
  writer.close()


def read(directory):
  accumulator = event_accumulator.EventAccumulator(str(directory), EVERYTHING)
  return accumulator.Reload()


def scalars(accumulator, name):
  return [(e.step, e.value) for e in accumulator.Scalars(name)]


def written(directory, one):
  """The values of the last event, as they are in the file."""
  write(directory, [1], records=[one | {'step': 5}], last=1)
  (path,) = directory.iterdir()
  *_, event = event_file_loader.LegacyEventFileLoader(str(path)).Load()
  assert event.step == 5
  return event.summary.value


def test_scalars(tmp_path):
  infinite = record(4, **{'train/loss': float('nan'), 'eval/a/perplexity': 7.0})
  write(tmp_path, [1, 2, 3], records=[infinite])
  found = read(tmp_path)
  assert scalars(found, 'train/loss') == [(1, 9.0), (2, 8.0), (3, 7.0)]
  assert scalars(found, 'eval/a/perplexity') == [(4, 7.0)]
  assert 'step' not in found.Tags()['scalars']


def test_a_histogram_counts_experts_by_load_over_mean_load(tmp_path):
  write(tmp_path, [1])
  found = read(tmp_path)
  (load,) = found.Histograms('router/load/layer_00')
  values = load.histogram_value
  # Loads of 0, 10, 20 and 10: 0, 1, 2 and 1 times their mean.
  assert (values.min, values.max, values.num) == (0.0, 2.0, 4.0)
  assert values.sum == 4.0
  counts = {
    limit: count
    for limit, count in zip(values.bucket_limit, values.bucket, strict=True)
    if count
  }
  assert list(counts.values()) == [1, 2, 1]
  at_0, at_1, at_2 = counts
  assert 0.0 < at_0 < 0.1 and 1.0 <= at_1 < 1.1 and at_2 == 2.0
  (gates,) = found.Histograms('router/gates/layer_00')
  assert gates.histogram_value.min == 0.0
  assert gates.histogram_value.max == 2.0  # 4 over a mean of 2
  (price,) = found.Histograms('router/q/layer_00')
  assert price.histogram_value.min == -0.5
  assert price.histogram_value.max == 0.25


@pytest.mark.parametrize('load', [1, 7])
def test_even_loads_are_one_bucket_at_1(tmp_path, load):
  even = record(1, **{'router/load/layer_00': [load] * 4})
  event = written(tmp_path, even)
  (value,) = (v for v in event if v.tag == 'router/load/layer_00')
  buckets = tensor_util.make_ndarray(migrate_value(value).tensor)
  full = buckets[buckets[:, 2] > 0]
  assert full.tolist() == [[1.0, 1.0, 4.0]]


def test_no_histogram_of_what_is_not_finite(tmp_path):
  bad = record(
    1,
    **{
      'router/load/layer_00': [0, 0, 0, 0],
      'router/gates/layer_00': [0.0] * 4,
      'router/q/layer_00': [0.0, float('inf'), 0.0, 0.0],
    },
  )
  assert [v.tag for v in written(tmp_path, bad)] == ['train/loss']


def test_a_long_run_has_no_more_histograms_than_tensorboard_keeps(tmp_path):
  writer = events.Events(tmp_path, step=0, steps=1000)
  for step in range(1, 1001):
    writer.show(record(step))
  writer.close()
  found = read(tmp_path)
  steps = [e.step for e in found.Histograms('router/load/layer_00')]
  assert steps == list(range(1, 1001, 5))
  assert len(scalars(found, 'train/loss')) == 1000


def test_text(tmp_path):
  options = {'data': {'files': 'a|b_*_`c`\n<script>alert(1)</script>'}}
  text = events.describe('bip seed 3', options, {'versions': {'jax': '0.10'}})
  write(tmp_path, [1], text=text)
  (event,) = read(tmp_path).Tensors('run/text_summary')
  assert event.step == 1
  (stored,) = tensor_util.make_ndarray(event.tensor_proto)
  html = plugin_util.markdown_to_safe_html(stored)
  assert '<h1>bip seed 3</h1>' in html
  options_html, facts_html = html.split('<h2>Facts</h2>')
  assert '"jax": "0.10"' in unescape(facts_html)
  # Nothing in a value is acted on by Markdown or HTML.
  code = options_html.partition('<pre><code>')[2].partition('</code>')[0]
  assert json.loads(unescape(code)) == options
  assert '<' not in code


def test_a_run_that_goes_on_replaces_what_is_computed_again(tmp_path):
  write(tmp_path, [1, 2, 3, 4], text='first')
  again = record(3, **{'train/loss': 99.0, 'router/load/layer_00': [1] * 4})
  writer = events.Events(tmp_path, step=2, steps=8, text='second')
  writer.show(again)
  writer.close()
  found = read(tmp_path)
  assert scalars(found, 'train/loss') == [(1, 9.0), (2, 8.0), (3, 99.0)]
  loads = found.Histograms('router/load/layer_00')
  assert [e.step for e in loads] == [1, 2, 3]
  assert loads[-1].histogram_value.max == 1.0
  texts = found.Tensors('run/text_summary')
  assert [e.step for e in texts] == [1, 3]
