"""From equal scores, the same bits on any devices, microbatches, processes."""

import functools
import hashlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.parallel import mesh as meshes
from moe_jax.runs import processes
from tests import several_processes
from tests.routing import rules

TOKENS, EXPERTS, K = 96, 8, 3


counting_rule = rules.each(rules.BY_COUNTING)


def batches():
  """Two steps of scores; some tokens are padding, one shard of 8 all of it."""
  scores = jnp.stack([rules.skewed_scores(TOKENS, EXPERTS, i) for i in (1, 2)])
  mask = np.random.default_rng(0).random((2, TOKENS)) < 0.8
  mask[:, :12] = False
  return scores, jnp.asarray(mask)


def two_steps(name, scores, mask, axis_name=None):
  """Returns everything that must not depend on where tokens are."""
  state, results = rules.RULES[name].init(EXPERTS), []
  for i in range(2):
    state, q, choice = rules.step(
      rules.RULES[name],
      state,
      scores[i],
      k=K,
      mask_T=mask[i],
      axis_name=axis_name,
    )
    load = choice.load
    if axis_name is not None:
      load = jax.lax.psum(load, axis_name)
    results.append((state, q, choice.experts, choice.gates, load))
  return results


@functools.cache
def expected(name):
  return jax.device_get(jax.jit(functools.partial(two_steps, name))(*batches()))


def assert_same(actual, reference):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), reference)


