"""One page of runs, a single HTML file: `python -m moe_jax.analysis.report`."""
