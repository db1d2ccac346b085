"""Training: state -> state, and what a run writes down."""
