"""Load balancing of Mixture-of-Experts models in JAX."""

__version__ = '0.2.0'
