"""Four gigabytes of a model: memory of the import, on eight devices."""

import json
import math
import pathlib
import re

import numpy as np
import pytest

from tests import golden_data, several_processes

GOLDEN = golden_data.DIRECTORY / 'hf' / 'mixtral'
LAYERS = 10
# Of the golden model, and what is there in their place.
SIDES = {32: 1024, 40: 4096, 16: 512, 8: 8, 97: 97}
IMPORTS = f"""
import sys
from moe_jax.hf import __main__ as program
code = program.main(sys.argv)
{several_processes.PRINTS_MEMORY}
sys.exit(code)
"""


def write_model(folder: pathlib.Path) -> int:
  """Writes a model of the same random numbers again and again.

  Returns:
    Bytes of its tensors.
  """
  config = json.loads((GOLDEN / 'config.json').read_text()) | {
    'hidden_size': SIDES[32],
    'intermediate_size': SIDES[40],
    'num_hidden_layers': LAYERS,
  }
  (folder / 'config.json').write_text(json.dumps(config))
  with (GOLDEN / 'model.safetensors').open('rb') as file:
    header = json.loads(file.read(int.from_bytes(file.read(8), 'little')))
  tensors, end = {}, 0
  for name, tensor in header.items():
    if name == '__metadata__' or '.layers.1.' in name:
      continue
    shape = [SIDES[side] for side in tensor['shape']]
    for layer in range(LAYERS if '.layers.' in name else 1):
      start, end = end, end + 4 * math.prod(shape)
      tensors[name.replace('.layers.0.', f'.layers.{layer}.')] = {
        'dtype': 'F32',
        'shape': shape,
        'data_offsets': [start, end],
      }
  text = json.dumps(tensors).encode()
  with (folder / 'model.safetensors').open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    numbers = np.random.default_rng(0).normal(size=10**7).astype('<f4')
    for start in range(0, end, numbers.nbytes):
      file.write(numbers.data.cast('B')[: end - start])
  return end


@pytest.mark.long
def test_an_import_takes_little_more_memory_than_the_model(tmp_path):
  (tmp_path / 'model').mkdir()
  size = write_model(tmp_path / 'model')
  assert size > 4e9
  flags = 'import', tmp_path / 'model', f'--workdir={tmp_path / "run"}'
  (done,) = several_processes.run(['-c', IMPORTS, *flags, '--expert=8'])
  assert done.returncode == 0, done.stderr
  memory = int(re.findall(r'^\d+$', done.stdout, re.MULTILINE)[-1])
  assert memory < 1.3 * size  # 1.20 to 1.21 were seen.
