"""What is used of jax without a public name; nothing else may use such.

A release of jax can change any of it. tests/test_jax_privates.py has a test of
each function, which says so.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax._src import clusters, config, distributed, xla_bridge
from jax._src.cudnn import fused_attention_stablehlo
from jax.extend import backend, core
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxlib import _jax

_CUDNN = 91300  # Has all that jax asks for.
_CLUSTERS = (
  clusters.SlurmCluster,
  clusters.GkeTpuCluster,
  clusters.GceTpuCluster,
)


def varying_axes(x: jax.Array) -> frozenset[str]:
  """Returns the mesh axes over which x varies inside `jax.shard_map`.

  Why: `lax.pcast` refuses an axis over which its operand varies already.
  """
  return jax.typeof(x).manual_axis_type.varying


def untracked(function: Callable[..., Any], *arguments: Any) -> Any:
  """Calls a function of one device's arrays; results vary as its arguments do.

  What it calls need not know of mesh axes. It can be neither differentiated nor
  mapped by `jax.vmap`, and is traced at each call.

  Why: `jax.shard_map` refuses kernels that do not tell over which axes their
  results vary, such as those of splash attention.
  """
  arrays, structure = jax.tree.flatten(arguments)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
  with config._check_vma(False):
    jaxpr, results = jax.make_jaxpr(
      lambda *arrays: function(*jax.tree.unflatten(structure, arrays)),
      return_shape=True,
    )(*shapes)
  return jax.tree.unflatten(
    jax.tree.structure(results), _untracked.bind(*arrays, jaxpr=jaxpr)
  )


_untracked = core.Primitive('untracked')
_untracked.multiple_results = True


def _evaluate(*arrays, jaxpr):
  with config._check_vma(False):
    return core.jaxpr_as_fun(jaxpr)(*arrays)


@_untracked.def_abstract_eval
def _result_types(*types, jaxpr):
  varying = [t for t in types if t.manual_axis_type.varying]
  if not varying:
    return jaxpr.out_avals
  axes = frozenset.union(*(t.manual_axis_type.varying for t in varying))
  manual = varying[0].manual_axis_type.update(varying=axes)
  sharding = NamedSharding(varying[0].sharding.mesh, PartitionSpec())
  return [
    t.update(sharding=sharding, manual_axis_type=manual)
    for t in jaxpr.out_avals
  ]


_untracked.def_impl(_evaluate)
mlir.register_lowering(
  _untracked, mlir.lower_fun(_evaluate, multiple_results=True)
)


def assume_cudnn() -> None:
  """Lets programs with cuDNN's attention be traced where there is no cuDNN.

  Why: jax asks for its version, also where it compiles for described GPUs.
  """
  fused_attention_stablehlo.check_cudnn_version = lambda: _CUDNN


def has_cudnn() -> bool:
  """Tells whether jax finds cuDNN.

  Why: `jax.nn.dot_product_attention` ends with an error where it does not.
  """
  try:
    return bool(fused_attention_stablehlo.check_cudnn_version())
  except RuntimeError:
    return False


def cluster() -> type[clusters.ClusterEnv] | None:
  """Returns what knows of the other tasks of SLURM or hosts of a TPU slice.

  None outside of both.

  Why: `jax.distributed.initialize()` would find the same, but not tell how
  many processes there are, nor listen on the loopback interface alone.
  """
  return next((c for c in _CLUSTERS if c.is_env_present()), None)


def coordination() -> distributed.State:
  """Returns this process's `client` of the coordination service.

  And its `process_id` of `num_processes`. The client is None in a process that
  is alone.

  Why: the service's store of keys and values needs no device, and waits no
  longer than it is told to.
  """
  return distributed.global_state


def exchange_on_loopback() -> None:
  """Keeps gloo, which moves arrays between CPUs, on the loopback interface.

  Why: it would listen on the address that this machine's name stands for, which
  may be a public one, and jax has no option for that.
  """
  collectives = _jax.make_gloo_tcp_collectives(
    coordination().client, hostname='127.0.0.1'
  )
  backend.register_backend_factory(
    'cpu',
    functools.partial(xla_bridge.make_cpu_client, collectives),
    fail_quietly=False,
  )
