"""What `launch.check` compares: q, choices, layers, products and attention.

The references are the simplest there are, on the CPU: sorts by NumPy for q and
choices, of which every bit must be the same, and in float64 all experts on all
tokens, a loop over groups, all scores of attention. The error of any other
array is that of its worst row, in the Euclidean norm, over the norm of the
reference's row or the root mean square of all these norms, whichever is
greater. It may be

    roundings x u(dtype) + 4 sqrt(terms) u(float32)

with u the unit roundoff (bfloat16 2^-8, float32 2^-24), the roundings to the
dtype along the longest path to the result, and the terms of the longest sum,
which is of float32. A rounding is off by at most u, as a rule by less than half
of it, and roundings do not know of each other, so errors grow as the square
root of their number: what is right stays well below. Products in TF32 or by one
pass of bfloat16 do not, in float32: that is compared at the highest precision.
Inputs are rounded to the dtype beforehand, so that no cast changes them.

Shape letters: B batch, S sequence, T tokens, D model, F hidden, E experts,
K chosen, N rows.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from moe_jax import nn, routing
from moe_jax.nn.attention import attend
from moe_jax.parallel import grouped_matmul
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel.compilers import compiler_options

WIDTH, HIDDEN, EXPERTS, K = 256, 384, 16, 4
DTYPES = ('float32', 'bfloat16')
# Empty groups, one of a row, some of more than a block of a kernel.
LOADS = np.array([0, 300, 1, 0, 257, 31, 128, 0], np.int32)
# Of attention: several blocks of a kernel, a scale that is no power of two.
_TOKENS, _HEADS, _HEAD = 640, 4, 128
# Balancer; iterations, whether cuts are in the middle, whether prices are
# clipped (else centred); whether the prices before are those of the choice.
RULES = {
  'bip': (routing.bip(), (4, False, True), False),
  'midpoint': (routing.midpoint(2), (2, True, False), False),
  'quantile': (routing.quantile(), (1, False, False), True),
}


class Finding(NamedTuple):
  """An error, what it may be, and in which part of what was compared."""

  error: float
  bound: float
  part: str

  @property
  def passed(self) -> bool:
    return self.error <= self.bound  # A NaN is not.

  def __str__(self) -> str:
    return f'error {self.error:.2g}, at most {self.bound:.2g} ({self.part})'


def comparisons(
  devices: Sequence[jax.Device], cpu: jax.Device
) -> dict[str, Callable[[], Finding]]:
  """Returns all comparisons by name: on one device and on a mesh of all."""
  found = {}
  for part in (devices[:1], devices)[: len(devices)]:
    expert = math.gcd(len(part), EXPERTS)
    # Where there are devices for that, both axes are split.
    expert = expert // 2 if expert > 2 else expert
    mesh = meshes.make_mesh(-1, expert, devices=part)
    where = '1 device' if mesh.size == 1 else f'{mesh.size} devices'
    for rule in RULES:
      name = f'q and choices of {rule}, {where}'
      found[name] = functools.partial(choices, mesh, rule)
    for dtype in DTYPES:
      for kind, factor in (('dropless', 0.0), ('static', EXPERTS / K)):
        name = f'{kind} layer, {dtype}, {where}'
        found[name] = functools.partial(layer, mesh, cpu, dtype, factor)
      for kind in ('', ' in documents'):
        name = f'attention{kind}, {dtype}, {where}'
        found[name] = functools.partial(attention, mesh, cpu, dtype, kind)
  for dtype in DTYPES:
    name = f'grouped products, {dtype}'
    found[name] = functools.partial(products, devices[0], dtype)
  return found


def on_mesh(mesh: Mesh, apply: Callable, out_specs: Any) -> Callable:
  """Maps over tokens as layers do, with `axis_name`; None on one device."""
  if mesh.size == 1:
    return functools.partial(apply, axis_name=None)
  apply = functools.partial(apply, axis_name=meshes.AXES)
  return jax.shard_map(
    apply, mesh=mesh, in_specs=meshes.BATCH, out_specs=out_specs
  )


def choices(mesh: Mesh, name: str) -> Finding:
  """Counts differences of q and choices, from equal scores."""
  balancer, (iterations, middle, clip), lag = RULES[name]
  logits_TxE = np.random.default_rng(0).normal(size=(512 * mesh.size, EXPERTS))
  scores_TxE = np.exp(logits_TxE + np.linspace(0, 2, EXPERTS))
  scores_TxE /= scores_TxE.sum(axis=1, keepdims=True)
  if not clip:  # Few bits, so that means are exact in any order of summation.
    scores_TxE = np.round(scores_TxE * 256) / 256
  scores_TxE = scores_TxE.astype(np.float32)

  def step(scores_TxE, axis_name):
    state, where = balancer.init(EXPERTS), {'k': K, 'axis_name': axis_name}
    q_E, state = balancer.solve(state, scores_TxE, **where)
    choice = routing.choose(scores_TxE, q_E, k=K)
    seen = balancer.observe(state, q_E, scores_TxE, choice, **where)
    return balancer.update(state, seen, k=K).q, choice.experts, choice.gates

  run = on_mesh(mesh, step, (P(), meshes.BATCH, meshes.BATCH))
  split = jax.device_put(scores_TxE, NamedSharding(mesh, meshes.BATCH))
  actual = jax.device_get(jax.jit(run)(split))

  def cut(x, rank):
    before, after = np.sort(x, axis=0)[::-1][rank - 1 : rank + 1]
    price = (before + after) * np.float32(0.5) if middle else after
    return np.maximum(price, 0) if clip else price

  q_E = np.zeros(EXPERTS, np.float32)
  for _ in range(iterations):  # arXiv 2502.15451, Algorithm 1.
    p_T = cut((scores_TxE - q_E).T, K)
    q_E = cut(scores_TxE - p_T[:, None], len(scores_TxE) * K // EXPERTS)
  if not clip:
    q_E -= q_E.mean()
  adjusted_TxE = scores_TxE - (0 if lag else q_E)
  experts_TxK = np.argsort(-adjusted_TxE, axis=1, kind='stable')[:, :K]
  gates_TxK = np.take_along_axis(scores_TxE, experts_TxK, axis=1)
  expected = {'q': q_E, 'experts': experts_TxK, 'gates': gates_TxK}
  wrong = {
    name: np.sum(~(ours == expected[name]))
    for name, ours in zip(expected, actual, strict=True)
  }
  return _worst(wrong, 0)


@functools.cache
def _problem(cpu: jax.Device, dtype: str, sequences: int):
  """Returns a layer's weights, x, mask, dy, and y and gradients in float64."""
  random, shape = np.random.default_rng(0), (sequences, 64, WIDTH)
  sides, scale = (WIDTH, HIDDEN), WIDTH**-0.5
  weights = {
    'router': scale * random.normal(size=(WIDTH, EXPERTS)),
    'gate': scale * random.normal(size=(EXPERTS, *sides)),
    'up': scale * random.normal(size=(EXPERTS, *sides)),
    'down': scale * random.normal(size=(EXPERTS, *sides[::-1])),
  }
  operands = weights, random.normal(size=shape), random.normal(size=shape)
  operands = jax.tree.map(lambda x: _rounded(x, dtype), operands)

  def gates(router, x_BxSxD):
    scores = jax.nn.softmax(x_BxSxD @ router)
    best = lax.top_k(scores, K + 1)[0]
    clear_BxS = best[..., K - 1] - best[..., K] > 1e-5
    chosen = (scores >= best[..., K - 1 : K]) & clear_BxS[..., None]
    scores = jnp.where(chosen, scores, 0)
    return scores / (jnp.sum(scores, -1, keepdims=True) + 1e-20), clear_BxS

  def dense(weights, x_BxSxD):
    gates_BxSxE, clear_BxS = gates(weights['router'], x_BxSxD)
    gate, up = (
      jnp.einsum('bsd,edf->ebsf', x_BxSxD, weights[name])
      for name in ('gate', 'up')
    )
    y = jnp.einsum('ebsf,efd->ebsd', jax.nn.silu(gate) * up, weights['down'])
    return jnp.einsum('ebsd,bse->bsd', y, gates_BxSxE), clear_BxS

  with jax.enable_x64(True), jax.default_device(cpu):
    wide = jax.tree.map(np.float64, operands)
    y, pullback, clear_BxS = jax.vjp(jax.jit(dense), *wide[:2], has_aux=True)
    expected = jax.device_get(_named(y, *pullback(wide[2])))
  # Of two scores that are nearly equal, roundings choose: masked as padding.
  weights, x_BxSxD, dy_BxSxD = operands
  return weights, x_BxSxD, np.asarray(clear_BxS), dy_BxSxD, expected


