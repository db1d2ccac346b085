"""Public models to work directories, and back.

  python -m moe_jax.hf import FOLDER --workdir=RUN [--expert=1]
  python -m moe_jax.hf export RUN --out=FOLDER [--step=N] [--dtype=bfloat16]

import: FOLDER has config.json and model.safetensors, one file or many with an
index, of a Mixtral, OLMoE, Qwen3-MoE, GLM-4-MoE or DeepSeek-V3. RUN is then a
work directory before its first step. With --expert, the parameters pass through
so many devices, each with a part of the experts.

export: the model of a run, of its newest checkpoint or that of --step, in the
format that it was imported from, or else the first that computes the same.
Prices become the bias of the choice (GLM-4-MoE, DeepSeek-V3).

Exit codes: 0 done, 2 refused, 1 anything else.
"""

import argparse
from collections.abc import Sequence
import sys

import jax

from moe_jax import hf
from moe_jax.options import one_line
from moe_jax.parallel import mesh as meshes


def main(argv: Sequence[str]) -> int:
  """Runs the program; returns its exit code."""
  try:
    values = _parser().parse_args(argv[1:])
    if values.command == 'import':
      mesh = meshes.make_mesh(
        1, values.expert, devices=jax.devices()[: values.expert]
      )
      for line in hf.import_model(values.source, values.workdir, mesh=mesh):
        print(line, file=sys.stderr)
      print(f'imported into {values.workdir}')
    else:
      name = hf.export_model(
        values.source, values.out, step=values.step, dtype=values.dtype
      )
      print(f'exported as {name} into {values.out}')
  except (argparse.ArgumentError, ValueError, OSError) as error:
    print(f'error: {one_line(error)}', file=sys.stderr)
    return 2
  return 0


class _Parser(argparse.ArgumentParser):
  """Prints its description as help; refuses arguments in one line."""

  def format_help(self) -> str:
    return self.description or ''

  def error(self, message: str):
    raise ValueError(f'{message}; --help says what there is')


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog='python -m moe_jax.hf', description=__doc__, allow_abbrev=False
  )
  commands = parser.add_subparsers(dest='command', required=True)
  for name, to in (('import', 'workdir'), ('export', 'out')):
    command = commands.add_parser(name, description=__doc__, allow_abbrev=False)
    command.add_argument('source')
    command.add_argument(f'--{to}', required=True)
    if name == 'import':
      command.add_argument('--expert', type=int, default=1)
    else:
      command.add_argument('--step', type=int)
      command.add_argument('--dtype', default='')
  return parser


if __name__ == '__main__':
  sys.exit(main(sys.argv))
