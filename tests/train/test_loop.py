"""A run from flags to files: what it leaves, and that it can be continued."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import signal

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from moe_jax import analysis, nn
from moe_jax import config as config_lib
from moe_jax.parallel import mesh as meshes
from moe_jax.runs import checkpoints, checksums, preemption
from moe_jax.runs.reader import Reader
from moe_jax.train import batches as batches_lib
from moe_jax.train import evaluate as evaluation
from moe_jax.train import facts as facts_lib
from moe_jax.train import loop
from moe_jax.train import plan as plan_lib
from moe_jax.train.state import TrainState
from tests.train import tiny

METHODS = ('loss_controlled', 'loss_free', 'bip')


def records(workdir):
  """Metrics without times, which are never the same twice."""
  return [
    {name: x for name, x in record.items() if not name.startswith('time/')}
    for record in Reader(workdir).records
  ]


def abstract_items(plan):
  return checkpoints.items_of(plan.training.abstract)


def latest(plan):
  """Returns what the newest checkpoint holds."""
  return checkpoints.restore_newest(
    plan.workdir / 'checkpoints',
    Reader(plan.workdir).facts['run'],
    lambda config: abstract_items(plan),
  )


def batches_of(plan, sequence=0):
  return batches_lib.training_batches(
    plan.config, plan.mesh, plan.text, sequence
  )


@pytest.fixture(scope='module')
def finished(text, tmp_path_factory):
  config = tiny.tiny_config(text, eval_every=4)
  return tiny.run(config, tmp_path_factory.mktemp('run'))


def test_what_a_run_leaves(finished):
  workdir = finished.workdir
  steps = Reader(workdir).records
  assert [record['step'] for record in steps] == [1, 2, 3, 4, 5, 6]
  for record in steps:
    assert record.keys() >= {
      'train/loss',
      'train/aux_loss',
      'router/max_violation',
      'router/max_violation/layer_00',
      'router/max_violation/layer_01',
      'router/min_violation',
      'router/dropped',
      'time/step_seconds',
      'time/tokens_per_second',
      'time/data_seconds',
    }
  evaluated = {
    'eval/validation/perplexity',
    'eval/validation/bits_per_byte',
    'eval/validation/perplexity_solved',
  }
  for record in steps:
    assert (record.keys() >= evaluated) == (record['step'] in (4, 6))
  options = json.loads((workdir / 'config.json').read_text())
  assert options['balancer']['iterations'] == 4
  for item in ('params', 'optimizer', 'router', 'data', 'meta'):
    assert (workdir / 'checkpoints' / '6' / item).is_dir()


@pytest.mark.long
def test_the_average_is_saved_evaluated_and_goes_on(text, tmp_path):
  config = tiny.tiny_config(
    text, **{'eval_every': 3, 'optimizer.average': 0.9, 'mesh.expert': 4}
  )
  whole = tiny.run(config, tmp_path / 'whole')
  asked = itertools.count()
  with pytest.raises(preemption.Preempted):
    tiny.run(config, tmp_path / 'parts', preempted=lambda: next(asked) > 3)
  parts = tiny.run(config, tmp_path / 'parts')
  saved, again = (latest(plan).items for plan in (whole, parts))
  assert saved.keys() == {*checkpoints.ITEMS}
  jax.tree.map(np.testing.assert_array_equal, again, saved)
  opened = analysis.Run(whole.workdir).restore()
  jax.tree.map(np.testing.assert_array_equal, opened.params, saved['average'])
  differ = jax.tree.map(
    lambda a, p: np.any(a != p), saved['average'], saved['params']
  )
  assert all(jax.tree.leaves(differ))
  evaluate = evaluation.make_evaluation(
    config, whole.training, whole.mesh, whole.text
  )
  recorded = records(whole.workdir)[-1]
  state = TrainState(6, **saved)
  for average in (state.average, None):
    found = evaluate(state._replace(average=average), lambda: False)
    assert (found.items() <= recorded.items()) == (average is not None)


def test_mfu(text, tmp_path, monkeypatch):
  """Of a device said to do 1 GFLOP/s; there are eight."""
  config = tiny.tiny_config(text, steps=2, eval_sequences=1)
  run = Reader(tiny.run(config, tmp_path / 'unknown').workdir)
  assert 'time/mfu' not in run.records[0]
  monkeypatch.setitem(facts_lib.PEAK_FLOPS, 'cpu', 1e9)
  run = Reader(tiny.run(config, tmp_path / 'known').workdir)
  facts, model = run.facts, config.model
  attention = 6 * model.layers * config.sequence_length * model.width
  flops = 6 * facts['active_parameters'] + attention
  for record in run.records:
    seconds = record['time/step_seconds']
    ideal = facts['tokens_per_step'] * flops / 8e9
    assert record['time/mfu'] == pytest.approx(ideal / seconds)


@pytest.mark.long
def test_some_steps_are_profiled(text, tmp_path):
  config = tiny.tiny_config(text, steps=4, profile='2:1', eval_sequences=1)
  tiny.run(config, tmp_path / 'run')
  (trace,) = (tmp_path / 'run').glob('plugins/profile/*/*.xplane.pb')
  steps = {
    dict(event.stats)['step_num']
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
    for line in plane.lines
    for event in line.events
    if event.name == 'train'
  }
  assert steps == {2, 3}  # The second step is waited for in the third.


def test_tensorboard_shows_a_run(finished):
  events = event_accumulator.EventAccumulator(str(finished.workdir)).Reload()
  losses = [event.step for event in events.Scalars('train/loss')]
  assert losses == [1, 2, 3, 4, 5, 6]
  for name in ('router/load/layer_00', 'router/q/layer_01'):
    (last,) = events.Histograms(name)
    assert last.histogram_value.num == finished.config.model.experts
  (text,) = events.Tensors('run/text_summary')
  assert b'"name": "bip"' in text.tensor_proto.string_val[0]


def test_the_same_command_again_does_nothing(finished):
  before = records(finished.workdir)
  tiny.run(finished.config, finished.workdir)
  assert records(finished.workdir) == before


def interrupt(monkeypatch, config, workdir, count):
  """Trains on so many batches, then ends as by Ctrl-C without a handler."""

  def some_batches(*args):
    yield from itertools.islice(batches_lib.training_batches(*args), count)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(loop, 'training_batches', some_batches)
    tiny.run(config, workdir)


@pytest.mark.long
def test_an_interrupted_run_goes_on_bit_for_bit(
  finished, tmp_path, monkeypatch
):
  """Stopped in step 6, continued from the checkpoint of step 3."""
  workdir = tmp_path / 'run'
  interrupt(monkeypatch, finished.config, workdir, 5)
  assert [r['step'] for r in records(workdir)] == [1, 2, 3, 4, 5]
  continued = tiny.run(finished.config, workdir)
  assert records(workdir) == records(finished.workdir)
  saved, expected = latest(continued), latest(finished)
  assert saved.position == expected.position == (6, 6 * 8, 0, 0)
  jax.tree.map(np.testing.assert_array_equal, saved.items, expected.items)


@pytest.mark.long
def test_a_run_goes_on_with_other_devices(finished, tmp_path, monkeypatch):
  """Two steps on eight devices, two on one, two on four."""
  config = dataclasses.replace(finished.config, checkpoint_every=2)
  for devices, steps in ((8, 2), (1, 4), (4, 6)):
    mesh = meshes.make_mesh(devices, 1, devices=jax.devices()[:devices])
    monkeypatch.setattr(plan_lib.state, 'make_mesh', lambda _, mesh=mesh: mesh)
    seen = []

    def batches(*args, seen=seen):
      for batch in batches_lib.training_batches(*args):
        seen.append(jax.device_get(batch.inputs))
        yield batch

    monkeypatch.setattr(loop, 'training_batches', batches)
    plan = plan_lib.plan(config, tmp_path / 'run')
    with contextlib.suppress(preemption.Preempted):
      loop.train(plan, lambda seen=seen: len(seen) == 2)
    assert latest(plan).position.step == steps
    expected = batches_of(finished, 8 * (steps - 2))
    for inputs in seen[:2]:
      np.testing.assert_array_equal(inputs, next(expected).inputs)
  for record, same in zip(
    records(tmp_path / 'run'), records(finished.workdir), strict=True
  ):
    assert record['step'] == same['step']
    # Sums in another order, and after a step a token at a tie elsewhere.
    loss = pytest.approx(same['train/loss'], rel=1e-3)
    assert record['train/loss'] == loss


@pytest.mark.parametrize(
  ('number', 'goes_on'),
  [
    (signal.SIGTERM, False),  # How it goes on: the test before.
    pytest.param(signal.SIGTERM, True, marks=pytest.mark.long),
    pytest.param(signal.SIGINT, True, marks=pytest.mark.long),
  ],
)
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_happened(
  finished, tmp_path, monkeypatch, capsys, number, goes_on
):
  """In step 4, which is to be evaluated: that is done later."""

  def with_signal(*args):
    batches = batches_lib.training_batches(*args)
    for i in range(6):
      if i == 3:
        signal.raise_signal(number)
        said = ''  # By the watching thread.
        while 'saves after this step' not in said:
          said += capsys.readouterr().err
      yield next(batches)

  handler, workdir = signal.getsignal(number), tmp_path / 'run'
  with monkeypatch.context() as patch:
    patch.setattr(loop, 'training_batches', with_signal)
    with pytest.raises(preemption.Preempted, match='saved after step 4 of 6'):
      with preemption.notice() as preempted:
        tiny.run(finished.config, workdir, preempted=preempted)
  assert signal.getsignal(number) == handler
  assert Reader(workdir).checkpoints[-1] == 4
  expected = records(finished.workdir)
  unevaluated = {
    name: x for name, x in expected[3].items() if not name.startswith('eval/')
  }
  assert records(workdir) == [*expected[:3], unevaluated]
  if goes_on:
    tiny.run(finished.config, workdir)
    assert records(workdir) == expected


def preempted_after(calls):
  """Says yes from so many calls on."""
  count = itertools.count(1)
  return lambda: next(count) >= calls


@pytest.mark.long
def test_a_notice_during_an_evaluation_does_not_wait_for_it(text, tmp_path):
  """Before the first of the two batches of an evaluation after step 1."""
  config = tiny.tiny_config(
    text, steps=2, eval_every=1, eval_sequences=16, checkpoint_every=100
  )
  workdir = tmp_path / 'run'
  with pytest.raises(preemption.Preempted, match='saved after step 1 of 2'):
    # Before the first step, after it, and before the second batch.
    tiny.run(config, workdir, preempted=preempted_after(4))
  assert Reader(workdir).checkpoints == [1]
  (record,) = records(workdir)
  assert not any(name.startswith('eval/') for name in record)
  with pytest.raises(preemption.Preempted, match='after step 1 of 2'):
    tiny.run(config, workdir, preempted=preempted_after(3))
  tiny.run(config, workdir)
  undisturbed = tiny.run(config, tmp_path / 'undisturbed')
  assert records(workdir) == records(undisturbed.workdir)


@pytest.mark.long
def test_a_notice_in_the_last_step_leaves_nothing_to_do(text, tmp_path):
  """Without an evaluation the run is finished: no second start is needed."""
  config = tiny.tiny_config(text, steps=1, **{'data.evaluation_sets': ''})
  tiny.run(config, tmp_path / 'run', preempted=preempted_after(2))
  assert Reader(tmp_path / 'run').checkpoints == [1]


@pytest.mark.long
def test_an_evaluation_that_fails_loses_no_step(text, tmp_path, monkeypatch):
  """The save comes first, and the next start makes the evaluation."""
  config = tiny.tiny_config(text, steps=2, checkpoint_every=100)
  workdir = tmp_path / 'run'

  def fail(*args):
    raise RuntimeError('no memory for the evaluation')

  with monkeypatch.context() as patch:
    patch.setattr(evaluation, '_add_up', fail)
    for _ in range(2):
      with pytest.raises(RuntimeError, match='no memory for the evaluation'):
        tiny.run(config, workdir)
      assert Reader(workdir).checkpoints == [2]
      assert [record['step'] for record in records(workdir)] == [1, 2]
  tiny.run(config, workdir)
  undisturbed = tiny.run(config, tmp_path / 'undisturbed')
  assert records(workdir) == records(undisturbed.workdir)


@pytest.mark.long
def test_a_first_evaluation_that_fails_leaves_a_checkpoint(
  text, tmp_path, monkeypatch
):
  """At step 1, long before the first checkpoint is due."""
  config = tiny.tiny_config(text, steps=3, eval_every=1, checkpoint_every=100)

  def fail(*args):
    raise RuntimeError('no memory for the evaluation')

  monkeypatch.setattr(evaluation, '_add_up', fail)
  for _ in range(2):
    with pytest.raises(RuntimeError, match='no memory for the evaluation'):
      tiny.run(config, tmp_path / 'run')
    assert Reader(tmp_path / 'run').checkpoints == [1]


def test_a_cache_of_compiled_programs_that_the_user_chose_stays(monkeypatch):
  chosen = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update('jax_compilation_cache_dir', '/somewhere')
    loop._use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == '/somewhere'
  finally:
    jax.config.update('jax_compilation_cache_dir', chosen)


@pytest.mark.long
def test_a_jump_of_the_learning_rate_is_announced(finished, tmp_path, capsys):
  workdir = tmp_path / 'run'
  shutil.copytree(finished.workdir, workdir)
  config = dataclasses.replace(finished.config, steps=7)
  tiny.run(config, workdir, ['steps'])
  (note,) = (
    line
    for line in capsys.readouterr().err.splitlines()
    if line.startswith('note: ')
  )
  assert 'steps changed: the learning rate of step 7 is 0.00' in note
  assert 'without the change it would be 0.001' in note


def test_changes_that_reached_no_checkpoint_are_forgotten(finished, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished.workdir, workdir)
  seed = {'seed': {'from': 1, 'to': 0}}
  facts = Reader(workdir).facts | {'config_changes': {'3': seed, '6': seed}}
  (workdir / 'run.json').write_text(json.dumps(facts))
  tiny.run(finished.config, workdir)
  assert Reader(workdir).facts == facts | {'config_changes': {'3': seed}}
  facts['config_changes'] = {'6': seed}
  (workdir / 'run.json').write_text(json.dumps(facts))
  tiny.run(finished.config, workdir)
  assert Reader(workdir).facts['config_changes'] == {}


def test_fewer_steps_than_were_made(finished, tmp_path, capsys):
  workdir = tmp_path / 'run'
  shutil.copytree(finished.workdir, workdir)
  config = dataclasses.replace(finished.config, steps=5)
  tiny.run(config, workdir, ['steps'])
  assert 'already at step 6' in capsys.readouterr().err


def test_another_config_is_refused_and_named(finished, monkeypatch):
  """Before text is read, which may take an hour."""
  monkeypatch.setattr(plan_lib.data, 'load_text', None)
  config = dataclasses.replace(finished.config, steps=7)
  with pytest.raises(ValueError, match=r'steps=7 \(was 6\)'):
    plan_lib.plan(config, finished.workdir)


def test_processes_agree_on_what_they_evaluate_on(finished, monkeypatch):
  """One without a set would be waited for in the evaluation."""
  agreed = {}
  agreement = contextlib.nullcontext(agreed)
  monkeypatch.setattr(plan_lib.processes, 'agreement', lambda: agreement)
  plan = plan_lib.plan(finished.config, finished.workdir)
  count = len(plan.text.evaluation['validation'])
  assert agreed['tokens of validation'] == count


@pytest.mark.long
def test_another_balancer_is_refused_unless_that_is_said(
  finished, tmp_path, monkeypatch
):
  """From step 3 on under another rule, which starts from q as it is."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished.workdir, workdir)
  shutil.rmtree(workdir / 'checkpoints' / '6')
  config = dataclasses.replace(
    finished.config,
    balancer=config_lib.balancer_options('midpoint', lag=True),
  )
  with pytest.raises(ValueError, match='--allow_config_change=balancer.clip,'):
    plan_lib.plan(config, workdir)
  router = checkpoints.restore_newest(
    workdir / 'checkpoints',
    Reader(workdir).facts['run'],
    lambda config: abstract_items(finished),
  ).items['router']
  seen = []
  continued = loop._continued

  def spy(*args):
    state = continued(*args)
    seen.append(jax.device_get(state.router))  # The step donates it.
    return state

  monkeypatch.setattr(loop, '_continued', spy)
  tiny.run(config, workdir, ['balancer'])
  q = nn.prices(router)
  state = nn.moe_layers(seen[0])['state']
  assert np.any(q)
  np.testing.assert_array_equal(state.q, q)
  np.testing.assert_array_equal(state.pending, q)
  assert [r['step'] for r in records(workdir)] == [1, 2, 3, 4, 5, 6]
  facts = json.loads((workdir / 'run.json').read_text())
  (changes,) = facts['config_changes'].values()
  assert list(facts['config_changes']) == ['3']
  assert changes['balancer.lag'] == {'from': False, 'to': True}
  # What was said once holds: the same command goes on, another is refused.
  tiny.run(config, workdir)
  with pytest.raises(ValueError, match='another config'):
    plan_lib.plan(finished.config, workdir)


