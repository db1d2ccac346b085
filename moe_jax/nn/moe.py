"""The Mixture-of-Experts layer: owns weights and router state."""

import functools
import math
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from moe_jax import routing
from moe_jax.nn import router
from moe_jax.nn.config import MoEConfig
from moe_jax.nn.feed_forward import SwiGLU, linear_init
from moe_jax.nn.router import MoEOutput, StepSoFar
from moe_jax.nn.selections import SELECTIONS
from moe_jax.parallel import dispatch
from moe_jax.parallel import mesh as meshes


class RouterState(nnx.Variable):
  """Mutable state of a router: float32, never differentiated or optimised."""


class MoE(nnx.Module):
  """Routes each token to K of E SwiGLU experts and mixes what they return.

  With `train=True` a call lets the balancer solve for q on the tokens at hand,
  keeps the solved state and adds to the step's observation; `update_router`, or
  `nn.update_routers` of a whole model, applies that once a step. With
  `train=False` the balancer's `price` is the q, and there is neither capacity
  nor rounding. Nor is there with `train=True` once a model was told so by
  `model.set_attributes(dropless=True)`. In either case, a layer on a mesh that
  has a capacity or rounding has no gradient.

  Args:
    config: sizes and options.
    balancer: the rule for q, from `moe_jax.routing`.
    select: `(priced_TxE, q_E, config, mask_T) -> Choice`, a selection of one's
      own; by default that of `config.selection`.
    capacity_factor: room of each expert in training, in units of its even
      share; what does not fit is dropped. 0 is dropless; evaluation always is.
    mesh: the batch is split over two of its axes, the experts over the second
      of these. None computes wherever the arrays are, without expert
      parallelism.
    axes: names of these two axes.
    fsdp: whether weights are split over `data` as well; needs `mesh`.
    rngs: for the initial weights.

  Raises:
    ValueError: the capacity is impossible, the mesh does not suit, or the
      balancer's state has no price for each expert.
  """

  def __init__(
    self,
    config: MoEConfig,
    balancer: routing.Balancer,
    *,
    select: router.Select | None = None,
    capacity_factor: float = 0.0,
    mesh: Mesh | None = None,
    axes: tuple[str, str] = meshes.AXES,
    fsdp: bool = False,
    rngs: nnx.Rngs,
  ):
    axes = meshes.Axes(*axes)
    config.check_capacity_factor(capacity_factor)
    _check_mesh(config, balancer, mesh, axes, fsdp)
    _check_balancer(config, balancer)
    self.config, self.balancer = config, balancer
    self.select = select or SELECTIONS[config.selection]
    self.capacity_factor, self.fsdp = capacity_factor, fsdp
    self.mesh, self.axes = mesh, axes
    self.dropless = False
    width, hidden, experts = config.width, config.hidden, config.experts
    # The router is tiny and decides discretely: all of it is float32.
    self.router = nnx.Param(linear_init()(rngs.params(), (width, experts)))

    def expert_weights(inputs, outputs):
      shape = (experts, inputs, outputs)
      return nnx.Param(linear_init(batch_axis=0)(rngs.params(), shape))

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
    self.so_far = RouterState(
      StepSoFar(jnp.zeros(experts, jnp.int32), jnp.int32(0))
    )

  def __call__(
    self,
    x_BxSxD: jax.Array,
    mask_BxS: jax.Array | None = None,
    experts_BxSxK: jax.Array | None = None,
    *,
    train: bool,
  ) -> tuple[jax.Array, MoEOutput]:
    """Applies the layer.

    Args:
      x_BxSxD: tokens, any float dtype.
      mask_BxS: bool; False for padding, which is routed nowhere.
      experts_BxSxK: int32, experts to take instead of choosing (replay), as
        `output.choice.experts` had them; below 0 for slots that are not used.
        The balancer goes on as if it had chosen them.
      train: whether q may move.

    Returns:
      [B, S, D] of the input's dtype, and what the router did.

    Raises:
      ValueError: shapes or dtypes are not these, there are no tokens, the batch
        does not divide over the mesh or, in training, into the shards; or a
        step has several microbatches under a balancer whose observations do not
        add up. In compiled code the outputs of such a step are NaN instead.
    """
    self._check_inputs(x_BxSxD, mask_BxS, experts_BxSxK)
    so_far = self.so_far.get_value()
    known = not isinstance(so_far.calls, jax.core.Tracer)
    if train and known and not self.balancer.additive and so_far.calls > 0:
      raise ValueError(
        'accumulation=2 or more: what this balancer observes does not add up '
        'over microbatches; call update_router() after each, or take a rule '
        "that does, such as quantile(estimator='histogram')"
      )
    if mask_BxS is not None:
      x_BxSxD = jnp.where(mask_BxS[..., None], x_BxSxD, 0)
    weights = dispatch.ExpertWeights(
      *(weight[...] for weight in (self.gate, self.up, self.down))
    )
    state = self.state.get_value()
    tokens = x_BxSxD, mask_BxS, experts_BxSxK
    y_BxSxD, output, moved = self._on_mesh(train, x_BxSxD.shape)(
      self.router[...], weights, state, so_far, *tokens
    )
    if train:
      self.state.set_value(moved.state)
      self.observation.set_value(
        jax.tree.map(jnp.add, self.observation.get_value(), moved.observation)
      )
      load_E = output.sums.get('unrounded_load', output.sums['load'])
      self.so_far.set_value(StepSoFar(so_far.load + load_E, so_far.calls + 1))
    if self.shared is not None:
      # Independent of the exchange: a compiler can overlap the two.
      y_BxSxD += self.shared(x_BxSxD)
    return y_BxSxD.astype(x_BxSxD.dtype), output

  def update_router(self) -> None:
    """Moves the router by the step's observations and forgets them.

    Raises:
      ValueError: the layer is a stack of several, see `nn.update_routers`.
    """
    if self.router.ndim != 2:
      raise ValueError(
        f'update_router: the router has shape {self.router.shape}, a stack of '
        'layers; nn.update_routers(model) moves each by itself'
      )
    update_routers(self)

  def _check_inputs(self, x_BxSxD, mask_BxS, experts_BxSxK) -> None:
    width = self.config.width
    if x_BxSxD.ndim != 3 or x_BxSxD.shape[-1] != width:
      raise ValueError(
        f'x_BxSxD: shape {x_BxSxD.shape} must be (batch, sequence, {width}); '
        'x[None] makes one sequence of a row of tokens'
      )
    shape = x_BxSxD.shape[:2]
    if not math.prod(shape):
      raise ValueError(
        f'x_BxSxD: shape {x_BxSxD.shape} has no tokens; B and S must be 1 or '
        'more'
      )
    if mask_BxS is not None and (
      mask_BxS.dtype != bool or mask_BxS.shape != shape
    ):
      raise ValueError(
        f'mask_BxS: {mask_BxS.dtype}{list(mask_BxS.shape)} must be '
        f'bool{list(shape)}, False for padding'
      )
    if experts_BxSxK is not None and (
      experts_BxSxK.ndim != 3
      or experts_BxSxK.shape[:2] != shape
      or not jnp.issubdtype(experts_BxSxK.dtype, jnp.integer)
    ):
      raise ValueError(
        f'experts_BxSxK: {experts_BxSxK.dtype}{list(experts_BxSxK.shape)} must '
        f'be integers [{shape[0]}, {shape[1]}, K]'
      )

  def _on_mesh(self, train, shape_BxSxD):
    """Returns `_apply` for arrays of all devices, or of one, where the caller
    is inside a `jax.shard_map` over the mesh.
    """
    devices = _devices(self.mesh, self.axes)
    shards = (self.config.shards if train else 0) or devices
    batch, sequence, _ = shape_BxSxD
    manual = jax.sharding.get_abstract_mesh().manual_axes
    inside = set(self.axes) <= set(manual)  # A shard_map of the caller's.
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
        meshes.expert_spec(
          weight.shape, self.mesh, fsdp=self.fsdp, axes=self.axes
        )
        for weight in (self.gate, self.up, self.down)
      )
    )
    apply = functools.partial(apply, specs=specs)
    if inside:
      return apply
    split, same = P(self.axes), P()
    choice = routing.Choice(experts=split, gates=split, load=same, active=split)
    output = MoEOutput(same, split, choice, sums=same, most=same)
    return jax.shard_map(
      apply,
      mesh=self.mesh,
      in_specs=(same, specs, same, same, split, split, split),
      out_specs=(split, output, same),
    )

  def _apply(
    self,
    router_DxE: jax.Array,
    weights: dispatch.ExpertWeights,
    state: Any,
    so_far: StepSoFar,
    x_BxSxD: jax.Array,
    mask_BxS: jax.Array | None,
    experts_BxSxK: jax.Array | None,
    *,
    train: bool,
    groups: int,
    specs: dispatch.ExpertWeights | None = None,
  ):
    """Routes and mixes the tokens of one device, of all without `specs`.

    Returns y, the `MoEOutput` over all devices and how the router moved, see
    `router.route`.
    """
    axes = None if specs is None else self.axes
    rounding = self.config.round_to_capacity and train and not self.dropless
    with jax.named_scope('router'):
      output, moved = router.route(
        x_BxSxD,
        router_DxE,
        state,
        so_far,
        self.balancer,
        self.select,
        self.config,
        train=train,
        rounding=rounding,
        mask_BxS=mask_BxS,
        experts_BxSxK=experts_BxSxK,
        groups=groups,
        axis_name=axes,
      )
    dtype = jnp.dtype(self.config.dtype)
    mixed = self._mix(
      x_BxSxD.reshape(-1, self.config.width).astype(dtype),
      output.choice,
      self._for_use(weights, specs),
      train=train,
      groups=groups,
      mask_T=None if mask_BxS is None else mask_BxS.reshape(-1),
      even=rounding and mask_BxS is None and experts_BxSxK is None,
      on_mesh=specs is not None,
    )
    output = self._over_devices(output, mixed.dropped, axes)
    return mixed.y.reshape(x_BxSxD.shape), output, moved

  def _over_devices(self, output: MoEOutput, dropped, axes) -> MoEOutput:
    """Adds up what the devices counted."""
    sums = output.sums | {'dropped': dropped}
    most = output.most | {'device_load': jnp.float32(1.0)}
    if axes is not None:
      # Rows are exchanged among the devices of one `expert` axis.
      row_E = lax.psum(sums['load'], axes.expert)
      sums = lax.psum(sums, axes)
      devices = lax.axis_size(axes.expert)
      device_P = jnp.sum(row_E.reshape(devices, -1), axis=1)
      mean = jnp.sum(sums['load']) / lax.axis_size(axes)
      device_load = jnp.max(device_P) / jnp.maximum(mean, 1.0)
      # The same in all devices of that axis, which pmax must be told.
      device_load = lax.pcast(device_load, axes.expert, to='varying')
      most = lax.pmax(most | {'device_load': device_load}, axes)
    choice = output.choice._replace(load=sums['load'])
    return output._replace(choice=choice, sums=sums, most=most)

  def _for_use(self, weights, specs) -> dispatch.ExpertWeights:
    """Casts the experts' weights; on a mesh, gathers those of this device."""
    dtype = jnp.dtype(self.config.dtype)
    if specs is None:
      return jax.tree.map(lambda weight: weight.astype(dtype), weights)
    return jax.tree.map(
      lambda weight, spec: meshes.gather_experts(
        weight, spec, dtype, self.axes.data
      ),
      weights,
      specs,
    )

  def _mix(
    self, x_TxD, choice, weights, *, train, groups, mask_T, even, on_mesh
  ):
    config, factor = self.config, self.capacity_factor
    if config.round_to_capacity:
      factor = max(factor, 1.0)  # Rounded loads fit exactly.
    tokens = len(x_TxD) // groups
    share = tokens * config.experts_per_token / config.experts
    room = min(math.ceil(factor * share), tokens)
    arguments = x_TxD, choice, weights, mask_T
    axis_name = self.axes.expert if on_mesh else None
    if room and train and not self.dropless:
      return dispatch.capacity(
        *arguments,
        capacity=room,
        groups=groups,
        full=even
        and room * config.experts == tokens * config.experts_per_token,
        axis_name=axis_name,
      )
    if room and on_mesh:  # Dropless, in the buffers that training has.
      return dispatch.in_rounds(
        *arguments, capacity=room * groups, axis_names=self.axes
      )
    return dispatch.grouped(*arguments, axis_name=axis_name)


