"""The dependency audit finds, and admits what it could not ask."""

from http import server
import json
import pathlib
import runpy
import subprocess
import sys
import threading

import pytest

AUDIT = pathlib.Path(__file__).parents[1] / '.ci/audit.py'
UNREACHABLE = 'dependency audit: database not reachable, nothing was audited\n'


def audit(url):
  done = subprocess.run(
    [sys.executable, AUDIT, '-s', 'osv', '--osv-url', url],
    capture_output=True,
    text=True,
    timeout=60,
  )
  return done.returncode, done.stdout


@pytest.fixture
def database():
  """A database that knows of one flaw, in numpy, and how it is asked."""

  class Handler(server.BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802 (http.server's name)
      question = json.loads(
        self.rfile.read(int(self.headers['Content-Length']))
      )
      asked.append(question['package']['name'])
      events = [{'introduced': '0'}, {'fixed': '99.1'}]
      affected = {
        'package': question['package'],
        'ranges': [{'type': 'ECOSYSTEM', 'events': events}],
      }
      flaws = [{'id': 'FLAW-1', 'affected': [affected]}]
      answer = {'vulns': flaws} if asked[-1] == 'numpy' else {}
      self.send_response(200)
      self.end_headers()
      self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
      pass

  asked = []
  with server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as serving:
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{serving.server_port}', asked
    serving.shutdown()


def test_a_known_vulnerability_fails_the_audit(database):
  url, asked = database
  code, said = audit(url)
  assert code == 1
  assert 'numpy' in said and 'FLAW-1, mended in 99.1' in said
  # All that is pinned, also what only tests or accelerators need.
  assert {'jax', 'pytest', 'libtpu', 'nvidia-nccl-cu12'} <= set(asked)


def test_without_a_database_it_says_so_and_passes():
  assert audit('http://127.0.0.1:9') == (0, UNREACHABLE)


def test_packages_that_the_database_does_not_know_are_not_audited():
  """As where a mirror answers in its place; pip-audit reports no flaws then."""
  judge = runpy.run_path(str(AUDIT))['judge']
  skipped = {'name': 'jax', 'skip_reason': 'not found'}
  sound = {'name': 'numpy', 'version': '1', 'vulns': []}
  for found, said in (
    ([skipped], 'database not reachable, nothing was audited'),
    ([skipped, sound], '1 of 2 requirements audited, no known flaws'),
  ):
    output = json.dumps({'dependencies': found})
    assert judge(output, '') == (0, [said])


def test_a_wrong_question_is_not_taken_for_a_missing_database():
  judge = runpy.run_path(str(AUDIT))['judge']
  reason = 'ERROR: requirement foo is not pinned to an exact version'
  assert judge('', reason) == (1, [reason])