@pytest.mark.parametrize(
  ('option', 'changed', 'message'),
  [
    ('model.width', {'model.width': 32}, 'model.width: cannot change in a run'),
    ('learn', {}, 'learn: no such option'),
    ('learning_rate', {'seed': 1}, r'seed=1 \(was 0\); choose another work'),
  ],
)
def test_what_may_not_change(finished, text, option, changed, message):
  config = tiny.tiny_config(text, eval_every=4, **changed)
  with pytest.raises(ValueError, match=message) as error:
    plan_lib.plan(config, finished.workdir, [option])
  assert 'continue with the change' not in str(error.value)


def poison(monkeypatch, steps, name, bad):
  """Makes a parameter `bad` for some steps of a run, and good again after."""
  make_train_step = loop.make_train_step

  def poisoned(*args):
    train_step = make_train_step(*args)

    def step(state, batch):
      params, index = state.params['norm'], (0,)
      if name == 'router':
        params, index = state.params['moe_blocks']['feed_forward'], (1, 0, 0)
      good = params[name]
      wrong = int(state.step) + 1 in steps
      if wrong:
        params[name] = good.at[index].set(bad)
      before = jax.device_get(state)
      state, *told = train_step(state, batch)
      if wrong:
        changed = [
          jax.tree_util.keystr(path)
          for (path, old), new in zip(
            jax.tree.leaves_with_path(before),
            jax.tree.leaves(state),
            strict=True,
          )
          if not np.array_equal(old, new, equal_nan=True)
        ]
        assert changed == ['.step']
        params = state.params['norm']
        if name == 'router':
          params = state.params['moe_blocks']['feed_forward']
        params[name] = good
      return state, *told

    return step

  monkeypatch.setattr(loop, 'make_train_step', poisoned)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
  text, tmp_path, monkeypatch, capsys
):
  """In steps 3 and 5 of 6, saved at 2 and 4: both counts are in checkpoints."""
  config = tiny.tiny_config(text, checkpoint_every=2)
  poison(monkeypatch, (3, 5), 'router', np.nan)
  run = tiny.run(config, tmp_path / 'run')
  steps = records(run.workdir)
  assert [r['train/skipped_steps'] for r in steps] == [0, 0, 1, 1, 2, 2]
  assert [np.isnan(r['train/loss']) for r in steps] == [
    step in (3, 5) for step in range(1, 7)
  ]
  warning = 'step 3: logits of the router of MoE layer 01 NaN or infinite'
  assert f'{warning}; skipped (1 in a row, 10 end' in capsys.readouterr().err
  assert latest(run).position == (6, 48, 2, 0)
  assert not list(run.workdir.glob('not_finite*'))


