"""Reads what runs left behind: tables and figures. Trains nothing."""

from moe_jax.analysis.checkpoint import Checkpoint
from moe_jax.analysis.figures import load_heatmap_figure
from moe_jax.analysis.figures import loss_figure
from moe_jax.analysis.figures import max_violation_figure
from moe_jax.analysis.figures import save_figure
from moe_jax.analysis.markdown import comparison_markdown
from moe_jax.analysis.routed_text import RoutedText
from moe_jax.analysis.run import Run
from moe_jax.analysis.tables import comparison
from moe_jax.analysis.tables import difference
from moe_jax.analysis.tables import summarize

__all__ = [
  'Checkpoint',
  'RoutedText',
  'Run',
  'comparison',
  'comparison_markdown',
  'difference',
  'load_heatmap_figure',
  'loss_figure',
  'max_violation_figure',
  'save_figure',
  'summarize',
]
