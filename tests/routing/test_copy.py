"""The folder works as it is in somebody else's trainer."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from moe_jax import routing

TRAINER = """
import json
import sys

sys.modules['moe_jax'] = None  # Importing it is an error.

import jax
from trainer import balancing

logits_TxE = jax.random.normal(jax.random.key(0), (512, 8))
scores_TxE = jax.nn.softmax(logits_TxE + 2 * jax.nn.one_hot(3, 8))
for balancer in (balancing.midpoint(), balancing.loss_free(0.01)):
  state = balancer.init(8)
  plain = balancing.choose(scores_TxE, state.q, k=2)
  for _ in range(30):
    q_E, state = balancer.solve(state, scores_TxE, k=2)
    choice = balancing.choose(scores_TxE, q_E, k=2)
    seen = balancer.observe(state, q_E, scores_TxE, choice, k=2)
    state = balancer.update(state, seen, k=2)
  loads = (plain.load, choice.load)
  print(json.dumps([float(balancing.max_violation(load)) for load in loads]))
"""


@pytest.mark.long
def test_a_copy_balances_in_another_package(tmp_path):
  package = tmp_path / 'trainer'
  shutil.copytree(
    pathlib.Path(routing.__file__).parent,
    package / 'balancing',
    ignore=shutil.ignore_patterns('__pycache__'),
  )
  (package / '__init__.py').touch()
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  environment.pop('PYTHONPATH', None)
  process = subprocess.run(
    [sys.executable, '-c', TRAINER],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  lines = process.stdout.splitlines()
  assert len(lines) == 2
  for before, after in map(json.loads, lines):
    assert before > 1 and after < 0.1 * before