@pytest.mark.long
@pytest.mark.parametrize(
  ('name', 'bad', 'what'),
  [
    ('router', np.nan, 'logits of the router of MoE layer 01'),
    ('scale', np.inf, 'train/loss'),
  ],
)
def test_many_steps_in_a_row_that_are_not_finite_end_the_run(
  text, tmp_path, monkeypatch, name, bad, what
):
  config = tiny.tiny_config(text, checkpoint_every=2, skipped_steps=3)
  poison(monkeypatch, (2, 3, 4), name, bad)
  workdir = tmp_path / 'run'
  with pytest.raises(FloatingPointError, match=f'step 4: .*{what}'):
    tiny.run(config, workdir)
  assert Reader(workdir).checkpoints == [2]
  (dump,) = analysis.Run(workdir).not_finite.values()
  assert (dump['step'], dump['cause'], dump['skipped_in_a_row']) == (4, what, 3)
  assert dump['sequences'] == list(range(24, 32))
  loads = dump['record']['router/load/layer_01']
  assert sum(loads) == 8 * 16 * 2
  wrong = [
    name
    for name, x in dump['norms']['parameters'].items()
    if not x or isinstance(x, list) and None in x
  ]
  array = 'norm.scale' if name == 'scale' else 'moe_blocks.feed_forward.router'
  assert wrong == [array]
  if name == 'router':
    assert dump['norms']['parameters'][array][0] > 0
  with pytest.raises(FloatingPointError, match='step 4'):
    tiny.run(config, workdir)  # Counted on from step 2.