def layer(
  mesh: Mesh, cpu: jax.Device, dtype: str, capacity_factor: float
) -> Finding:
  """Compares an MoE layer and its gradients."""
  config = nn.MoEConfig(
    width=WIDTH,
    hidden=HIDDEN,
    experts=EXPERTS,
    experts_per_token=K,
    shared_experts=0,
    dtype=dtype,
  )
  # Other rules part experts that they made equal, and roundings choose.
  made = nn.MoE(
    config,
    routing.unbalanced(),
    capacity_factor=capacity_factor,
    mesh=mesh,
    rngs=nnx.Rngs(0),
  )
  graphdef, _, state = nnx.split(made, nnx.Param, nn.RouterState)
  weights, *rows, expected = _problem(cpu, dtype, math.lcm(8, mesh.size))

  def run(weights, x_BxSxD, mask_BxS, dy_BxSxD):
    def apply(weights, x_BxSxD):
      moe = nnx.merge(graphdef, weights, state, copy=True)
      return moe(x_BxSxD, mask_BxS, train=True)[0]

    y_BxSxD, pullback = jax.vjp(apply, weights, x_BxSxD)
    return _named(y_BxSxD, *pullback(dy_BxSxD))

  rows = jax.device_put(rows, NamedSharding(mesh, meshes.BATCH))
  actual = _jit(run, dtype, mesh.devices.flat[0])(weights, *rows)
  # Gate, up, sigmoid, silu, their product, down, gates and y; and back.
  return _compare(actual, expected, dtype, roundings=16, terms=rows[1].size)


