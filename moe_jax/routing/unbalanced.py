"""Plain top-k routing, the control group."""

from .balancer import Balancer


def unbalanced() -> Balancer:
  """Builds plain top-k routing: q = 0 and no loss, the control group."""
  return Balancer()
