"""The step: exact under accumulation and on any mesh, traced once."""

import dataclasses
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import nn, routing
from moe_jax.config import METHODS, MeshConfig
from moe_jax.parallel import mesh as meshes
from moe_jax.train import batches
from moe_jax.train import state as state_lib
from moe_jax.train import step as step_lib
from tests.train import tiny

# XLA may keep float32 between operations of bfloat16 that it fuses, and fuses
# a layer that is recomputed otherwise.
NO_EXCESS = {'xla_allow_excess_precision': False}
# Many programs that run for a second each: half of the time is LLVM's.
COMPILED_FAST = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}


def run_steps(config, count=3, guard='allow', compiler_options=None):
  """Returns the state and each step's metrics, on random tokens."""
  data = max(1, config.mesh.data)  # one device where nothing is said
  devices = jax.devices()[: data * config.mesh.expert]
  mesh = meshes.make_mesh(data, config.mesh.expert, devices=devices)
  training = state_lib.make_training(config, mesh)
  training = training._replace(
    compiler_options={**training.compiler_options, **(compiler_options or {})}
  )
  train_step = step_lib.make_train_step(config, training)
  state, history = training.init(), []
  random = np.random.default_rng(1)
  for _ in range(count):
    tokens = random.integers(
      config.data.vocabulary,
      size=(config.batch_size, config.sequence_length + 1),
      dtype=np.int32,
    )
    batch = batches.to_devices(
      mesh, {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:]}
    )
    with jax.transfer_guard(guard):
      state, metrics, _ = train_step(state, batch)
    history.append(metrics)
  return training, train_step, state, jax.device_get(history)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  return tiny.tiny_config(tmp_path_factory.mktemp('no_text'))


@pytest.fixture(scope='module')
def one_device(config):
  return run_steps(config)


def assert_close(actual, expected, rtol=1e-4, atol=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    jax.device_get(actual),
    jax.device_get(expected),
  )


def assert_same_bits(actual, expected):
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(actual),
    jax.device_get(expected),
  )


def with_remat(config):
  model = dataclasses.replace(config.model, remat=True)
  return dataclasses.replace(config, model=model)


def test_metrics(one_device, config):
  *_, history = one_device
  first = history[0]
  pairs = config.batch_size * config.sequence_length * 2
  np.testing.assert_array_equal(first['router/load/layer'].sum(-1), pairs)
  assert first['router/max_violation'] == pytest.approx(
    np.mean(first['router/load/layer'].max(-1) / (pairs / 8) - 1)
  )
  assert first['train/loss'] == pytest.approx(np.log(300), rel=0.05)
  assert first['train/aux_loss'] == 0 == first['router/dropped']


def test_losses_and_tokens_are_summed_by_source():
  loss_BxS = jnp.array([[1.0, 2.0], [4.0, 8.0], [16.0, 0.0]])
  inputs = jnp.zeros((3, 2), jnp.int32)
  sources = jnp.array([[0, 1, 0], [1, 0, 0], [0, 1, 0]], bool)
  mask = jnp.array([[1, 1], [1, 1], [1, 0]], bool)
  assert (
    step_lib._sums_of_sources(loss_BxS, batches.Batch(inputs, inputs)) == {}
  )
  batch = batches.Batch(inputs, inputs, mask, sources=sources)
  sums = step_lib._sums_of_sources(loss_BxS, batch)
  assert sums['tokens'].tolist() == [2, 3, 0]
  assert sums['loss'].tolist() == [12, 19, 0]
  metrics = step_lib._by_source('abc', sums)
  assert metrics['train/loss/b'] == pytest.approx(19 / 3)
  assert metrics['data/share/b'] == pytest.approx(3 / 5)
  assert np.isnan(metrics['train/loss/c']) and metrics['data/share/c'] == 0


def test_traced_once(one_device):
  _, train_step, _, _ = one_device
  assert train_step._cache_size() == 1


def test_no_hidden_transfers(config):
  *_, history = run_steps(config, guard='disallow')
  assert len(history) == 3


@pytest.mark.parametrize(
  ('method', 'atol'),
  # Scores may differ in the last bit, which may move a token between bins.
  [
    pytest.param('loss_free', 0, marks=pytest.mark.long),
    pytest.param('unbalanced', 0, marks=pytest.mark.long),
    pytest.param('quantile_histogram', 1e-4, marks=pytest.mark.long),
  ],
)
def test_accumulation_equals_one_batch(method, atol, tmp_path):
  """These rules see the whole step's loads; bip solves each microbatch."""
  config = tiny.tiny_config(tmp_path, method)
  _, _, whole, expected = run_steps(config)
  config = dataclasses.replace(config, accumulation=4)
  _, _, state, history = run_steps(config)
  assert_close(state.params, whole.params)
  assert_close(state.router, whole.router, rtol=0, atol=atol)
  assert_close(history, expected)


