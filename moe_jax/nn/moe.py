"""The Mixture-of-Experts layer: owns weights and router state."""

import functools
import math
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax import routing
from moe_jax.nn import router
from moe_jax.nn.config import MoEConfig
from moe_jax.nn.feed_forward import SwiGLU, linear_init
from moe_jax.nn.router import MoEOutput
from moe_jax.parallel import dispatch
from moe_jax.parallel import mesh as meshes


class RouterState(nnx.Variable):
  """Mutable state of a router: float32, never differentiated or optimised."""


class ExpertParam(nnx.Param):
  """A weight [..., E, in, out] with one matrix per expert."""


class MoE(nnx.Module):
  """Routes each token to K of E SwiGLU experts and mixes what they return.

  With `train=True` a call lets the balancer solve for q on the tokens at hand,
  keeps the solved state and adds to the step's observation; `update_router`
  applies that once a step. With `train=False` q is frozen, and there is neither
  capacity nor rounding. Nor is there with `train=True` once a model was told so
  by `model.set_attributes(dropless=True)`. In either case, a layer on a mesh
  that has a capacity or rounding has no gradient.

  Args:
    config: sizes and options.
    balancer: the rule for q, from `moe_jax.routing`.
    capacity_factor: room of each expert in training, in units of its even
      share; what does not fit is dropped. 0 is dropless; evaluation always is.
    mesh: with axes 'data' and 'expert', see `moe_jax.parallel.mesh`. The batch
      is split over both, the experts over the second. None computes wherever
      the arrays are, without expert parallelism.
    fsdp: whether weights are split over `data` as well; needs `mesh`.
    rngs: for the initial weights.

  Raises:
    ValueError: the capacity is impossible, or the mesh does not suit.
  """

  def __init__(
    self,
    config: MoEConfig,
    balancer: routing.Balancer,
    *,
    capacity_factor: float = 0.0,
    mesh: Mesh | None = None,
    fsdp: bool = False,
    rngs: nnx.Rngs,
  ):
    config.check_capacity_factor(capacity_factor)
    _check_mesh(config, balancer, mesh, fsdp)
    self.config, self.balancer = config, balancer
    self.capacity_factor, self.mesh, self.fsdp = capacity_factor, mesh, fsdp
    self.dropless = False
    width, hidden, experts = config.width, config.hidden, config.experts
    # The router is tiny and decides discretely: all of it is float32.
    self.router = nnx.Param(linear_init()(rngs.params(), (width, experts)))

    def expert_weights(inputs, outputs):
      shape = (experts, inputs, outputs)
      return ExpertParam(linear_init(batch_axis=0)(rngs.params(), shape))

    self.gate = expert_weights(width, hidden)
    self.up = expert_weights(width, hidden)
    self.down = expert_weights(hidden, width)
    shared = config.shared_experts * hidden
    self.shared = (
      SwiGLU(width, shared, dtype=config.dtype, rngs=rngs) if shared else None
    )
    self.state = RouterState(balancer.init(experts))
    self.observation = RouterState(
      routing.zero_observation(balancer, experts, config.experts_per_token)
    )

  def __call__(
    self,
    x_BxSxD: jax.Array,
    mask_BxS: jax.Array | None = None,
    *,
    train: bool,
  ) -> tuple[jax.Array, MoEOutput]:
    """Applies the layer.

    Args:
      x_BxSxD: tokens, any float dtype.
      mask_BxS: bool; False for padding, which is routed nowhere.
      train: whether q may move.

    Returns:
      [B, S, D] of the input's dtype, and what the router did.

    Raises:
      ValueError: there are no tokens, or the batch does not divide over the
        mesh or, in training, into the shards.
    """
    if mask_BxS is not None:
      x_BxSxD = jnp.where(mask_BxS[..., None], x_BxSxD, 0)
    weights = dispatch.ExpertWeights(
      *(weight[...] for weight in (self.gate, self.up, self.down))
    )
    y_BxSxD, output, moved = self._on_mesh(train, x_BxSxD.shape)(
      self.router[...], weights, self.state.get_value(), x_BxSxD, mask_BxS
    )
    if train:
      state, seen = moved
      self.state.set_value(state)
      self.observation.set_value(
        jax.tree.map(jnp.add, self.observation.get_value(), seen)
      )
    if self.shared is not None:
      # Independent of the exchange: a compiler can overlap the two.
      y_BxSxD += self.shared(x_BxSxD)
    return y_BxSxD.astype(x_BxSxD.dtype), output

  def update_router(self) -> None:
    """Moves the router by the step's observations and forgets them.

    Layers that are stacked along leading axes move each by itself.
    """
    update = functools.partial(
      self.balancer.update, k=self.config.experts_per_token
    )
    for _ in self.router.shape[:-2]:
      update = jax.vmap(update)
    observation = self.observation.get_value()
    self.state.set_value(update(self.state.get_value(), observation))
    self.observation.set_value(jax.tree.map(jnp.zeros_like, observation))

  def _on_mesh(self, train, shape_BxSxD):
    """Returns `_apply` for arrays of all devices, or of one, where the caller
    is inside a `jax.shard_map` over the mesh.
    """
    devices = 1 if self.mesh is None else self.mesh.size
    shards = (self.config.shards if train else 0) or devices
    batch, sequence, _ = shape_BxSxD
    if not batch * sequence:
      raise ValueError(
        f'x_BxSxD: shape {shape_BxSxD} has no tokens; B and S must be 1 or more'
      )
    manual = jax.sharding.get_abstract_mesh().manual_axes
    inside = set(meshes.AXES) <= set(manual)  # A shard_map of the caller's.
    batch *= devices if inside else 1
    if shards % devices or batch * sequence % shards or batch % devices:
      raise ValueError(
        f'shards={shards}: must divide the {batch * sequence} tokens of a '
        f'batch; {devices} device(s) must divide the shards and the {batch} '
        'sequences'
      )
    apply = functools.partial(
      self._apply, train=train, groups=shards // devices
    )
    if devices == 1:
      return apply
    specs = dispatch.ExpertWeights(
      *(
        meshes.expert_spec(weight.shape, self.mesh, fsdp=self.fsdp)
        for weight in (self.gate, self.up, self.down)
      )
    )
    apply = functools.partial(apply, specs=specs)
    if inside:
      return apply
    split, same = meshes.BATCH, P()
    choice = routing.Choice(experts=split, gates=split, load=same)
    output = MoEOutput(loss=same, scores=split, choice=choice, sums=same)
    return jax.shard_map(
      apply,
      mesh=self.mesh,
      in_specs=(same, specs, same, split, split),
      out_specs=(split, output, same),
    )

  def _apply(
    self,
    router_DxE: jax.Array,
    weights: dispatch.ExpertWeights,
    state: Any,
    x_BxSxD: jax.Array,
    mask_BxS: jax.Array | None,
    *,
    train: bool,
    groups: int,
    specs: dispatch.ExpertWeights | None = None,
  ):
    """Routes and mixes the tokens of one device, of all without `specs`.

    Returns y, the `MoEOutput` over all devices and how the balancer moved, see
    `router.route`.
    """
    axes = None if specs is None else meshes.AXES
    with jax.named_scope('router'):
      output, moved = router.route(
        x_BxSxD,
        router_DxE,
        state,
        self.balancer,
        self.config,
        train=train,
        rounding=self.config.round_to_capacity and train and not self.dropless,
        mask_BxS=mask_BxS,
        groups=groups,
        axis_name=axes,
      )
    dtype = jnp.dtype(self.config.dtype)
    mixed = self._mix(
      x_BxSxD.reshape(-1, self.config.width).astype(dtype),
      output.choice,
      _for_use(weights, specs, dtype),
      train=train,
      groups=groups,
      mask_T=None if mask_BxS is None else mask_BxS.reshape(-1),
      on_mesh=specs is not None,
    )
    sums = output.sums | {'dropped': mixed.dropped}
    if axes is not None:
      sums = lax.psum(sums, axes)
    choice = output.choice._replace(load=sums['load'])
    output = output._replace(choice=choice, sums=sums)
    return mixed.y.reshape(x_BxSxD.shape), output, moved

  def _mix(self, x_TxD, choice, weights, *, train, groups, mask_T, on_mesh):
    config, factor = self.config, self.capacity_factor
    if config.renormalize_gates:
      total = jnp.sum(choice.gates, axis=-1, keepdims=True)
      choice = choice._replace(gates=choice.gates / (total + 1e-20))
    if config.round_to_capacity:
      factor = max(factor, 1.0)  # Rounded loads fit exactly.
    tokens = len(x_TxD) // groups
    share = tokens * config.experts_per_token / config.experts
    room = min(math.ceil(factor * share), tokens)
    arguments = x_TxD, choice, weights, mask_T
    axis_name = meshes.AXES[-1] if on_mesh else None
    if room and train and not self.dropless:
      return dispatch.capacity(
        *arguments, capacity=room, groups=groups, axis_name=axis_name
      )
    if room and on_mesh:  # Dropless, in the buffers that training has.
      return dispatch.in_rounds(
        *arguments, capacity=room * groups, axis_names=meshes.AXES
      )
    return dispatch.grouped(*arguments, axis_name=axis_name)