def products(device: jax.Device, dtype: str) -> Finding:
  """Compares grouped products and their gradients."""
  random, spare = np.random.default_rng(0), grouped_matmul.TILE
  rows, groups = LOADS.sum() + spare, len(LOADS)
  shapes = ((rows, WIDTH), (groups, WIDTH, HIDDEN), (rows, HIDDEN))
  x_NxD, w_ExDxF, dy_NxF = (
    _rounded(random.normal(size=shape), dtype) for shape in shapes
  )
  x_NxD[-spare:] = dy_NxF[-spare:] = 0
  y, dx, dw = (np.zeros(shapes[i]) for i in (2, 0, 1))
  for group, end in enumerate(np.cumsum(LOADS)):
    part = slice(end - LOADS[group], end)
    x, w, dy = map(np.float64, (x_NxD[part], w_ExDxF[group], dy_NxF[part]))
    y[part], dx[part], dw[group] = x @ w, dy @ w.T, x.T @ dy

  def run(x_NxD, w_ExDxF, dy_NxF, load_E):
    y_NxF, pullback = jax.vjp(
      lambda x, w: grouped_matmul.grouped_matmul(x, w, load_E), x_NxD, w_ExDxF
    )
    dx, dw = pullback(dy_NxF)
    return _named(y_NxF, {'w': dw}, dx)

  operands = [x.astype(jnp.dtype(dtype)) for x in (x_NxD, w_ExDxF, dy_NxF)]
  operands = jax.device_put([*operands, LOADS], device)
  actual = _jit(run, dtype, device)(*operands)
  expected = _named(y, {'w': dw}, dx)
  return _compare(actual, expected, dtype, roundings=1, terms=HIDDEN)


