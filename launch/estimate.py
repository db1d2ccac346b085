"""Estimates the steps of a config on a topology: memory, time, traffic."""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import re
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from launch import ahead, cost, hardware, hlo
from moe_jax import nn
from moe_jax.config import Config
from moe_jax.parallel import mesh as meshes
from moe_jax.train import batches, evaluate
from moe_jax.train import state as state_lib
from moe_jax.train import step as step_lib

# Parts of a step, by the scope in which the model computes them; first wins.
_SCOPES = {
  'router': 'router',
  'experts': 'experts',
  'ragged-dot': 'experts',
  'dispatch': 'dispatch',
  # `jax.nn.dot_product_attention` and splash attention map over sequences;
  # projections do not.
  'attention.*(vmap|dot_product_attention)': 'scores',
  'attention': 'attention',
  'optimizer': 'optimizer',
}
# Asynchronous ones may have lost their scope.
_EXCHANGE = ('all-to-all', 'ragged-all-to-all')

ASSUMPTIONS = (
  'activations: what the forward pass keeps for the backward pass, layer by '
  'layer, split evenly over the devices; temporaries: the rest of what the '
  'compiler allocates, gradients among them',
  'evaluation: a batch of as many sequences as a microbatch, in one round, as '
  "where loads are even; the optimizer's state stays in memory meanwhile",
  'MFU: (6 x parameters used by a token + 6 x layers x sequence x width of all '
  'heads) FLOPs a token, over the peak; recomputation is not useful work',
  'expected step: from all collectives hidden behind computation that the '
  'compiled program does not wait for at once, to none',
  "imbalance: all of the experts' computation grows by it, also what passes "
  'over rooms of fixed size: an upper bound',
  'loops whose length the program does not tell turn once',
  *cost.ASSUMPTIONS,
  *hardware.ASSUMPTIONS,
)


def without_balancing(config: Config) -> Config:
  """Returns the same config with plain top-k routing."""
  return dataclasses.replace(config, balancer={'name': 'unbalanced'})


def estimate(
  config: Config, topology: ahead.Topology, devices: list[Any]
) -> dict[str, Any]:
  """Compiles train and evaluation step and estimates what they cost.

  Returns:
    A JSON-able dict; bytes and seconds are those of one device and one step.
    It `fits` if both do.

  Raises:
    ValueError: the config does not fit the number of devices.
  """
  plan = train_step(config, topology, devices)
  plan['evaluation'] = evaluation_step(config, topology, devices)
  plan['fits'] = all(map(fits, (plan, plan['evaluation'])))
  return plan


def fits(plan: dict[str, Any]) -> bool:
  """Tells whether a step needs no more memory than there is."""
  return plan['memory']['needed'] <= plan['memory']['limit']


def train_step(
  config: Config, topology: ahead.Topology, devices: list[Any]
) -> dict[str, Any]:
  """Compiles the train step and estimates what it costs, as `estimate`."""
  mesh, training, traced = trace(config, devices)
  compiled = ahead.compile_step(traced.lower(), topology)
  params = training.abstract.params
  total, active = nn.parameter_counts(config.model, params)
  result = {
    'mesh': {**mesh.shape, 'fsdp': config.mesh.fsdp},
    'memory': _memory(config, training, traced.jaxpr.jaxpr, mesh, compiled),
    'parameters': {'total': total, 'active': active},
    'flops': {
      'step': cost.flops(traced.jaxpr.jaxpr, mesh.size, _rows(config, mesh)),
      'useful': config.batch_size
      * config.sequence_length
      * nn.useful_flops(config.model, params, config.sequence_length),
    },
  }
  if compiled.text:
    result |= times(config, topology, mesh, hlo.parse(compiled.text))
    peak = mesh.size * topology.hardware.peak
    result['mfu'] = [
      result['flops']['useful'] / (seconds * peak)
      for seconds in reversed(result['step_seconds'])
    ]
  return result


