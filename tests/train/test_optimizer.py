"""The learning rate, step by step."""

import numpy as np
import pytest

from moe_jax.train import optimizer
from tests.train import tiny


def learning_rates(tmp_path, warmup_steps):
  config = tiny.tiny_config(
    tmp_path, steps=10, learning_rate=8e-3, warmup_steps=warmup_steps
  )
  schedule = optimizer.make_schedule(config)
  return np.array([schedule(step) for step in range(10)])


def test_warm_up_begins_with_its_first_part_and_ends_at_the_peak(tmp_path):
  """No step is lost to a learning rate of 0."""
  rates = learning_rates(tmp_path, warmup_steps=4)
  np.testing.assert_allclose(rates[:4], [2e-3, 4e-3, 6e-3, 8e-3], rtol=1e-6)
  assert np.all(np.diff(rates[3:]) < 0)


@pytest.mark.parametrize('warmup_steps', [0, 1])
def test_without_warm_up_a_cosine_starts_at_the_peak(tmp_path, warmup_steps):
  rates = learning_rates(tmp_path, warmup_steps)
  cosine = (1 + np.cos(np.pi * np.arange(10) / 10)) / 2
  np.testing.assert_allclose(rates, 8e-3 * (0.1 + 0.9 * cosine), rtol=1e-6)
