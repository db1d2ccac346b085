"""Quantile Balancing: the ways of counting that devices need not share."""

import importlib

import numpy as np

# The package has a function of the module's name.
quantile = importlib.import_module('moe_jax.routing.quantile')


def test_a_product_counts_as_a_scatter_does():
  """CPUs count by scatter, accelerators by product; 7 bins fill no square."""
  bins = np.random.default_rng(0).integers(0, 9, size=(50, 3), dtype=np.int32)
  bins[:5] = quantile._NO_BIN
  expected = [np.bincount(column[column < 7], minlength=7) for column in bins.T]
  for count in (quantile._count_by_scatter, quantile._count_by_product):
    np.testing.assert_array_equal(count(bins, 7), expected)