def _check_mesh(config, balancer, mesh, fsdp) -> None:
  """Raises ValueError where weights or prices cannot be on the mesh."""
  if mesh is None:
    if fsdp:
      raise ValueError('fsdp=True: needs a mesh over which to split weights')
    return
  if missing := set(meshes.AXES) - set(mesh.axis_names):
    raise ValueError(
      f'mesh: has axes {mesh.axis_names}, but not {sorted(missing)}; see '
      'moe_jax.parallel.mesh.make_mesh'
    )
  expert = mesh.shape['expert']
  if config.experts % expert:
    fits = meshes.expert_sizes(config.experts, mesh)
    raise ValueError(
      f'experts={config.experts}: cannot be split over the {expert} devices of '
      f'mesh axis expert; {", ".join(map(str, fits))} would do'
    )
  fixed = balancer.per_shard and mesh.size > 1
  if fixed and config.shards not in (0, mesh.size):
    raise ValueError(
      f'shards={config.shards}: must be 0 or {mesh.size}, the number of '
      'devices, where each shard has prices of its own'
    )


def _for_use(weights, specs, dtype) -> dispatch.ExpertWeights:
  """Casts the experts' weights; on a mesh, gathers those of this device."""
  if specs is None:
    return jax.tree.map(lambda weight: weight.astype(dtype), weights)
  return jax.tree.map(
    lambda weight, spec: meshes.gather_experts(weight, spec, dtype),
    weights,
    specs,
  )