def trace(
  config: Config, devices: list[Any]
) -> tuple[Mesh, state_lib.Training, jax.stages.Traced]:
  """Traces the train step; returns the mesh and the model as well."""
  mesh = state_lib.make_mesh(config, devices)
  training = state_lib.make_training(config, mesh)
  batch = _abstract(config, mesh, config.batch_size)
  step = step_lib.make_train_step(config, training)
  # On one device, jax does not see by the mesh what GPU kernels are made for.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = step.trace(training.abstract, batch)
  return mesh, training, traced


def evaluation_step(
  config: Config, topology: ahead.Topology, devices: list[Any]
) -> dict[str, Any]:
  """Compiles the evaluation of a batch and estimates what it costs."""
  mesh = state_lib.make_mesh(config, devices)
  training = state_lib.make_training(config, mesh)
  rows = config.batch_size // config.accumulation
  batch = _abstract(config, mesh, rows)
  batch = batch._replace(mask=batch.inputs.update(dtype=jnp.bool))
  step = evaluate.make_evaluation_step(
    training, np.ones(config.data.vocabulary, np.int32), config.eval_solved
  )
  state = training.abstract
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = step.lower(state.params, state.router, batch)
  compiled = ahead.compile_step(lowered, topology)
  optimizer = _bytes_of_optimizer(state)
  needed = optimizer + compiled.argument_bytes + compiled.temporary_bytes
  result = {
    'sequences': rows,
    'memory': {
      'optimizer': optimizer,
      'needed': needed,
      'limit': compiled.limit,
    },
  }
  if compiled.text:
    result |= times(config, topology, mesh, hlo.parse(compiled.text))
  return result


def _abstract(config: Config, mesh: Mesh, rows: int) -> batches.Batch:
  sharding = NamedSharding(mesh, meshes.BATCH)
  shape = rows, config.sequence_length
  tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
  positions = None if config.data.cross_documents else tokens
  return batches.Batch(tokens, tokens, positions=positions)


def candidates(
  config: Config, topology: ahead.Topology, capacity_factors: Sequence[float]
) -> Iterator[Config]:
  """Yields the config on every mesh, with every capacity factor."""
  for expert in range(1, topology.size + 1):
    if topology.size % expert == 0 and config.model.experts % expert == 0:
      mesh = dataclasses.replace(
        config.mesh, data=topology.size // expert, expert=expert
      )
      for factor in capacity_factors:
        if config.model.round_to_capacity and not factor:
          continue  # The same as 1.
        yield dataclasses.replace(config, mesh=mesh, capacity_factor=factor)


