"""Load balancing of Mixture-of-Experts models in JAX."""