@pytest.mark.long
@pytest.mark.parametrize(
  ('method', 'rounding'),
  [
    # bip_t2 and the like are bip, or midpoint, but for a number.
    *((each, False) for each in METHODS if not re.search(r'_t\d+$', each)),
    ('bip', True),
    ('loss_controlled', True),
  ],
)
def test_every_rule_trains_with_everything_else(method, rounding, tmp_path):
  """Accumulation, remat, bfloat16, shards, rounding.

  Remat changes no bit, nor of bfloat16 if XLA rounds as the program says; with
  an auxiliary loss, last bits differ, from a cause that was not traced.
  """
  config = tiny.tiny_config(
    tmp_path,
    method,
    **{
      'accumulation': 1 if method == 'quantile' else 2,
      'capacity_factor': float(rounding),
      'model.dtype': 'bfloat16',
      'model.shards': 2,
      'model.round_to_capacity': rounding,
    },
  )
  options = NO_EXCESS | COMPILED_FAST
  _, _, plain, history = run_steps(config, compiler_options=options)
  _, train_step, state, _ = run_steps(
    with_remat(config), compiler_options=options
  )
  if config.balancer_rule.loss == routing.unbalanced().loss:
    assert_same_bits(state, plain)
  else:
    assert_close(state, plain, rtol=1e-5, atol=1e-6)
  assert train_step._cache_size() == 1
  for record in history:
    assert np.isfinite(record['train/loss'])
    assert record['router/dropped'] == 0
    if rounding:
      assert record['router/max_violation'] == 0
      assert record['router/max_violation_unrounded'] > 0