def update_routers(model: nnx.Module) -> None:
  """Moves every MoE layer's router by what it observed, once a step.

  Finds the layers wherever they are in a model. Layers that are stacked along
  leading axes, as by `nnx.vmap`, move each by itself.

  Raises:
    ValueError: layers are stacked along axes that are not the leading ones.
  """
  for _, module in nnx.iter_modules(model):
    if isinstance(module, MoE):
      _update_router(module)


def _update_router(moe: MoE) -> None:
  config, state = moe.config, moe.state.get_value()
  stack = moe.router.shape[:-2]
  if moe.router.shape != (
    *stack,
    config.width,
    config.experts,
  ) or state.q.shape != (*stack, config.experts):
    raise ValueError(
      f'update_routers: router {moe.router.shape} and prices {state.q.shape} '
      f'must end in ({config.width}, {config.experts}) and '
      f'({config.experts},); stack layers along leading axes, as nnx.vmap does '
      'with in_axes=0, out_axes=0'
    )
  update = functools.partial(moe.balancer.update, k=config.experts_per_token)
  for _ in stack:
    update = jax.vmap(update)
  observation = moe.observation.get_value()
  moe.state.set_value(update(state, observation))
  for variable in (moe.observation, moe.so_far):
    variable.set_value(jax.tree.map(jnp.zeros_like, variable.get_value()))


