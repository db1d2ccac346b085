"""Makes the plans of experiments/results/plans, and the tables of its README.

  python -m launch.plans [--missing] [NAME ...]

Makes those named, or all; with --missing only what is not there yet. Each takes
minutes, and the compiler of its chips. Exit codes: as of launch/plan.py.
"""

from collections.abc import Sequence
import json
import pathlib
import re
import shlex
import subprocess
import sys

from launch import table

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = pathlib.Path('experiments/results/plans')
# What README.md, launch/README.md and experiments/ name. The launchers let
# GPUs use more of their memory than jax does by default.
PLANS = {
  'paper_16e.v5e_4x4': (
    'experiments/pods/paper_16e.py:midpoint_t1 --topology=v5e:4x4 '
    '--config.batch_size=256'
  ),
  'paper_16e.v5e_16x16': (
    'experiments/pods/paper_16e.py:midpoint_t1 --topology=v5e:16x16'
  ),
  'paper_64e.v5e_4x4': (
    'experiments/pods/paper_64e.py:midpoint_t1 --topology=v5e:4x4 '
    '--config.batch_size=256'
  ),
  'paper_64e.v5e_16x16': (
    'experiments/pods/paper_64e.py:midpoint_t1 --topology=v5e:16x16'
  ),
  'paper_64e.2_v5e_16x16': (
    'experiments/pods/paper_64e.py:midpoint_t1 --topology=v5e:16x16 --slices=2'
  ),
  'moe_7b.h100_8': 'experiments/pods/moe_7b.py:midpoint_t1 --topology=h100:8',
  'moe_30b.h100_8x4': (
    'experiments/pods/moe_30b.py:midpoint_t1 --topology=h100:8x4 '
    '--machine=a3-megagpu-8g'
  ),
  'moe_30b.v5e_16x16': (
    'experiments/pods/moe_30b.py:midpoint_t1 --topology=v5e:16x16 '
    '--config.mesh.expert=16 --config.batch_size=256'
  ),
  'moe_106b.h100_8x8': (
    'experiments/pods/moe_106b.py:midpoint_t1 --topology=h100:8x8'
  ),
  'giant_256e.v5p_8x8x8': (
    'experiments/giant_256e.py:midpoint_t1 --topology=v5p:8x8x8'
  ),
}
# The plans that are also made without balancing, which takes as long again.
BALANCED = ('paper_64e.v5e_16x16',)


def command(name: str) -> list[str]:
  """Returns the words of the command that makes a plan."""
  flags = shlex.split(f'--config={PLANS[name]}')
  flags += [] if name in BALANCED else ['--norouting']
  gpus = 'h100' in PLANS[name]
  return [
    *(['XLA_CLIENT_MEM_FRACTION=0.92'] if gpus else []),
    *('python', '-m', 'launch.plan', *flags),
    f'--out={FOLDER / name}.json',
  ]


def written(text: str, plans: dict[str, dict]) -> str:
  """Puts the tables and commands of plans into the text of the README."""
  commands = '\n'.join(plan['command'] for plan in plans.values())
  parts = {
    'estimates': table.estimates(plans),
    'balancing': table.balancing(plans),
    'commands': f'```\n{commands}\n```',
  }
  for name, part in parts.items():
    text = re.sub(
      rf'(?<=<!-- {name} -->\n).*?(?=\n<!-- end -->)',
      lambda _, part=part: part,
      text,
      flags=re.DOTALL,
    )
  return text


def read() -> dict[str, dict]:
  """Returns the plans that are there, by name."""
  paths = [ROOT / FOLDER / f'{name}.json' for name in sorted(PLANS)]
  return {
    path.stem: json.loads(path.read_text()) for path in paths if path.exists()
  }


def main(argv: Sequence[str]) -> int:
  """Runs the program; returns its exit code."""
  if {'--help', '-h'} & set(argv):
    print(__doc__)
    return 0
  names = [arg for arg in argv[1:] if arg != '--missing']
  unknown = [name for name in names if name not in PLANS]
  if unknown:
    print(f'error: {unknown[0]}: no plan; {", ".join(PLANS)}', file=sys.stderr)
    return 2
  codes = [0]
  for name in names or PLANS:
    if '--missing' in argv and (ROOT / FOLDER / f'{name}.json').exists():
      continue
    words = command(name)
    print(shlex.join(words), flush=True)
    words[words.index('python')] = sys.executable
    done = subprocess.run(['env', *words], cwd=ROOT, check=False)
    codes.append(done.returncode if done.returncode >= 0 else 1)
  plans, readme = read(), ROOT / FOLDER / 'README.md'
  if too_large := [name for name, plan in plans.items() if not plan['fits']]:
    print(
      f'error: {", ".join(too_large)}: does not fit; {readme} is as it was',
      file=sys.stderr,
    )
    return max(1, *codes)
  readme.write_text(written(readme.read_text(), plans))
  return max(codes)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
