"""What the compilers are told, and why; and what helps where one refuses."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import re
from typing import Any

import jax

from moe_jax.options import Refused

_OPTIONS: Mapping[str, Mapping[str, bool | int]] = {
  'cpu': {
    # Two thirds of the processor time before the first step. Steps take as
    # long, as LLVM compiles no large products: `train_step.md` has both.
    'xla_backend_optimization_level': 1,
  },
  'tpu': {
    # `lax.ragged_dot`, of dropless experts, becomes a kernel with its real
    # FLOPs in place of a dense product with E times as many.
    'xla_tpu_enable_ragged_dot_kernel': True,
    # Rows travel while the shared expert is computed, and gradients.
    'xla_tpu_enable_async_all_to_all': True,
  },
  'gpu': {
    # More of the ragged exchanges of dropless experts have products between
    # their start and their end.
    'xla_gpu_enable_latency_hiding_scheduler': True,
  },
}


def compiler_options(devices: Sequence[jax.Device]) -> dict[str, bool | int]:
  """Returns the `compiler_options` of `jax.jit` that suit a model with MoE.

  Args:
    devices: all that are compiled for.
  """
  options = dict(_OPTIONS.get(devices[0].platform, {}))
  kind = devices[0].device_kind
  if 'v6 lite' in kind:
    # Tiles of products may fill 80 of its 128 MiB of fast memory, as MaxText
    # has it for sparse models. By the compiler's cycles, products of 8,192 rows
    # and columns then reach 88 % of the peak, else 70 %; with 96 MiB, 90 %.
    options['xla_tpu_scoped_vmem_limit_kib'] = 81_920
  if 'v5 lite' in kind and any(max(device.coords) >= 8 for device in devices):
    # Chips of v5e that lie in a side of 16 cannot reach all others by
    # themselves, and the compiler refuses: 'not supported on limited ICI'.
    del options['xla_tpu_enable_async_all_to_all']
  return options


def jit(function: Callable, **given: Any) -> Callable:
  """Returns `jax.jit` of a function of a model on the default devices.

  Which these are is asked at the first call, when processes have joined.

  Args:
    function: to be compiled.
    **given: arguments of `jax.jit`.
  """

  @functools.cache
  def compiled():
    options = compiler_options(jax.devices())
    return jax.jit(function, compiler_options=options, **given)

  @functools.wraps(function)
  def call(*arguments, **keywords):
    return compiled()(*arguments, **keywords)

  return call


# By a pattern of what the compiler says.
_REFUSALS = {
  'ragged.?all.?to.?all': (
    'model.round_to_capacity=False: the compiler of these devices refuses the '
    'ragged exchange of dropless training; True drops nothing either and needs '
    'none'
  ),
  # libtpu 0.0.50.1 over two slices, with a width of 128.
  'AllReduceScatterFusion': (
    'model.dtype=float32: the compiler of these TPUs cannot sum gradients of '
    'so narrow a model over several slices; it can with bfloat16, or with a '
    'greater model.width'
  ),
}


@contextlib.contextmanager
def refusal_explained() -> Iterator[None]:
  """Says which option helps where a compiler is known to refuse a step.

  Put it around what compiles a step. Other errors pass as they are.

  Raises:
    Refused: the step was refused.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).partition('\n')[0]
    for pattern, advice in _REFUSALS.items():
      if re.search(pattern, str(error), re.IGNORECASE):
        raise Refused(f'{advice} ({reason})') from error
    raise