def _devices(mesh: Mesh | None, axes: meshes.Axes) -> int:
  """Counts the parts into which a batch is split."""
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)


def _check_balancer(config: MoEConfig, balancer: routing.Balancer) -> None:
  """Raises ValueError where a rule and the layer do not go together."""
  q_E = getattr(
    jax.eval_shape(lambda: balancer.init(config.experts)), 'q', None
  )
  if q_E is None or (q_E.shape, q_E.dtype) != ((config.experts,), jnp.float32):
    found = None if q_E is None else f'{q_E.dtype}{list(q_E.shape)}'
    raise ValueError(
      f'balancer: the state of init(experts={config.experts}) has q={found}; '
      f'it must be float32[{config.experts}], the price of each expert'
    )
  in_bounds = config.scoring in ('softmax', 'sigmoid')
  if balancer.bounded_scores and (config.priced == 'logits' or not in_bounds):
    raise ValueError(
      f'model.scoring={config.scoring}, model.priced={config.priced}: this '
      'balancer takes scores in [0, 1]; softmax or sigmoid, priced by scores'
    )


def _check_mesh(config, balancer, mesh, axes, fsdp) -> None:
  """Raises ValueError where weights or prices cannot be on the mesh."""
  if mesh is None:
    if fsdp:
      raise ValueError('fsdp=True: needs a mesh over which to split weights')
    return
  if missing := set(axes) - set(mesh.axis_names):
    raise ValueError(
      f'mesh: has axes {mesh.axis_names}, but not {sorted(missing)}; name '
      "those of batch and experts, as in axes=('dp', 'ep'), or see "
      'moe_jax.parallel.mesh.make_mesh'
    )
  if set(mesh.axis_types) != {AxisType.Auto}:
    raise ValueError(
      f'mesh: has axis types {mesh.axis_types}; all must be Auto, as in '
      'jax.make_mesh(..., axis_types=(AxisType.Auto,) * n)'
    )
  devices, expert = _devices(mesh, axes), mesh.shape[axes.expert]
  if config.experts % expert:
    fits = meshes.expert_sizes(config.experts, mesh)
    raise ValueError(
      f'experts={config.experts}: cannot be split over the {expert} devices of '
      f'mesh axis {axes.expert}; {", ".join(map(str, fits))} would do'
    )
  fixed = balancer.per_shard and devices > 1
  if fixed and config.shards not in (0, devices):
    raise ValueError(
      f'shards={config.shards}: must be 0 or {devices}, the number of '
      'devices, where each shard has prices of its own'
    )
