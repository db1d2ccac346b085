"""What is used of jax without a public name; nothing else may use such.

A release of jax can change any of it. tests/test_jax_privates.py has a test of
each function, which says so.
"""

import functools

import jax
from jax._src import clusters, distributed, xla_bridge
from jax.extend import backend
from jaxlib import _jax

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
