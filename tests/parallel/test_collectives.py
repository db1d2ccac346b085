"""The compiled train step communicates what exchange.py says, and no more."""

import collections
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from launch import hlo
from moe_jax.parallel import mesh as meshes
from moe_jax.train import batches
from moe_jax.train import state as state_lib
from moe_jax.train import step as step_lib
from tests.train import tiny

LAYERS, ITERATIONS, EXPERTS, K, WIDTH, SEQUENCE = 2, 4, 8, 2, 16, 16
DEVICES = 8
PASSES = 32 // 4  # All-reduces of one order statistic, four bits each.

on_meshes = pytest.mark.parametrize(
  ('data', 'expert'),
  [
    pytest.param(8, 1, marks=pytest.mark.long),
    pytest.param(1, 8, marks=pytest.mark.long),
    (2, 4),
  ],
)


@functools.cache
def compiled(data, expert, batch=8, method='bip', **overrides):
  """Returns the config, the training and the collectives of its step."""
  config = tiny.tiny_config(
    pathlib.Path('no_text'),
    method,
    **{
      'batch_size': batch,
      'mesh.data': data,
      'mesh.expert': expert,
      # Written as keywords, which have no dots.
      **{name.replace('__', '.'): x for name, x in overrides.items()},
    },
  )
  mesh = meshes.make_mesh(data, expert)
  training = state_lib.make_training(config, mesh)
  tokens = jax.ShapeDtypeStruct(
    (batch, SEQUENCE), jnp.int32, sharding=NamedSharding(mesh, meshes.BATCH)
  )
  step = step_lib.make_train_step(config, training)
  lowered = step.lower(training.abstract, batches.Batch(tokens, tokens))
  found = hlo.collectives(lowered.compile().as_text())
  # Over an axis of one device they are nothing.
  return training, [each for each in found if len(each.group) != 1]


def count(found, kind, size=None):
  """Counts how often collectives of a kind, and bytes, run in a step."""
  return sum(
    each.count
    for each in found
    if each.kind == kind and size in (None, each.bytes)
  )


def solving(found):
  """Counts all-reduces of the counts of one pass of an order statistic."""
  return count(found, 'all-reduce', 15 * EXPERTS * 4)


@pytest.mark.long
@on_meshes
def test_dropless(data, expert):
  training, found = compiled(data, expert)
  split = expert > 1
  assert solving(found) == LAYERS * ITERATIONS * PASSES
  # Loads go to all; each of 4 exchanges of rows is 2 on CPU, one for indices.
  assert count(found, 'all-gather') == LAYERS * split
  assert count(found, 'all-gather', expert * EXPERTS * 4) == LAYERS * split
  assert count(found, 'all-to-all') == LAYERS * 4 * 2 * split
  assert_nothing_else(found, {'all-reduce', 'all-gather', 'all-to-all'})
  assert_gradients(found, training, solve_bytes=15 * EXPERTS * 4)


@pytest.mark.long
@on_meshes
def test_static_capacity(data, expert):
  _, found = compiled(data, expert, capacity_factor=1.0)
  assert solving(found) == LAYERS * ITERATIONS * PASSES
  assert_static_exchange(found, expert)
  assert_nothing_else(found, {'all-reduce', 'all-to-all'})


@pytest.mark.long
@on_meshes
def test_shards_solve_without_communication(data, expert):
  """With rounding, all pairs of devices exchange equal amounts, undropped."""
  training, found = compiled(
    data,
    expert,
    method='midpoint',
    balancer__scope='shard',
    model__round_to_capacity=True,
  )
  assert solving(found) == 0
  assert_static_exchange(found, expert)
  assert_nothing_else(found, {'all-reduce', 'all-to-all'})
  assert_gradients(found, training)
  # Inside of the router's loops there is nothing at all.
  for each in found:
    inside = each.op_name.partition('/router/')[2]
    assert 'while' not in inside, each