def test_shards_are_written_down_where_results_depend_on_them(text, tmp_path):
  devices = jax.device_count()
  for overrides, shards in (
    ({}, 0),
    ({'model.round_to_capacity': True}, devices),
    ({'balancer.scope': 'shard'}, devices),
    ({'capacity_factor': 1.0, 'model.shards': 2 * devices}, 2 * devices),
    ({'model.selection': 'choose_by_experts'}, devices),
  ):
    config = tiny.tiny_config(text, batch_size=2 * devices, **overrides)
    plan = plan_lib.plan(config, tmp_path / 'run')
    assert facts_lib.shards_that_matter(config, plan.mesh) == shards
  for overrides, expected in (
    ({'model.shards': 3}, r'model\.shards=3: .* multiple of'),
    # 16 tokens of 2 experts each, on every device: no even share of 12.
    (
      {
        'model.round_to_capacity': True,
        'model.experts': 12,
        'mesh.expert': 2,
      },
      r'model\.round_to_capacity=True: a shard has 32 pairs',
    ),
    # A device cannot solve for two.
    (
      {'model.shards': 2 * devices, 'balancer.scope': 'shard'},
      f'model.shards={2 * devices}: must be 0 or {devices}',
    ),
  ):
    with pytest.raises(ValueError, match=expected):
      plan_lib.plan(tiny.tiny_config(text, **overrides), tmp_path / 'run')


