"""Sets the planner's estimates beside what MaxText measured on a v6e pod.

  python -m experiments.maxtext.compare --out=FILE.json

It needs the compiler of TPUs, as launch/plan.py does, and minutes. Prints a
table in Markdown. How the two differ, and how that is bridged:

- Parameters: MaxText's are bfloat16 with SGD, ours float32 with AdamW, which no
  chip has room for with all layers. 4 are compiled; then loops over layers are
  taken to turn as often as the model has layers, and the optimizer's time to
  grow as they do.
- Recomputation: MaxText offloads queries, keys, values and the attention's
  output to the host and recomputes the rest, ours all but choices.
- Dispatch: MaxText multiplies by one-hot masks, ours gathers rows.
"""

from collections.abc import Mapping, Sequence
import json
import os
import sys
from typing import Any

from launch import ahead, hlo, table

LAYERS = 4
# MFU by file and capacity factor. Published in June 2025, before MaxText began
# to count but half of attention, the causal one (its pull request 1988).
MEASURED = (
  ('wide_754b', 1.0, 0.498),
  ('wide_754b', 1.5, 0.381),
  ('deep_708b', 1.0, 0.431),
)


def flops(config, active: int) -> float:
  """Counts a step's useful FLOPs as MaxText did: attention is not halved."""
  model, length = config.model, config.sequence_length
  attention = 12 * model.layers * length * model.heads * model.head_width
  return config.batch_size * length * (6.0 * active + attention)


def with_layers(program: hlo.Program, layers: int) -> hlo.Program:
  """Lets the loops over layers of a compiled program turn more often."""

  def longer(instruction):
    if instruction.opcode == 'while':
      if hlo.trip_count(program, instruction) == LAYERS:
        turns = f'"known_trip_count":{{"n":"{layers}"}}, '
        attributes = turns + instruction.attributes
        return instruction._replace(attributes=attributes)
    return instruction

  return program._replace(
    computations={
      name: {part: longer(value) for part, value in computation.items()}
      for name, computation in program.computations.items()
    }
  )


def of_all_layers(times: Mapping[str, Any], layers: int) -> dict[str, float]:
  """Returns the seconds of each part of the whole model.

  Args:
    times: as `launch.estimate.times` returns them, of `with_layers`.
    layers: of the whole model.
  """
  parts = dict(times['compute_seconds'])
  parts['optimizer'] *= layers / LAYERS
  sent, waited = (
    sum(row['seconds'] for row in times['collectives']),
    times['waited_seconds'],
  )
  return parts | {'waited': waited, 'overlapped': sent - waited}


def compare(file: str, capacity_factor: float, mfu: float) -> dict[str, Any]:
  """Compiles one model and sets its estimate beside the measurement."""
  # Late: jax reads the environment when it is imported.
  from launch import estimate
  from moe_jax import nn
  from moe_jax.main import parse

  flags = (
    f'--config=experiments/maxtext/{file}.py:unbalanced',
    f'--config.capacity_factor={capacity_factor}',
  )
  config = _config(parse, *flags)
  few = _config(parse, *flags, f'--config.model.layers={LAYERS}')
  topology = ahead.parse_topology('v6e:16x16')
  mesh, training, traced = estimate.trace(few, ahead.devices(topology))
  program = hlo.parse(ahead.compile_step(traced.lower(), topology).text)
  layers, peak = config.model.layers, topology.hardware.peak
  program = with_layers(program, layers)
  times = estimate.times(few, topology, mesh, program)
  parts = of_all_layers(times, layers)
  _, active = nn.parameter_counts(few.model, training.abstract.params)
  active += (layers - LAYERS) * (active - _ends(few)) // LAYERS
  return {'model': file, 'capacity_factor': capacity_factor} | beside(
    parts, flops(config, active) / (topology.size * peak), mfu
  )


def _ends(config) -> int:
  """Counts the parameters that do not belong to a layer."""
  return (config.data.vocabulary + 1) * config.model.width


def beside(
  parts: Mapping[str, float], ideal: float, mfu: float
) -> dict[str, Any]:
  """Sets an estimate beside a measurement.

  Args:
    parts: seconds; 'waited' are collectives that nothing hides, 'overlapped'
      those that something may.
    ideal: seconds of the useful FLOPs at the peak.
    mfu: measured.
  """
  high, overlapped = sum(parts.values()), parts['overlapped']
  low = max(high - overlapped, parts['waited'] + overlapped)
  return {
    'parts': dict(parts),
    'measured_mfu': mfu,
    'measured_seconds': ideal / mfu,
    'estimated_seconds': [low, high],
    'estimated_mfu': [ideal / high, ideal / low],
    'error': [low * mfu / ideal - 1, high * mfu / ideal - 1],
  }


def _config(parse, *flags: str):
  from moe_jax import config as config_lib

  return config_lib.freeze(parse(['compare', *flags], others={})[0])


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """Writes the comparison as a table."""

  def span(values, scale=1.0, form='.1f'):
    return ' .. '.join(format(scale * value, form) for value in values)

  return table.table(
    (
      'model',
      'capacity',
      'measured: step, s',
      'MFU, %',
      'estimated: step, s',
      'MFU, %',
      'error, %',
    ),
    [
      (
        row['model'],
        row['capacity_factor'],
        span([row['measured_seconds']]),
        span([row['measured_mfu']], 100),
        span(row['estimated_seconds']),
        span(row['estimated_mfu'][::-1], 100),
        span(row['error'], 100, '+.0f'),
      )
      for row in rows
    ],
  )


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
  """Returns how much longer a step is with capacity factor 1.5 than 1.0."""
  one, more = (
    next(
      row
      for row in rows
      if (row['model'], row['capacity_factor']) == ('wide_754b', factor)
    )
    for factor in (1.0, 1.5)
  )
  return {
    'measured': [more['measured_seconds'] / one['measured_seconds']],
    'estimated': [
      b / a
      for a, b in zip(
        one['estimated_seconds'], more['estimated_seconds'], strict=True
      )
    ],
  }


def main(argv: Sequence[str]) -> int:
  """Runs the program; returns its exit code."""
  paths = [arg.removeprefix('--out=') for arg in argv[1:]]
  if len(paths) != 1 or paths[0] == argv[1]:
    print(__doc__)
    return 2
  try:
    out = ahead.output(paths[0])
    ahead.check_installed(ahead.parse_topology('v6e:16x16'))
    rows = [compare(*measured) for measured in MEASURED]
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  found = {'versions': ahead.versions(), 'rows': rows, 'ratio': ratios(rows)}
  out.write_text(json.dumps(found, indent=1) + '\n')
  print(markdown(rows))
  return 0


if __name__ == '__main__':
  ahead.prepare(os.environ)
  sys.exit(main(sys.argv))