def assert_static_exchange(found, expert, rows=4, gates=2):
  """Rows and gates travel so many times, at capacity factor 1."""
  pairs = SEQUENCE * K  # One sequence on each device.
  sent = [(rows, pairs * WIDTH * 4), (gates, pairs * 4)]
  for times, size in sent:
    times *= LAYERS * (expert > 1)
    assert count(found, 'all-to-all', size) == times
  total = LAYERS * (expert > 1) * (rows + gates)
  assert count(found, 'all-to-all') == total


def assert_nothing_else(found, kinds):
  assert {each.kind for each in found} <= kinds


def assert_gradients(found, training, solve_bytes=None):
  """All other all-reduces are gradients and a few numbers per expert."""
  total = sum(
    each.count * each.bytes
    for each in found
    if each.kind == 'all-reduce' and each.bytes != solve_bytes
  )
  expected = 0
  for leaf in jax.tree.leaves(training.abstract.params):
    local = leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize * functools.reduce(int.__mul__, local)
    mesh = leaf.sharding.mesh
    is_expert = 'expert' in leaf.sharding.spec
    expected += size * (mesh.shape['data'] > 1 or not is_expert)
  embedding = training.abstract.params['embedding']['embedding']
  expected += 4 * embedding.size  # It is used, and so differentiated, twice.
  per_layer = 10 * EXPERTS * 4
  assert expected <= total <= expected + LAYERS * per_layer + 200


@pytest.mark.long
def test_remat_does_not_solve_again():
  _, found = compiled(2, 4, model__remat=True)
  assert solving(found) == LAYERS * ITERATIONS * PASSES


@pytest.mark.long
def test_remat_sends_no_rows_back_again():
  """There and back, there again, and there and back for the gradient."""
  _, found = compiled(2, 4, model__remat=True, capacity_factor=1.0)
  assert_static_exchange(found, 4, rows=5, gates=3)


@pytest.mark.long
def test_gradients_are_summed_once_a_step():
  """Not once a microbatch, of which there are four."""
  training, found = compiled(
    2, 4, batch=32, method='loss_free', accumulation=4, capacity_factor=1.0
  )
  gradients = 0
  for leaf in jax.tree.leaves(training.abstract.params):
    gradients += 4 * math.prod(leaf.sharding.shard_shape(leaf.shape))
  total = sum(
    each.count * each.bytes for each in found if each.kind == 'all-reduce'
  )
  per_layer = 10 * EXPERTS * 4  # A few numbers for each expert, each time.
  assert gradients <= total <= gradients + 4 * (LAYERS * per_layer + 200)
  assert gradients > 10 * 4 * (LAYERS * per_layer + 200)


@pytest.mark.long
def test_only_the_exchange_grows_with_the_tokens():
  def others(found):
    return collections.Counter(
      {
        (each.kind, each.bytes, each.group): each.count
        for each in found
        if each.kind != 'all-to-all'
      }
    )

  few, many = (
    compiled(2, 4, batch=batch, capacity_factor=1.0)[1] for batch in (8, 32)
  )
  assert others(few) == others(many)
  assert {each.bytes for each in many if each.kind == 'all-to-all'} == {
    4 * each.bytes for each in few if each.kind == 'all-to-all'
  }


@pytest.mark.long
def test_weights_split_over_data_are_gathered_layer_by_layer():
  training, found = compiled(
    4, 2, mesh__fsdp=True, model__remat=True, capacity_factor=1.0
  )
  params = training.abstract.params
  gate = params['moe_blocks']['feed_forward']['gate']
  assert gate.sharding.spec == P(None, 'expert', 'data', None)
  whole = gate.size // LAYERS // 2 * 4  # A layer's, on one device.
  # Gate, up and down; forward and again backward.
  assert count(found, 'all-gather', whole) == 3 * 2 * LAYERS
  assert count(found, 'reduce-scatter', whole) == 3 * LAYERS
  # No activation is gathered: what is, is a parameter of one layer at most.
  sizes = {each.bytes for each in found if each.kind == 'all-gather'}
  embedding = 4 * params['embedding']['embedding'].size
  assert sizes <= {whole, embedding, *(4 * WIDTH * n for n in (8, 16))}
  assert_nothing_else(
    found, {'all-reduce', 'all-gather', 'all-to-all', 'reduce-scatter'}
  )
