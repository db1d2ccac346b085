"""The comparison: arguments, and one small comparison from end to end."""

import pandas as pd
import pytest

from experiments import compare
from moe_jax.train import loop, plan
from tests.train import tiny

DEMO = '--config=experiments/demo.py'


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([DEMO + ':bip'], 'leave the method out'),
    ([DEMO, '--methods=bip,bipp'], 'did you mean bip?'),
    ([DEMO, '--methods=bip,'], 'has an empty item'),
    ([DEMO, '--seeds=0,x'], '--seeds=0,x: must be like 0,1,2'),
    ([DEMO, '--config.seed=3'], 'give --seeds=0,1 instead'),
    ([DEMO, '--method=bip'], 'did you mean methods?'),
  ],
)
def test_refused_before_anything_is_trained(flags, message, tmp_path, capsys):
  workdir = tmp_path / 'runs'
  assert compare.main(['compare', f'--workdir={workdir}', *flags]) == 2
  assert message in capsys.readouterr().err
  assert not workdir.exists()


def test_what_ends_a_run_is_told_in_a_line(tmp_path, monkeypatch, capsys):
  def fail(plan, preempted):
    raise OSError('No space left')

  monkeypatch.setattr(plan, 'plan', lambda *args: None)
  monkeypatch.setattr(loop, 'train', fail)
  assert compare.main(['compare', f'--workdir={tmp_path}', DEMO]) == 1
  assert 'error: No space left\nThe same command' in capsys.readouterr().err


@pytest.mark.long
def test_end_to_end(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  text = tiny.write_text(tmp_path)
  experiment = tmp_path / 'tiny_experiment.py'
  experiment.write_text(
    f"""
import pathlib
from ml_collections import ConfigDict
from moe_jax import config as config_lib
from tests.train import tiny

def get_config(method='bip'):
  config = tiny.tiny_config(pathlib.Path({str(text)!r}), method)
  return ConfigDict(config_lib.to_dict(config))
"""
  )
  flags = [
    'compare',
    f'--config={experiment}',
    f'--workdir={tmp_path / "runs"}',
    '--methods=loss_free,bip',
    '--config.steps=3',
  ]
  assert compare.main(flags) == 0
  runs = tmp_path / 'runs'
  table = pd.read_json(runs / 'comparison.json').set_index('method')
  assert list(table.index) == ['loss_free', 'bip']
  first = table['first_max_violation']
  assert first['bip'] < first['loss_free']
  for name in ('max_violation', 'sequences', 'load', 'loss', 'frontier'):
    assert (runs / f'{name}.png').stat().st_size > 1000
    assert (runs / f'{name}.svg').read_text().startswith('<?xml')
  # Again: nothing is trained, and what changes nothing may differ.
  capsys.readouterr()
  assert compare.main([*flags, '--config.checkpoint_every=2']) == 0
  assert 'already at step 3' in capsys.readouterr().err
