"""What the compilers are told, and why."""

from collections.abc import Mapping

_OPTIONS: Mapping[str, Mapping[str, bool]] = {
  'tpu': {
    # `lax.ragged_dot`, of dropless experts, becomes a kernel with its real
    # FLOPs in place of a dense product with E times as many.
    'xla_tpu_enable_ragged_dot_kernel': True,
    # Rows travel while the shared expert is computed, and gradients.
    'xla_tpu_enable_async_all_to_all': True,
  },
  'gpu': {
    # Without it, ragged exchanges of dropless experts begin and end with
    # nothing in between.
    'xla_gpu_enable_latency_hiding_scheduler': True,
  },
}


def compiler_options(platform: str) -> dict[str, bool]:
  """Returns what `jax.jit(compiler_options=...)` needs for MoE layers.

  Args:
    platform: 'cpu', 'gpu' or 'tpu', of the devices compiled for.
  """
  return dict(_OPTIONS.get(platform, {}))