def difference(plan: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
  """Compares a plan with that of the same step without balancing."""
  with_it, without = (
    {
      'seconds': each['step_seconds'][1],
      'collectives': sum(row['count'] for row in each['collectives']),
      'bytes': sum(row['bytes'] for row in each['collectives']),
    }
    for each in (plan, plain)
  )
  more = {name: with_it[name] - without[name] for name in with_it}
  return more | {'share': more['seconds'] / with_it['seconds']}


def imbalance(
  plan: dict[str, Any], max_violation: float, config: Config
) -> dict[str, Any]:
  """Estimates what it costs that one expert has more to do than others.

  Args:
    plan: as `estimate` returns it.
    max_violation: load of the most loaded expert / mean load - 1.
    config: that of the plan. Rounded loads are even, whatever prices do.

  Returns:
    `seconds` more in a step, and their `share` of a step, in the worst case:
    in every layer, the most loaded expert's device has no other. `dropped`: of
    the pairs of that expert, which has limited room if there is a capacity;
    then buffers, and times, stay as they are.
  """
  more, dropped = 0.0, 0.0
  if config.model.round_to_capacity:
    pass
  elif config.capacity_factor:
    dropped = max(0.0, 1 - config.capacity_factor / (1 + max_violation))
  else:
    more = max_violation * plan['compute_seconds'].get('experts', 0.0)
  return {
    'max_violation': max_violation,
    'seconds': more,
    'share': more / plan['step_seconds'][1],
    'dropped': dropped,
  }


def _rows(config: Config, mesh: Mesh) -> float:
  """Counts (token, expert) pairs of a device in a microbatch."""
  tokens = config.batch_size * config.sequence_length / config.accumulation
  return tokens * config.model.experts_per_token / mesh.size


def _memory(config, training, jaxpr, mesh, compiled) -> dict[str, float]:
  abstract, size = training.abstract, state_lib.bytes_per_device
  temporary = compiled.temporary_bytes
  if not compiled.text:  # Then that is all that it needs.
    temporary -= size(abstract)
  # The compiler may find a way to keep less than the program says.
  kept = min(_kept_bytes(jaxpr, config, mesh), temporary)
  return {
    'parameters': size(abstract.params),
    'optimizer': _bytes_of_optimizer(abstract),
    'activations': kept,
    'temporaries': temporary - kept,
    'needed': compiled.argument_bytes + compiled.temporary_bytes,
    'limit': compiled.limit,
  }


def _bytes_of_optimizer(state: state_lib.TrainState) -> int:
  """Counts what lives beside the parameters that are evaluated."""
  return state_lib.bytes_per_device((state.optimizer, state.average))


def _kept_bytes(jaxpr: core.Jaxpr, config: Config, mesh: Mesh) -> float:
  """Sums what scans over layers hand on, per device.

  That has an axis of sequences or of tokens behind the one of layers.
  """
  batch = config.batch_size // config.accumulation
  split = ((batch,), (batch * config.sequence_length,))
  total = 0
  for equation in jaxpr.eqns:
    parameters = equation.params
    if equation.primitive.name == 'scan' and not parameters['reverse']:
      (body,) = core.jaxprs_in_params(parameters)
      for result, inner in zip(equation.outvars, body.outvars, strict=True):
        shape = result.aval.shape
        # What is stacked has one axis more than what the body returns.
        if shape[1:] == inner.aval.shape and shape[1:2] in split:
          total += result.aval.size * result.aval.dtype.itemsize / mesh.size
    if equation.primitive.name != 'shard_map':
      for inner in core.jaxprs_in_params(parameters):
        total += _kept_bytes(inner, config, mesh)
  return total


def _part(op_name: str) -> str:
  found = (part for scope, part in _SCOPES.items() if re.search(scope, op_name))
  return next(found, 'rest')


def times(
  config: Config, topology: ahead.Topology, mesh: Mesh, program: hlo.Program
) -> dict[str, Any]:
  """Estimates the times of a compiled step."""
  chip = topology.hardware
  costs = cost.compute(program, chip, _rows(config, mesh))
  parts, known = collections.Counter(), 0.0
  for item in costs:
    parts[_part(item.op_name)] += item.seconds
    known += item.seconds if item.known else 0
  places = ahead.places(mesh, topology)
  groups = collections.defaultdict(lambda: [0, 0, 0.0])
  waited = 0.0
  for call in hlo.collectives(program):
    part = 'experts' if call.kind in _EXCHANGE else _part(call.op_name)
    size = topology.slices if call.between_slices else len(call.group)
    seconds = hardware.seconds(call, chip, places, topology.shape) * call.count
    row = groups[part, call.kind, size or mesh.size]
    row[0] += call.count
    row[1] += call.count * call.bytes
    row[2] += seconds
    waited += 0 if call.asynchronous else seconds
  collective = sum(row[2] for row in groups.values())
  compute = sum(parts.values())
  routing = parts['router'] + sum(
    row[2] for (part, *_), row in groups.items() if part == 'router'
  )
  return {
    'compute_seconds': dict(parts),
    'compute_known': known / compute,
    'collectives': [
      {
        'part': part,
        'kind': kind,
        'devices': size,
        'count': count,
        'bytes': count_bytes,
        'seconds': seconds,
      }
      for (part, kind, size), (count, count_bytes, seconds) in sorted(
        groups.items(), key=lambda item: -item[1][2]
      )
    ],
    'routing': {
      'seconds': routing,
      'share': routing / (compute + collective),
    },
    'unknown_loops': hlo.unknown_loops(program),
    'waited_seconds': waited,
    'step_seconds': [
      max(compute + waited, collective),
      compute + collective,
    ],
  }
