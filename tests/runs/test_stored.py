"""A run that the version before `moe_jax.runs` left opens and continues.

`stored/bip` is its work directory after step 3 of 6, `stored/bip_metrics.jsonl`
what the same version recorded of all six.
"""

import pathlib
import shutil

import numpy as np
import pytest

from moe_jax import analysis
from moe_jax.runs import records
from moe_jax.runs.reader import Reader
from tests.train import tiny

STORED = pathlib.Path(__file__).parent / 'stored'


@pytest.fixture
def workdir(tmp_path):
  shutil.copytree(STORED / 'bip', tmp_path / 'bip')
  return tmp_path / 'bip'


def test_an_older_run_opens(workdir):
  run = analysis.Run(workdir)
  assert run.method == 'bip'
  assert list(run.metrics.index) == [1, 2, 3]
  assert run.checkpoints == [3]
  q_LxE = run.restore().q
  for layer, q_E in enumerate(q_LxE):
    np.testing.assert_array_equal(q_E, run.prices(layer).loc[3])
  assert run.restore().params


@pytest.mark.long
def test_an_older_run_continues(workdir, tmp_path, monkeypatch):
  tiny.write_text(tmp_path)
  monkeypatch.chdir(tmp_path)  # Its config names the text as *.txt.
  options = tiny.get_config('bip')
  options.update_from_flattened_dict(
    {'data.files': '*.txt', 'eval_every': 2, 'seed': 3}
  )
  tiny.run(tiny.config_lib.freeze(options), workdir)
  expected = records.read(STORED / 'bip_metrics.jsonl')
  for record, same in zip(Reader(workdir).records, expected, strict=True):
    assert record['step'] == same['step']
    assert record.keys() >= same.keys()  # Metrics were added since.
    # On another machine, sums may be made in another order, and after a step a
    # token at a tie may go elsewhere.
    for name in record.keys() & {'train/loss', 'eval/validation/perplexity'}:
      assert record[name] == pytest.approx(same[name], rel=2e-3)
  assert Reader(workdir).checkpoints == [3, 6]
