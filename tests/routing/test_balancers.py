"""Each rule against values worked by hand, and the edge cases of the design."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.parallel import mesh as meshes

# Four tokens, three experts, k = 1. Without q: 0, 0, 1, 0.
SCORES = np.array(
  [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.4, 0.3, 0.3]],
  np.float32,
)


@pytest.fixture(scope='module')
def scores():
  """Softmax scores with a preferred expert, [256, 8]."""
  generator = np.random.default_rng(1)
  logits = generator.normal(size=(256, 8)) + 2 * np.eye(8)[3]
  return jax.nn.softmax(jnp.asarray(logits, jnp.float32))


# choose


def test_choose_by_hand():
  choice = routing.choose(SCORES, jnp.array([0.15, 0.0, 0.0]), k=2)
  # Token 1 ties at 0.35 < 0.4, token 3 turns to experts 1 and 2.
  np.testing.assert_array_equal(
    choice.experts, [[0, 1], [1, 0], [1, 2], [1, 2]]
  )
  np.testing.assert_array_equal(
    choice.gates,
    np.array([[0.6, 0.3], [0.4, 0.5], [0.7, 0.1], [0.3, 0.3]], np.float32),
  )
  np.testing.assert_array_equal(choice.load, [2, 4, 2])
  assert choice.experts.dtype == choice.load.dtype == jnp.int32


def test_ties_go_to_the_lower_index():
  choice = routing.choose(jnp.full((5, 8), 0.125), jnp.zeros(8), k=3)
  np.testing.assert_array_equal(choice.experts, [[0, 1, 2]] * 5)
  scores = jnp.array([[0.0, 0.5, -0.0, 0.5]])
  choice = routing.choose(scores, jnp.zeros(4), k=3)
  np.testing.assert_array_equal(choice.experts, [[1, 3, 0]])


def test_choose_ignores_masked_rows_whatever_they_hold():
  rows = np.concatenate([SCORES, np.full((2, 3), np.nan, np.float32)])
  rows[5] = [np.inf, -np.inf, np.nan]
  rows = rows[[4, 0, 1, 5, 2, 3]]
  mask = jnp.array([False, True, True, False, True, True])
  choice = routing.choose(rows, jnp.zeros(3), k=2, mask_T=mask)
  alone = routing.choose(SCORES, jnp.zeros(3), k=2)
  np.testing.assert_array_equal(choice.load, alone.load)
  np.testing.assert_array_equal(choice.experts[mask], alone.experts)
  np.testing.assert_array_equal(choice.gates[mask], alone.gates)
  np.testing.assert_array_equal(choice.gates[~mask], 0)


def test_gradient_flows_through_gates_only():
  mask = jnp.array([True, True, False, True])

  def weighted(scores, q):
    gates = routing.choose(scores, q, k=1, mask_T=mask).gates
    return jnp.sum(gates[:, 0] * jnp.array([1.0, 2, 4, 8]))

  scores = jnp.asarray(SCORES).at[2].set(jnp.nan)
  for_scores, for_q = jax.grad(weighted, argnums=(0, 1))(
    scores, jnp.array([0.2, 0.0, 0.0])
  )
  np.testing.assert_array_equal(
    for_scores, [[1, 0, 0], [0, 2, 0], [0, 0, 0], [0, 8, 0]]
  )
  np.testing.assert_array_equal(for_q, 0)


@pytest.mark.parametrize('k', [0, 4, -1])
def test_choose_refuses_k(k):
  with pytest.raises(ValueError, match=rf'k={k}\b.*\b3$'):
    routing.choose(SCORES, jnp.zeros(3), k=k)
  with pytest.raises(ValueError, match=rf'k={k}\b.*\b3$'):
    routing.dual_iterations(SCORES, jnp.zeros(3), k=k, iterations=1)


# MaxVio


def test_violations_by_hand():
  load = jnp.array([[8, 4, 4, 0], [4, 4, 4, 4], [0, 0, 0, 0]])
  np.testing.assert_array_equal(routing.max_violation(load), [1, 0, 0])
  np.testing.assert_array_equal(routing.min_violation(load), [-1, 0, 0])


def test_violation_of_a_load_that_leaves_dropped_tokens_out():
  # 20 choices of 4 experts are 5 each; 4 of them were dropped.
  load = jnp.array([6, 5, 3, 2])
  assert routing.max_violation(load, total=20) == pytest.approx(0.2)
  assert routing.min_violation(load, total=20) == pytest.approx(-0.6)


# bip


def test_bip_by_hand():
  """c = floor(4 x 1 / 3) = 1: the second largest of each column."""
  # p: second largest of each row, 0.3, 0.4, 0.2, 0.3; s - p =
  #   0.3 0.0 -.2 | 0.1 0.0 -.3 | 0.0 0.5 -.1 | 0.1 0.0 0.0
  q = routing.dual_iterations(SCORES, jnp.zeros(3), k=1, iterations=1)
  np.testing.assert_allclose(q, [0.1, 0.0, 0.0], atol=1e-7)
  # The third column's second largest is -0.1; no clip keeps it.
  q = routing.dual_iterations(
    SCORES, jnp.zeros(3), k=1, iterations=1, clip=False
  )
  np.testing.assert_allclose(q, [0.1, 0.0, -0.1], atol=1e-7)
  # Midpoints: p = 0.45, 0.45, 0.45, 0.35; s - p =
  #   .15 -.15 -.35 | .05 -.05 -.35 | -.25 .25 -.35 | .05 -.05 -.05
  q = routing.dual_iterations(
    SCORES, jnp.zeros(3), k=1, iterations=1, clip=False, cutoff='midpoint'
  )
  np.testing.assert_allclose(q, [0.1, 0.1, -0.2], atol=1e-7)


def test_bip_goes_on_from_batch_to_batch(scores):
  balancer = routing.bip(3)
  state, q = balancer.init(8), jnp.zeros(8)
  np.testing.assert_array_equal(state.q, q)
  for batch in (scores, scores[::-1] ** 1.5, scores * 0.5):
    q_of_choice, state = balancer.solve(state, batch, k=2)
    q = routing.dual_iterations(batch, q, k=2, iterations=3)
    np.testing.assert_array_equal(q_of_choice, q)
    np.testing.assert_array_equal(state.q, q)
    choice = routing.choose(batch, q, k=2)
    seen = balancer.observe(state, q, batch, choice, k=2)
    state = balancer.update(state, seen, k=2)
    np.testing.assert_array_equal(state.q, q)
  assert np.any(q != 0)


def test_more_iterations_balance_better(scores):
  def violation(iterations):
    q = routing.dual_iterations(
      scores, jnp.zeros(8), k=2, iterations=iterations
    )
    return routing.max_violation(routing.choose(scores, q, k=2).load)

  assert violation(0) > 1.5
  assert violation(16) < 0.25


@pytest.mark.parametrize('cutoff', ['next', 'midpoint'])
def test_unclipped_q_is_centred_once_after_the_iterations(scores, cutoff):
  balancer = routing.bip(2, clip=False, cutoff=cutoff)
  start = jnp.linspace(-1, 1, 8)
  q, state = balancer.solve(routing.State(start), scores, k=2)
  uncentred = routing.dual_iterations(
    scores, start, k=2, iterations=2, clip=False, cutoff=cutoff
  )
  assert abs(np.mean(uncentred)) > 1e-3
  np.testing.assert_array_equal(q, uncentred - jnp.mean(uncentred))
  np.testing.assert_array_equal(state.q, q)


def test_masked_tokens_do_not_move_q(scores):
  """As if they were not there; the capacity counts valid tokens only."""
  mask = jnp.arange(256) % 3 != 1
  spoilt = jnp.where(mask[:, None], scores, jnp.nan)
  solve = functools.partial(routing.dual_iterations, k=2, iterations=4)
  q = solve(spoilt, jnp.zeros(8), mask_T=mask)
  np.testing.assert_array_equal(q, solve(scores[mask], jnp.zeros(8)))


def test_dual_iterations_have_no_gradient(scores):
  def total(scores, q):
    return jnp.sum(routing.dual_iterations(scores, q, k=2, iterations=1))

  for gradient in jax.grad(total, argnums=(0, 1))(scores, jnp.zeros(8)):
    np.testing.assert_array_equal(gradient, 0)


# Edge cases

RULES = pytest.mark.parametrize(
  'options',
  [{}, {'clip': False}, {'clip': False, 'cutoff': 'midpoint'}],
  ids=['bip', 'quantile', 'midpoint'],
)
START = jnp.array([0.25, 0.0, 0.5])


@RULES
def test_all_experts_leave_q(options):
  q = routing.dual_iterations(SCORES, START, k=3, iterations=4, **options)
  np.testing.assert_array_equal(q, START)
  assert np.all(routing.choose(SCORES, q, k=3).load == 4)


@RULES
def test_fewer_choices_than_experts_leave_q(options):
  q = routing.dual_iterations(SCORES[:2], START, k=1, iterations=4, **options)
  np.testing.assert_array_equal(q, START)


@RULES
def test_no_valid_token_leaves_q(options):
  solve = functools.partial(routing.dual_iterations, k=1, iterations=4)
  nothing = jnp.zeros(4, bool)
  for scores in (SCORES, np.full_like(SCORES, np.nan)):
    q = solve(scores, START, mask_T=nothing, **options)
    np.testing.assert_array_equal(q, START)
  assert np.all(routing.choose(SCORES, START, k=1, mask_T=nothing).load == 0)


def test_capacity_is_rounded_down():
  """n k / m = 5 / 3: the second largest of each column, as for n = 3."""
  scores = jnp.array([[0.8, 0.1, 0.1]] * 2 + [[0.6, 0.2, 0.2]] * 3)
  q = routing.dual_iterations(scores, jnp.zeros(3), k=1, iterations=1)
  # s - p of the first column: 0.7, 0.7, 0.4, 0.4, 0.4.
  np.testing.assert_allclose(q, [0.7, 0, 0], atol=1e-7)
  q = routing.dual_iterations(
    jnp.concatenate([scores, scores[:1] * 0 + 1 / 3]),
    jnp.zeros(3),
    k=1,
    iterations=1,
  )
  # One token more: n k / m = 2, the third largest.
  np.testing.assert_allclose(q, [0.4, 0, 0], atol=1e-7)


@RULES
def test_equal_scores_give_equal_prices(options):
  scores = jnp.full((12, 4), 0.25)
  q = routing.dual_iterations(
    scores, jnp.zeros(4), k=2, iterations=4, **options
  )
  np.testing.assert_array_equal(q, np.zeros(4))
  # No price can part equals; that takes rounding.
  assert routing.max_violation(routing.choose(scores, q, k=2).load) == 1


@RULES
def test_minus_infinity_makes_no_nan(scores, options):
  """Some scores of some tokens; k + 1 = 3 finite ones are left to each."""
  hidden = (jnp.arange(256)[:, None] + jnp.arange(8)) % 8 < 5
  hidden &= jnp.arange(256)[:, None] % 2 == 0
  solve = functools.partial(
    routing.dual_iterations, q_E=jnp.zeros(8), k=2, iterations=4, **options
  )
  scattered = jnp.where(hidden, -jnp.inf, scores)
  q = solve(scattered)
  assert np.all(np.isfinite(q))
  choice = routing.choose(scattered, q, k=2)
  assert np.all(np.isfinite(choice.gates))
  # An expert that nobody can choose, and a token without a choice.
  for index in (np.s_[:, 5], np.s_[7, 1:]):
    q = solve(scores.at[index].set(-jnp.inf))
    assert np.all(np.isfinite(np.delete(q, 5)))
    assert not np.isnan(q[5])


@RULES
@pytest.mark.parametrize('iterations', [1, 2])
def test_scores_computed_in_the_same_program_change_no_bit(options, iterations):
  """A compiler that rounds s - q otherwise here than there breaks ties."""

  def route(scores):
    q = routing.dual_iterations(
      scores, jnp.linspace(0, 0.1, 8), k=2, iterations=iterations, **options
    )
    return q, routing.choose(scores, q, k=2)

  @jax.jit
  def whole(x):
    scores = jax.nn.softmax(x)
    return scores, route(scores)

  x = np.random.default_rng(4).normal(size=(2048, 8)).astype(np.float32) / 2
  scores, routed = whole(x)
  jax.tree.map(np.testing.assert_array_equal, routed, jax.jit(route)(scores))


def test_nan_scores_are_chosen_last():
  scores = jnp.array([[0.5, jnp.nan, 0.1], [jnp.nan, 0.2, jnp.nan]])
  choice = routing.choose(scores, jnp.zeros(3), k=2)
  np.testing.assert_array_equal(choice.experts, [[0, 2], [1, 0]])


@RULES
def test_bfloat16_scores_are_routed_in_float32(scores, options):
  scores = scores.astype(jnp.bfloat16)
  start = jnp.linspace(0, 0.01, 8)  # Lost in the rounding of bfloat16.

  def route(scores):
    q = routing.dual_iterations(scores, start, k=2, iterations=2, **options)
    return q, routing.choose(scores, q, k=2)

  q, choice = route(scores)
  assert q.dtype == choice.gates.dtype == jnp.float32
  jax.tree.map(
    np.testing.assert_array_equal,
    (q, choice),
    route(scores.astype(jnp.float32)),
  )


# loss_free


def test_loss_free_by_hand():
  balancer = routing.loss_free(0.25)
  choice = routing.choose(SCORES, jnp.zeros(3), k=1)
  np.testing.assert_array_equal(choice.load, [3, 1, 0])
  state = balancer.init(3)
  q, solved = balancer.solve(state, SCORES, k=1)
  np.testing.assert_array_equal((q, solved.q), np.zeros((2, 3)))
  seen = balancer.observe(state, q, SCORES, choice, k=1)
  # Mean load 4/3: above, below, below.
  state = balancer.update(state, seen, k=1)
  np.testing.assert_array_equal(state.q, [0.25, -0.25, -0.25])
  state = balancer.update(state, jnp.array([0, 6, 3]), k=1)
  np.testing.assert_array_equal(state.q, [0.0, 0.0, -0.25])


@pytest.mark.long
def test_loss_free_moves_once_a_step_from_summed_loads(scores):
  balancer = routing.loss_free(1e-2)

  def step(state, microbatches):
    seen = routing.zero_observation(balancer, 8, 2)
    for batch in microbatches:
      q, state = balancer.solve(state, batch, k=2)
      choice = routing.choose(batch, q, k=2)
      seen += balancer.observe(state, q, batch, choice, k=2)
    return balancer.update(state, seen, k=2)

  # A split into microbatches with unlike loads.
  order = jnp.argsort(scores[:, 3])
  states = [balancer.init(8)] * 2
  for _ in range(3):
    states = [
      step(states[0], [scores]),
      step(states[1], [scores[order[:32]], scores[order[32:]]]),
    ]
  np.testing.assert_array_equal(states[0].q, states[1].q)
  assert states[0].q[3] == pytest.approx(3e-2)


def test_loss_free_takes_the_sign_of_any_load():
  """Loads whose product with the number of experts is beyond int32."""
  load = jnp.full(64, 2**24).at[5].set(2**26)
  state = routing.loss_free(1.0).update(routing.State(jnp.zeros(64)), load, k=1)
  np.testing.assert_array_equal(state.q, 2 * np.eye(64)[5] - 1)
  # One token more or less than even is enough; even itself stays.
  load = jnp.full(64, 2**24).at[:2].add(jnp.array([1, -1]))
  state = routing.loss_free(1.0).update(routing.State(jnp.zeros(64)), load, k=1)
  np.testing.assert_array_equal(state.q, np.eye(64)[0] - np.eye(64)[1])


# loss_controlled

# Two sequences of three tokens, three experts, k = 1.
BATCH = jnp.array(
  [
    [[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.25, 0.75, 0.0]],
    [[0.0, 0.25, 0.75], [0.25, 0.0, 0.75], [0.25, 0.25, 0.5]],
  ]
)
EXPERTS = jnp.array([[[0], [0], [1]], [[2], [2], [2]]])


def test_auxiliary_loss_by_hand():
  # Sequence 0: f = (2, 1, 0), P = (1.25, 1.5, 0.25) / 3; sum f P = 4 / 3.
  # Sequence 1: f = (0, 0, 3), P = (.5, .5, 2) / 3; sum f P = 2.
  loss = routing.auxiliary_loss(BATCH, EXPERTS, over='sequence')
  assert loss == pytest.approx((4 / 3 + 2) / 2)
  # Together: f = (1, 0.5, 1.5), P = (1.75, 2, 2.25) / 6; sum f P = 6.125 / 6.
  loss = routing.auxiliary_loss(BATCH, EXPERTS, over='batch')
  assert loss == pytest.approx(6.125 / 6)
  balancer = routing.loss_controlled(0.5, over='batch')
  choice = routing.choose(BATCH.reshape(6, 3), jnp.zeros(3), k=1)
  np.testing.assert_array_equal(choice.experts.reshape(EXPERTS.shape), EXPERTS)
  assert balancer.loss(BATCH, choice, k=1) == pytest.approx(6.125 / 12)


@pytest.mark.parametrize('over', ['sequence', 'batch'])
def test_auxiliary_loss_with_a_mask_is_that_of_the_tokens_left(over):
  generator = np.random.default_rng(2)
  scores = jax.nn.softmax(jnp.asarray(generator.normal(size=(3, 5, 4))))
  _, experts = jax.lax.top_k(scores, 2)
  keep = [0, 3, 4]
  # The same places in the first two sequences; nothing of the third.
  mask = jnp.zeros((3, 5), bool).at[:2, jnp.array(keep)].set(True)
  masked = routing.auxiliary_loss(
    jnp.where(mask[..., None], scores, jnp.nan),
    experts,
    over=over,
    mask_BxS=mask,
  )
  left = routing.auxiliary_loss(scores[:2, keep], experts[:2, keep], over=over)
  np.testing.assert_allclose(masked, left, rtol=1e-6)
  assert abs(left - 1) > 1e-3
  nothing = routing.auxiliary_loss(
    scores, experts, over=over, mask_BxS=mask & False
  )
  assert nothing == 0


@pytest.mark.parametrize('over', ['sequence', 'batch'])
def test_auxiliary_loss_is_one_at_balance(over):
  """Every expert is chosen equally often, whatever the scores are."""
  scores = jax.nn.softmax(
    jnp.asarray(np.random.default_rng(3).normal(size=(2, 8, 4)))
  )
  experts = jnp.stack([jnp.arange(8) % 4, (jnp.arange(8) + 1) % 4], axis=-1)
  experts = jnp.broadcast_to(experts, (2, 8, 2))
  loss = routing.auxiliary_loss(scores, experts, over=over)
  np.testing.assert_allclose(loss, 1, rtol=1e-6)


def test_auxiliary_loss_has_a_gradient_through_scores_only():
  """d/ds of sum_j f_j P_j is f_j / n, counts being constants."""
  balancer = routing.loss_controlled(1.0, over='batch')

  def loss(scores):
    choice = routing.choose(scores.reshape(6, 3), jnp.zeros(3), k=1)
    return balancer.loss(scores, choice, k=1)

  f = np.array([1, 0.5, 1.5])
  np.testing.assert_allclose(
    jax.grad(loss)(BATCH), np.broadcast_to(f / 6, BATCH.shape), rtol=1e-6
  )


def test_auxiliary_loss_over_shards_is_that_of_the_batch():
  mesh = meshes.make_mesh(devices=jax.devices()[:2])
  mask = jnp.array([[True, True, False], [True, True, True]])
  for over in ('sequence', 'batch'):
    loss = functools.partial(routing.auxiliary_loss, over=over)
    sharded = jax.shard_map(
      lambda s, e, m, loss=loss: loss(s, e, mask_BxS=m, axis_name=meshes.AXES),
      mesh=mesh,
      in_specs=P(meshes.AXES),
      out_specs=P(),
    )
    np.testing.assert_allclose(
      jax.jit(sharded)(BATCH, EXPERTS, mask),
      loss(BATCH, EXPERTS, mask_BxS=mask),
      rtol=1e-6,
    )


# The protocol


@pytest.mark.parametrize(
  ('build', 'words'),
  [
    (lambda: routing.bip(-1), ['iterations=-1', '0 or more']),
    (lambda: routing.bip(cutoff='mid'), ["cutoff='mid'", 'next', 'midpoint']),
    (lambda: routing.loss_free(-0.5), ['rate=-0.5', '0 or more']),
    (lambda: routing.loss_controlled(-1.0), ['alpha=-1.0', '0 or more']),
    (
      lambda: routing.loss_controlled(over='token'),
      ["over='token'", 'sequence', 'batch'],
    ),
    (
      lambda: routing.auxiliary_loss(BATCH, EXPERTS, over='token'),
      ["over='token'", 'sequence', 'batch'],
    ),
    (
      lambda: routing.dual_iterations(
        SCORES, START, k=1, iterations=1, cutoff='mid'
      ),
      ["cutoff='mid'", 'next', 'midpoint'],
    ),
  ],
)
def test_errors_name_option_value_and_what_would_work(build, words):
  with pytest.raises(ValueError) as error:
    build()
  assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
  'balancer',
  [
    routing.unbalanced(),
    routing.bip(2),
    routing.loss_free(),
    routing.loss_controlled(),
  ],
  ids=['unbalanced', 'bip', 'loss_free', 'loss_controlled'],
)
def test_protocol(balancer, scores):
  """A state with q, observations of one shape that add up, a scalar loss."""
  state = balancer.init(8)
  assert state.q.shape == (8,) and state.q.dtype == jnp.float32
  q, solved = balancer.solve(state, scores, k=2)
  choice = routing.choose(scores, q, k=2)
  seen = balancer.observe(solved, q, scores, choice, k=2)
  nothing = routing.zero_observation(balancer, 8, 2)
  total = jax.tree.map(jnp.add, nothing, seen)
  jax.tree.map(np.testing.assert_array_equal, total, seen)
  moved = balancer.update(solved, total, k=2)
  for new in (solved, moved):
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert new.q.dtype == jnp.float32
  loss = balancer.loss(scores.reshape(4, 64, 8), choice, k=2)
  assert loss.shape == () and loss.dtype == jnp.float32


def test_unbalanced_is_plain_top_k(scores):
  balancer = routing.unbalanced()
  q, state = balancer.solve(balancer.init(8), scores, k=2)
  state = balancer.update(state, (), k=2)
  np.testing.assert_array_equal((q, state.q), np.zeros((2, 8)))
  choice = routing.choose(scores, q, k=2)
  np.testing.assert_array_equal(choice.gates, -np.sort(-scores)[:, :2])
  assert balancer.loss(scores[None], choice, k=2) == 0