@pytest.mark.parametrize('count', [pytest.param(2, marks=pytest.mark.long), 8])
# Neither clip nor lag, nor what a rule does with loads, moves between devices.
@counting_rule
def test_compiler_sharding_leaves_every_bit(name, count):
  mesh = meshes.make_mesh(count // 2, 2, devices=jax.devices()[:count])
  sharding = NamedSharding(mesh, P(None, meshes.AXES))
  run = jax.jit(functools.partial(two_steps, name))
  compiled = run.lower(*jax.device_put(batches(), sharding)).compile()
  assert_same(compiled(*jax.device_put(batches(), sharding)), expected(name))


@pytest.mark.parametrize(
  'count', [pytest.param(n, marks=pytest.mark.long) for n in (2, 4)] + [8]
)
@counting_rule
def test_shard_map_leaves_every_bit(name, count):
  mesh = meshes.make_mesh(count // 2, 2, devices=jax.devices()[:count])
  token, all_ = P(meshes.AXES), P()
  run = jax.shard_map(
    functools.partial(two_steps, name, axis_name=meshes.AXES),
    mesh=mesh,
    in_specs=P(None, meshes.AXES),
    out_specs=[(all_, all_, token, token, all_)] * 2,
  )
  assert_same(jax.jit(run)(*batches()), expected(name))


@pytest.mark.parametrize('lag', [False, True])
def test_shards_solve_by_themselves_and_share_their_mean(lag):
  """Against a loop over shards; one has padding only and no say."""
  scores, mask = batches()
  balancer = routing.midpoint(2, lag=lag, scope='shard')
  shards, size = 8, TOKENS // 8
  mesh = meshes.make_mesh(shards, 1)
  state = balancer.init(EXPERTS)._replace(q=0.01 * jnp.arange(EXPERTS))

  def run(scores, mask):
    after, q_E, choice = rules.step(
      balancer, state, scores, k=K, mask_T=mask, axis_name=meshes.AXES
    )
    # Nothing says that q is the same on all shards, as it may not be.
    q_E = q_E if lag else q_E[None]
    return after, q_E, choice.experts

  after, q, experts = jax.jit(
    jax.shard_map(
      run,
      mesh=mesh,
      in_specs=P(meshes.AXES),
      out_specs=(P(), P() if lag else P(meshes.AXES), P(meshes.AXES)),
    )
  )(scores[0], mask[0])

  solve = jax.jit(
    functools.partial(
      routing.dual_iterations,
      k=K,
      iterations=2,
      clip=False,
      cutoff='midpoint',
    )
  )
  solved = []
  for i in range(shards):
    part = slice(i * size, (i + 1) * size)
    if not np.any(mask[0, part]):
      continue
    q_E = solve(scores[0, part], state.q, mask_T=mask[0, part])
    q_E -= jnp.mean(q_E)
    solved.append(q_E)
    used = state.q if lag else q_E
    choice = routing.choose(scores[0, part], used, k=K)
    np.testing.assert_array_equal(
      experts[part][mask[0, part]], choice.experts[mask[0, part]]
    )
    if not lag:
      np.testing.assert_allclose(q[i], q_E, atol=1e-7)
  assert len(solved) == shards - 1
  np.testing.assert_allclose(after.q, np.mean(solved, axis=0), atol=1e-6)


@pytest.mark.parametrize(
  'parts',
  [pytest.param(n, marks=pytest.mark.long) for n in (2, 8)] + [4],
)
@rules.each(rules.BY_STEPS)
def test_rules_of_the_step_do_not_depend_on_microbatches(name, parts):
  balancer = rules.RULES[name]
  # Compiled, as a product and a sum may be rounded together where they are.
  observe, update = (
    jax.jit(functools.partial(f, k=K))
    for f in (balancer.observe, balancer.update)
  )
  scores, mask = batches()
  state = balancer.init(EXPERTS)
  for i in range(2):
    total = routing.zero_observation(balancer, EXPERTS, K)
    for part in jnp.split(jnp.arange(TOKENS), parts):
      q, state = balancer.solve(state, scores[i, part], k=K)
      choice = routing.choose(scores[i, part], q, k=K, mask_T=mask[i, part])
      seen = observe(state, q, scores[i, part], choice, mask_T=mask[i, part])
      total = jax.tree.map(jnp.add, total, seen)
    state = update(state, total)
    np.testing.assert_array_equal(state.q, expected(name)[i][0].q)


@pytest.mark.parametrize('count', [2, 8])
def test_sinkhorn_is_nearly_the_same_on_any_devices(count):
  mesh = meshes.make_mesh(count, 1, devices=jax.devices()[:count])
  run = jax.shard_map(
    lambda *batch: two_steps('sinkhorn', *batch, axis_name=meshes.AXES)[1][0],
    mesh=mesh,
    in_specs=P(None, meshes.AXES),
    out_specs=P(),
  )
  np.testing.assert_allclose(
    jax.jit(run)(*batches()).q, expected('sinkhorn')[1][0].q, atol=1e-6
  )


def digest(results):
  """Hashes q, loads and each process's own part of the choices."""
  sha256 = hashlib.sha256()
  for leaf in jax.tree.leaves(results):
    sha256.update(np.ascontiguousarray(leaf).data)
  return sha256.hexdigest()


def run_process() -> None:
  """One of two processes, with four of the eight devices."""
  processes.start()
  mesh = meshes.make_mesh(8, 1)
  sharding = NamedSharding(mesh, P(None, meshes.AXES))
  scores, mask = (
    jax.make_array_from_callback(x.shape, sharding, lambda i, x=x: x[i])
    for x in jax.device_get(batches())
  )
  everywhere = NamedSharding(mesh, P())
  for name in rules.BY_COUNTING:
    run = jax.jit(functools.partial(two_steps, name), out_shardings=everywhere)
    print(name, digest(jax.device_get(run(scores, mask))), flush=True)


@pytest.mark.long
def test_two_processes_compute_the_bits_of_one():
  command = ['-m', 'tests.routing.test_topology']
  for process in several_processes.run(command, command):
    assert process.returncode == 0, process.stderr
    lines = [line.split() for line in process.stdout.splitlines()]
    digests = {line[0]: line[1] for line in lines if len(line) == 2}
    for name in rules.BY_COUNTING:
      assert digests[name] == digest(expected(name)), name


if __name__ == '__main__':
  run_process()