def attention(mesh: Mesh, cpu: jax.Device, dtype: str, kind: str) -> Finding:
  """Compares attention, in two documents if there is a `kind`."""
  random, batch = np.random.default_rng(0), mesh.size
  query, key, value, dy = (
    _rounded(random.normal(size=(batch, _TOKENS, heads, _HEAD)), dtype)
    for heads in (_HEADS, 2, 2, _HEADS)
  )
  positions_S = np.arange(_TOKENS, dtype=np.int32)
  document_S = positions_S >= 100
  if kind:
    positions_S = positions_S - 100 * document_S
  mask_SxS = np.tril(np.ones((_TOKENS, _TOKENS), bool))
  if kind:
    mask_SxS &= document_S[:, None] == document_S

  def dense(query, key, value):
    key, value = (jnp.repeat(x, _HEADS // 2, axis=2) for x in (key, value))
    scores = jnp.einsum('bshw,bchw->bhsc', query, key) * _HEAD**-0.5
    shares = jax.nn.softmax(jnp.where(mask_SxS, scores, -jnp.inf))
    return jnp.einsum('bhsc,bchw->bshw', shares, value)

  def run(query, key, value, positions_BxS, dy):
    def apply(query, key, value):
      return attend(query, key, value, positions_BxS, mesh=mesh)

    y, pullback = jax.vjp(apply, query, key, value)
    dquery, dkey, dvalue = pullback(dy)
    return _named(y, {'key': dkey, 'value': dvalue}, dquery)

  with jax.enable_x64(True), jax.default_device(cpu):
    y, pullback = jax.vjp(jax.jit(dense), *map(np.float64, (query, key, value)))
    dquery, dkey, dvalue = pullback(np.float64(dy))
  expected = _named(y, {'key': dkey, 'value': dvalue}, dquery)
  positions_BxS = np.tile(positions_S, (batch, 1)) if kind else None
  operands = [x.astype(jnp.dtype(dtype)) for x in (query, key, value, dy)]
  operands.insert(3, positions_BxS)
  operands = jax.device_put(operands, NamedSharding(mesh, meshes.BATCH))
  actual = _jit(run, dtype, mesh.devices.flat[0])(*operands)
  # Queries, shares, their gradients, y; and what kernels keep in between.
  return _compare(
    actual, jax.device_get(expected), dtype, roundings=8, terms=_TOKENS
  )


def _named(y, dweights, dx) -> dict[str, Any]:
  return {'y': y, 'dx': dx} | {f'd{name}': dweights[name] for name in dweights}


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
  """Rounds to the dtype; returns float32."""
  return x.astype(jnp.dtype(dtype)).astype(np.float32)


def _jit(run: Callable, dtype: str, device: jax.Device) -> Callable:
  """Compiles as the trainer does, but float32 at the highest precision."""
  options = compiler_options([device])
  compiled = jax.jit(run, compiler_options=options)
  precision = 'highest' if dtype == 'float32' else None
  return jax.default_matmul_precision(precision)(compiled)


def _compare(actual, expected, dtype, *, roundings, terms) -> Finding:
  """Compares y and gradients as the head of this file says."""
  errors = {}
  for name, reference in expected.items():
    norms = np.linalg.norm(reference, axis=-1)
    usual = np.sqrt(np.mean(np.square(norms)))
    difference = np.asarray(actual[name]).astype(np.float64) - reference
    worst = np.linalg.norm(difference, axis=-1) / np.maximum(norms, usual)
    errors[name] = np.max(worst)
  roundoff = float(jnp.finfo(dtype).eps) / 2
  return _worst(errors, roundings * roundoff + 4 * terms**0.5 * 2**-24)


def _worst(errors: dict[str, float], bound: float) -> Finding:
  """Returns the part with the greatest error; a NaN is greater than any."""
  name = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
  return Finding(float(errors[name]), bound, name)
