"""Reads the reference files; their README says what each array is."""

import os
import pathlib

import numpy as np

DIRECTORY = pathlib.Path(
  os.environ.get('GOLDEN_DIR', pathlib.Path(__file__).parent / 'golden')
)


def load(name: str) -> dict[str, np.ndarray]:
  """Reads one reference file; a missing one fails."""
  with np.load(DIRECTORY / f'{name}.npz', allow_pickle=False) as file:
    return dict(file)
