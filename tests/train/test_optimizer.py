"""The learning rate step by step, and what each optimizer moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest

from moe_jax.parallel import mesh as meshes
from moe_jax.runs import preemption
from moe_jax.runs.reader import Reader
from moe_jax.train import optimizer
from moe_jax.train import state as state_lib
from tests.train import tiny
from tests.train.test_step import assert_close, run_steps


def learning_rates(tmp_path, warmup_steps, **options):
  config = tiny.tiny_config(
    tmp_path,
    steps=10,
    learning_rate=8e-3,
    warmup_steps=warmup_steps,
    **{f'optimizer.{name}': value for name, value in options.items()},
  )
  schedule = optimizer.make_schedule(config)
  return np.array([schedule(step) for step in range(10)])


def test_warm_up_begins_with_its_first_part_and_ends_at_the_peak(tmp_path):
  """No step is lost to a learning rate of 0."""
  rates = learning_rates(tmp_path, warmup_steps=4)
  np.testing.assert_allclose(rates[:4], [2e-3, 4e-3, 6e-3, 8e-3], rtol=1e-6)
  assert np.all(np.diff(rates[3:]) < 0)


@pytest.mark.parametrize('warmup_steps', [0, 1])
def test_without_warm_up_a_cosine_starts_at_the_peak(tmp_path, warmup_steps):
  rates = learning_rates(tmp_path, warmup_steps)
  cosine = (1 + np.cos(np.pi * np.arange(10) / 10)) / 2
  np.testing.assert_allclose(rates, 8e-3 * (0.1 + 0.9 * cosine), rtol=1e-6)


@pytest.mark.parametrize(
  ('options', 'expected'),
  [
    ({'schedule': 'constant'}, [4, 8, 8, 8, 8, 8, 8, 8, 8, 8]),
    (
      {'schedule': 'linear', 'end': 0.0},
      [4, *(8 * (9 - i) / 9 for i in range(9))],
    ),
    (
      {'schedule': 'wsd', 'decay_steps': 4, 'end': 0.5},
      [4, 8, 8, 8, 8, 8, 8, 7, 6, 5],
    ),
  ],
  ids=['constant', 'linear', 'wsd'],
)
def test_schedules_by_hand(tmp_path, options, expected):
  rates = learning_rates(tmp_path, warmup_steps=2, **options)
  np.testing.assert_allclose(1e3 * rates, expected, rtol=1e-6)


PARAMS = {
  'embedding': {'embedding': jnp.full((5, 4), 0.5)},
  'moe_blocks': {
    'norm': {'scale': jnp.full((2, 4), 0.5)},
    'feed_forward': {'gate': jnp.full((2, 3, 4, 6), 0.5)},
  },
  'norm': {'scale': jnp.full((4,), 0.5)},
}


def moves(tmp_path, gradient, **options):
  """Returns the first updates of PARAMS, in units of the learning rate."""
  config = tiny.tiny_config(
    tmp_path, **{'learning_rate': 1e-3, 'gradient_clip': 0.0, **options}
  )
  transformation = optimizer.make_optimizer(config)
  state = transformation.init(PARAMS)
  updates, _ = transformation.update(
    gradient, state, PARAMS, norm=optax.tree.norm(gradient)
  )
  return jax.tree.map(lambda x: np.asarray(x) / 1e-3, updates)


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'muon'])
def test_weight_decay_may_leave_out_the_scales_of_norms(tmp_path, name):
  """And is in units of the learning rate, whatever the optimizer."""
  nothing = jax.tree.map(jnp.zeros_like, PARAMS)
  options = {'weight_decay': 0.1, 'optimizer.decay': 'matrices'}
  options['optimizer.name'] = name
  moved = moves(tmp_path, nothing, **options)
  scales = [moved['norm'], moved['moe_blocks'].pop('norm')]
  assert all(np.all(x == 0) for x in jax.tree.leaves(scales))
  for update in jax.tree.leaves((moved['embedding'], moved['moe_blocks'])):
    np.testing.assert_allclose(update, -0.1 * 0.5, rtol=1e-5)


def test_the_gradient_is_clipped_or_not(tmp_path):
  """Betas of 0 leave g / (|g| + eps)."""
  ones = jax.tree.map(jnp.ones_like, PARAMS)
  options = {
    'weight_decay': 0.0,
    'optimizer.b1': 0.0,
    'optimizer.b2': 0.0,
    'optimizer.eps': 1.0,
  }
  size = sum(x.size for x in jax.tree.leaves(PARAMS))
  for greatest, entry in ((0.0, 1.0), (1.0, size**-0.5), (100.0, 1.0)):
    moved = moves(tmp_path, ones, gradient_clip=greatest, **options)
    expected = -entry / (entry + 1.0)
    for update in jax.tree.leaves(moved):
      np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_muon_takes_each_matrix_of_each_layer_and_expert(tmp_path):
  random = np.random.default_rng(0)
  gradient = jax.tree.map(
    lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), PARAMS
  )
  options = {'weight_decay': 0.0, 'optimizer.name': 'muon'}
  moved = moves(tmp_path, gradient, **options)
  single = contrib.muon(1.0, consistent_rms=0.2)
  for place in np.ndindex(2, 3):
    matrix = gradient['moe_blocks']['feed_forward']['gate'][place]
    expected, _ = single.update(matrix, single.init(matrix), matrix)
    actual = moved['moe_blocks']['feed_forward']['gate'][place]
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-4)
  # Of AdamW, as of Muon, with Nesterov momentum: at first the gradient's sign.
  step = 1 + 0.9 * 0.1 / (1 - 0.9**2)
  for name in ('embedding', 'norm'):
    assert_close(
      moved[name], jax.tree.map(lambda x: -step * jnp.sign(x), gradient[name])
    )


def first_updates(config):
  """Returns the plan, and the updates of random gradients on its mesh."""
  mesh = meshes.make_mesh(
    config.mesh.data,
    config.mesh.expert,
    devices=jax.devices()[: config.mesh.data * config.mesh.expert],
  )
  training = state_lib.make_training(config, mesh)
  state, random = training.init(), np.random.default_rng(0)
  gradient = jax.tree.map(
    lambda x: jax.device_put(random.normal(size=x.shape), x.sharding),
    state.params,
  )
  updates, _ = jax.jit(training.optimizer.update)(
    gradient, state.optimizer, state.params, norm=optax.tree.norm(gradient)
  )
  return training, updates


@pytest.mark.long
@pytest.mark.parametrize('name', ['adafactor', 'muon'])
def test_each_optimizer_moves_alike_on_many_devices(tmp_path, name):
  options = {'optimizer.name': name, 'model.remat': True}
  one, many = (
    tiny.tiny_config(tmp_path, **options, **{'mesh.data': data, **more})
    for data, more in ((1, {}), (2, {'mesh.expert': 4, 'mesh.fsdp': True}))
  )
  whole, expected = first_updates(one)
  split, updates = first_updates(many)
  assert_close(updates, expected, rtol=1e-4, atol=1e-7)
  size = state_lib.bytes_per_device
  assert size(split.abstract.optimizer) < size(whole.abstract.optimizer) / 2
  _, _, _, history = run_steps(many)
  assert history[2]['train/loss'] < history[0]['train/loss']


def test_the_first_moment_may_be_bfloat16(tmp_path):
  config = tiny.tiny_config(tmp_path, **{'optimizer.first_moment': 'bfloat16'})
  state = optimizer.make_optimizer(config).init(PARAMS)
  means = optax.tree.get(state, 'mu')
  assert {x.dtype for x in jax.tree.leaves(means)} == {jnp.bfloat16.dtype}


def test_a_bfloat16_moment_is_saved_and_restored(text, tmp_path):
  config = tiny.tiny_config(text, **{'optimizer.first_moment': 'bfloat16'})
  whole = tiny.run(config, tmp_path / 'whole').workdir
  stops = iter([False, False, True])
  with pytest.raises(preemption.Preempted):
    tiny.run(config, tmp_path / 'parts', preempted=lambda: next(stops))
  parts = tiny.run(config, tmp_path / 'parts').workdir
  assert last_loss(parts) == last_loss(whole)


def last_loss(workdir):
  return Reader(workdir).records[-1]['train/loss']


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'schedule': 'wsd'}, 'optimizer.decay_steps=0: 1 or more'),
    ({'decay_steps': 3}, 'optimizer.decay_steps=3: .* it is cosine'),
    (
      {'schedule': 'wsd', 'decay_steps': 11},
      'decay_steps=11: must be at most steps - warmup_steps = 10',
    ),
    (
      {'name': 'adafactor', 'first_moment': 'bfloat16'},
      'optimizer.first_moment=bfloat16: not with optimizer.name=adafactor',
    ),
    ({'name': 'adam'}, "optimizer.name='adam': must be one of"),
  ],
)
def test_what_cannot_be_is_refused(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    learning_rates(tmp_path, 0, **options)


def test_the_average_follows_the_parameters(tmp_path):
  config = tiny.tiny_config(tmp_path, **{'optimizer.average': 0.75})
  plain = tiny.tiny_config(tmp_path)
  averaged, steps = None, range(4)
  for count in steps:
    _, _, state, _ = run_steps(plain, count)
    assert state.average is None and state.evaluated is state.params
    if averaged is None:
      averaged = jax.device_get(state.params)
    else:
      averaged = jax.tree.map(
        lambda a, p: 0.75 * a + 0.25 * p, averaged, jax.device_get(state.params)
      )
  _, _, state, _ = run_steps(config, len(steps) - 1)
  assert_close(state.average, averaged)
  jax.tree.map(np.testing.assert_array_equal, state.evaluated, state.average)
  _, _, plain_state, _ = run_steps(plain, len(steps) - 1)
  jax.tree.map(np.testing.assert_array_equal, state.params, plain_state.params)
