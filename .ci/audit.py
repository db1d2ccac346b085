"""Asks a database whether pinned requirements have known vulnerabilities.

  python .ci/audit.py [OPTION OF pip-audit ...]

Exit codes: 0 none are known, or the database cannot be reached, which is said;
1 some are known, or the question itself is wrong.
"""

from collections.abc import Sequence
import json
import pathlib
import re
import subprocess
import sys
import tempfile

_SECONDS = 20  # In all; a machine without a network shall not wait for long.
_UNREACHABLE = 'database not reachable, nothing was audited'


def main(argv: Sequence[str]) -> int:
  """Runs the program; returns its exit code."""
  root = pathlib.Path(__file__).parents[1]
  files = sorted(root.glob('requirements*.txt'))
  answers = [_audit(pins, argv) for pins in rounds(files)]
  for line in dict.fromkeys(line for _, lines in answers for line in lines):
    print(f'dependency audit: {line}')
  return max(code for code, _ in answers)


def rounds(files: Sequence[pathlib.Path]) -> list[dict[str, str]]:
  """Sorts pins so that no round has two versions of a package.

  Some packages have one for each Python; all are audited, whichever runs this.

  Returns:
    Versions by name.
  """
  result: list[dict[str, str]] = []
  for file in files:
    pattern = r'(?m)^([\w.-]+)(?:\[.*\])?==([\w.]+)'
    for name, version in re.findall(pattern, file.read_text()):
      if version not in (pins.get(name) for pins in result):
        free = next((pins for pins in result if name not in pins), None)
        if free is None:
          result.append(free := {})
        free[name] = version
  return result


def _audit(pins: dict[str, str], argv: Sequence[str]) -> tuple[int, list[str]]:
  command = [sys.executable, '-m', 'pip_audit', '--no-deps', '--disable-pip']
  command += ['--format=json', '--progress-spinner=off', '--timeout=5']
  with tempfile.NamedTemporaryFile('w', suffix='.txt') as file:
    file.writelines(f'{name}=={version}\n' for name, version in pins.items())
    file.flush()
    try:
      done = subprocess.run(
        [*command, f'--requirement={file.name}', *argv],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
      )
    except subprocess.TimeoutExpired:
      return 0, [_UNREACHABLE]
  return judge(done.stdout, done.stderr)


def judge(output: str, errors: str) -> tuple[int, list[str]]:
  """Returns the exit code and what to say.

  Args:
    output: of pip-audit, JSON if it came to an end.
    errors: what it wrote to stderr. It exits with 1 for findings, for wrong
      input and without a network.
  """
  try:
    found = json.loads(output)['dependencies']
  except ValueError:
    if re.search(r'requests\.exceptions|ServiceError|not connect', errors):
      return 0, [_UNREACHABLE]
    return 1, errors.splitlines()
  audited = [item for item in found if 'skip_reason' not in item]
  if not audited:  # A mirror that serves packages, but knows nothing of them.
    return 0, [_UNREACHABLE]
  lines = [
    f'{item["name"]} {item["version"]}: {flaw["id"]}, '
    f'mended in {", ".join(flaw["fix_versions"]) or "no version"}'
    for item in audited
    for flaw in item['vulns']
  ]
  count = f'{len(audited)} of {len(found)} requirements audited'
  return (1, [*lines, count]) if lines else (0, [f'{count}, no known flaws'])


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
