"""The work directory of a run: one object writes it, one reads it."""