def test_other_shards_are_refused_where_results_depend_on_them(
  finished, tmp_path
):
  """As if the run had begun on a mesh of two devices."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished.workdir, workdir)
  facts = Reader(workdir).facts
  assert facts['shards'] == 0
  (workdir / 'run.json').write_text(json.dumps(facts | {'shards': 2}))
  with pytest.raises(ValueError, match=r'set --config\.model\.shards=2'):
    plan_lib.plan(finished.config, workdir)
  plan_lib.plan(finished.config, workdir, ['model.shards'])


def test_shards_that_were_allowed_need_no_second_leave(text, tmp_path):
  devices, options = jax.device_count(), {'model.round_to_capacity': True}
  workdir = tmp_path / 'run'
  tiny.run(tiny.tiny_config(text, steps=3, **options), workdir)
  assert Reader(workdir).facts['shards'] == devices
  more = {'steps': 6, 'batch_size': 2 * devices, 'model.shards': 2 * devices}
  config = tiny.tiny_config(text, **options, **more)
  tiny.run(config, workdir, list(more))
  assert Reader(workdir).facts['shards'] == 2 * devices
  plan_lib.plan(config, workdir)


def test_many_passes_over_a_text_are_told(text, tmp_path, capsys):
  for steps, told in ((6, False), (10**6, True)):
    config = tiny.tiny_config(text, steps=steps)
    loop._tell_passes(plan_lib.plan(config, tmp_path / 'run'))
    assert ('passes over 0.0' in capsys.readouterr().err) == told


def test_other_text_is_refused(finished):
  path = finished.workdir / 'run.json'
  facts = path.read_text()
  path.write_text(facts.replace(finished.text.fingerprint, '0'))
  try:
    with pytest.raises(ValueError, match='other training text'):
      plan_lib.plan(finished.config, finished.workdir)
  finally:
    path.write_text(facts)


def test_a_hole_in_the_metrics_is_refused(finished, tmp_path):
  """Averages over the steps would be wrong without a sign of it."""
  shutil.copytree(finished.workdir, tmp_path / 'run')
  path = tmp_path / 'run' / 'metrics.jsonl'
  path.write_text(''.join(path.read_text().splitlines(True)[1:]))
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '6')
  with pytest.raises(ValueError, match='must have every step'):
    tiny.run(finished.config, tmp_path / 'run')


def test_checkpoints_without_a_config_are_refused(finished, tmp_path):
  (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(ValueError, match='no config.json'):
    plan_lib.plan(finished.config, tmp_path / 'run')


def test_the_unigram_model_predicts_what_the_model_does(finished):
  """Eight sequences of the set, not the whole."""
  facts = json.loads((finished.workdir / 'run.json').read_text())
  assert facts['evaluated_tokens'] == {'validation': 8 * 16}
  tokens = finished.text.evaluation['validation'][: 8 * 16 + 1]
  loss = evaluation.unigram_loss(finished.text.train[0].tokens, tokens, 300)
  assert facts['unigram_perplexity'] == pytest.approx(np.exp(loss / 128))


@pytest.mark.long
@pytest.mark.parametrize(
  'overrides',
  [
    {'capacity_factor': 0.5},
    {'model.round_to_capacity': True},
  ],
)
def test_evaluation_neither_drops_nor_rounds(text, tmp_path, overrides):
  """Without a rule to solve, solved and frozen are the same."""
  config = tiny.tiny_config(text, 'unbalanced', steps=1, **overrides)
  tiny.run(config, tmp_path / 'run')
  (record,) = records(tmp_path / 'run')
  assert (record['router/dropped'] > 0) == ('capacity_factor' in overrides)
  assert record['eval/validation/perplexity'] == pytest.approx(
    record['eval/validation/perplexity_solved'], rel=1e-6
  )


@pytest.mark.long
def test_traced_once_over_a_whole_run(text, tmp_path, monkeypatch):
  functions = []

  def keep(make):
    def wrapped(*args):
      functions.append(make(*args))
      return functions[-1]

    return wrapped

  monkeypatch.setattr(loop, 'make_train_step', keep(loop.make_train_step))
  monkeypatch.setattr(
    evaluation,
    'make_evaluation_step',
    keep(evaluation.make_evaluation_step),
  )
  config = tiny.tiny_config(text, eval_every=2)
  tiny.run(config, tmp_path / 'run')
  assert [function._cache_size() for function in functions] == [1, 1]


@pytest.mark.long
def test_methods_share_weights_and_batches(text, tmp_path):
  hashes = set()
  for method in METHODS:
    run = plan_lib.plan(tiny.tiny_config(text, method), tmp_path / method)
    batches = batches_of(run)
    hashes.add(
      (
        checksums.digest(run.training.init().params),
        checksums.digest([next(batches)[:2] for _ in range(6)]),
      )
    )
  (known,) = hashes
  other = plan_lib.plan(tiny.tiny_config(text, seed=1), tmp_path / 'other')
  assert checksums.digest(other.training.init().params) not in known
  batches = batches_of(other)
  assert checksums.digest([next(batches)[:2] for _ in range(6)]) not in known