@pytest.mark.long
@pytest.mark.parametrize('method', ['bip', 'loss_controlled'])
def test_remat_changes_float32_by_an_auxiliary_loss_alone(method, tmp_path):
  """And then in last bits, from a cause that was not traced."""
  config = tiny.tiny_config(tmp_path, method)
  _, _, plain, _ = run_steps(config)
  _, _, state, _ = run_steps(with_remat(config))
  if method == 'bip':
    assert_same_bits(state, plain)
  else:
    assert_close(state, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize('method', ['bip', 'loss_controlled'])
def test_remat_changes_bfloat16_by_its_rounding(method, tmp_path):
  """With XLA's excess precision; before the first update spreads it.

  A layer's output is rounded to 2^-9 of it, where it is not kept in float32.
  Routers have logits of about 1, so scores and q, which are 1 at most, move by
  no more than two such roundings, and so does the loss in proportion.
  """
  config = tiny.tiny_config(tmp_path, method, **{'model.dtype': 'bfloat16'})
  _, _, plain, (expected,) = run_steps(config, count=1)
  _, _, state, (actual,) = run_steps(with_remat(config), count=1)
  assert_close(
    nn.prices(state.router), nn.prices(plain.router), rtol=0, atol=2**-8
  )
  assert_close(actual['train/loss'], expected['train/loss'], rtol=2**-8, atol=0)


@pytest.mark.long
@pytest.mark.parametrize('method', ['loss_free', 'loss_controlled'])
def test_accumulation_on_a_mesh_equals_one_device(method, tmp_path):
  """There, each device adds up gradients of its own, see `_summed_once`."""
  config = tiny.tiny_config(
    tmp_path,
    method,
    batch_size=32,
    accumulation=2,
    # Each device has the whole of it, not a share.
    **{'losses.similarity': 0.1},
  )
  _, _, whole, expected = run_steps(config, count=2)
  mesh = MeshConfig(data=2, expert=4)
  config = dataclasses.replace(config, mesh=mesh)
  _, _, state, history = run_steps(config, count=2)
  assert_close(state.params, whole.params, rtol=1e-3, atol=1e-4)
  for name in ('train/loss', 'train/aux_loss', 'train/gradient_norm'):
    assert_close(history[0][name], expected[0][name], rtol=1e-5)
  np.testing.assert_array_equal(
    history[0]['router/load/layer'], expected[0]['router/load/layer']
  )


@pytest.mark.long
def test_q_of_loss_free_moves_once_a_step(tmp_path):
  config = tiny.tiny_config(tmp_path, 'loss_free', accumulation=4)
  _, _, state, _ = run_steps(config, count=1)
  q = nn.prices(state.router)
  assert set(np.unique(np.abs(q))) <= {0.0, np.float32(1e-3)}
  assert np.any(q != 0)


@pytest.mark.long
@pytest.mark.parametrize('shape', [(8, 1), (2, 4)])
def test_many_devices_equal_one(shape, config, one_device):
  _, _, expected_state, expected = one_device
  mesh = MeshConfig(data=shape[0], expert=shape[1])
  config = dataclasses.replace(config, mesh=mesh)
  training, _, state, history = run_steps(config)
  # Scores differ in the last bits, so a choice between near equals may.
  assert_close(
    [h['train/loss'] for h in history],
    [h['train/loss'] for h in expected],
    rtol=1e-3,
  )
  assert_close(state.params, expected_state.params, rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(
    history[0]['router/load/layer'], expected[0]['router/load/layer']
  )
  # Moments and experts are really split over the mesh.
  gate = nn.moe_layers(training.abstract.params)['gate']
  for leaf in jax.tree.leaves(state.optimizer) + jax.tree.leaves(state.params):
    if leaf.shape == gate.shape:
      assert leaf.sharding.shard_shape(leaf.shape)[1] == 8 // shape[1]


@pytest.mark.long
@pytest.mark.parametrize(
  'shape',
  [
    (2, 4),
    *(
      pytest.param(shape, marks=pytest.mark.long)
      for shape in ((2, 1), (1, 2), (4, 2), (1, 8))
    ),
  ],
)
def test_choices_on_a_mesh_differ_between_near_equals_only(shape, config):
  """Through all layers, up to the rounding of sums."""
  tokens = np.random.default_rng(3).integers(300, size=(8, 16), dtype=np.int32)

  def forward(data, expert):
    devices = jax.devices()[: data * expert]
    mesh = meshes.make_mesh(data, expert, devices=devices)
    training = state_lib.make_training(config, mesh)

    @jax.jit
    def apply(params, router, tokens):
      model = nnx.merge(training.graphdef, params, router, copy=True)
      logits, outputs = model(tokens, train=True)
      return logits, outputs, nnx.state(model, nn.RouterState)

    state = training.init()
    return jax.device_get(apply(state.params, state.router, tokens))

  logits, outputs, router = forward(*shape)
  expected_logits, expected, expected_router = forward(1, 1)
  np.testing.assert_allclose(outputs.scores, expected.scores, atol=1e-5)
  np.testing.assert_allclose(logits, expected_logits, atol=1e-4)
  assert_close(router, expected_router)
  q_LxE = nn.prices(expected_router)
  adjusted = np.sort(expected.scores - q_LxE[:, None], axis=-1)
  near = adjusted[..., -2] - adjusted[..., -3] < 1e-5  # Second, third of k=2.
  experts, expected_experts = (
    np.sort(each.choice.experts, axis=-1) for each in (outputs, expected)
  )
  differ = np.any(experts != expected_experts, axis=-1)
  assert not np.any(differ & ~near)
  assert np.mean(near) < 0.1


@pytest.mark.long
def test_masked_tokens_change_nothing(config):
  mesh = meshes.make_mesh(1, 1, devices=jax.devices()[:1])
  training = state_lib.make_training(config, mesh)
  train_step = step_lib.make_train_step(config, training)
  random = np.random.default_rng(2)
  tokens = random.integers(300, size=(8, 17), dtype=np.int32)
  mask = np.arange(16) < random.integers(4, 17, size=(8, 1))
  results = []
  for padding in (0, 7):
    inputs = np.where(mask, tokens[:, :-1], padding)
    targets = np.where(mask, tokens[:, 1:], padding)
    batch = batches.Batch(*map(jnp.asarray, (inputs, targets, mask)))
    state, metrics, _ = train_step(training.init(), batch)
    results.append((state.router, metrics))
  assert_close(*results, rtol=1e-5)
  np.testing.assert_array_equal(
    results[0][1]['router/load/layer'].sum(-1), 2 * mask.sum()
  )


@pytest.mark.long
def test_a_dead_capacity_drops_and_counts(tmp_path):
  config = tiny.tiny_config(tmp_path, 'unbalanced', capacity_factor=0.5)
  *_, history = run_steps(config, count=1)
  load_LxE = history[0]['router/load/layer']
  room = 0.5 * load_LxE.sum(-1, keepdims=True) / 8
  dropped = np.maximum(load_LxE - room, 0).sum()
  assert history[0]['router/dropped'] == pytest.approx(dropped / load_LxE.sum())
  assert history[0]['router/dropped'] >= 0.5


def test_the_compiler_is_checked_for_dropless_training_only(
  config, monkeypatch
):
  """What it refuses: tests/parallel/test_grouped_matmul.py."""

  def refuse(platform):
    raise ValueError(f'refused for {platform}')

  monkeypatch.setattr(state_lib, 'check_compiler', refuse)
  mesh = meshes.make_mesh(1, 1, devices=jax.devices()[:1])
  rounding = dataclasses.replace(config.model, round_to_capacity=True)
  for static in ({'capacity_factor': 1.0}, {'model': rounding}):
    state_lib.make_training(dataclasses.replace(config, **static), mesh)
  with pytest.raises(ValueError, match='refused for cpu'):
    state_lib.make_training(config, mesh)


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'batch_size': 12}, 'must be a multiple of 8.*with batch_size=16$'),
    (
      {'batch_size': 24, 'accumulation': 2},
      'must be a multiple of 8.*with batch_size=32$',
    ),
    ({'model.experts': 6}, 'must divide model.experts=6; here 1, 2 would do$'),
    (
      {'model.round_to_capacity': True, 'model.experts': 64},
      'a shard has 32 pairs .*with batch_size=16$',
    ),
  ],
)
def test_what_does_not_fit_names_what_does(options, words, tmp_path):
  sizes = {'mesh.data': 2, 'mesh.expert': 4, **options}
  config = tiny.tiny_config(tmp_path, **sizes)
  mesh = jax.sharding.AbstractMesh((2, 4), meshes.AXES)
  with pytest.raises(ValueError, match=words):
    state_lib.check_mesh(config, mesh)
