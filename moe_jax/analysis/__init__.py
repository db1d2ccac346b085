"""Reads what runs left behind: tables and figures. Trains nothing."""

from moe_jax.analysis.checkpoint import Checkpoint
from moe_jax.analysis.drawing import save_figure
from moe_jax.analysis.expert_figures import (
  coactivation_figure,
  cutoff_figure,
  domain_figure,
  margin_figure,
  saturation_figure,
  similarity_figure,
)
from moe_jax.analysis.expert_statistics import (
  coactivation,
  domain_shares,
  saturation,
  typical_tokens,
)
from moe_jax.analysis.figures import (
  load_heatmap_figure,
  loss_figure,
  max_violation_figure,
  price_figure,
  progress_figure,
  sequence_violation_figure,
)
from moe_jax.analysis.frontier import frontier_figure
from moe_jax.analysis.markdown import comparison_markdown
from moe_jax.analysis.routed_text import RoutedText
from moe_jax.analysis.run import Run
from moe_jax.analysis.table import comparison, difference, summarize
from moe_jax.analysis.text_figures import text_figure, typical_tokens_figure

__all__ = [
  'Checkpoint',
  'RoutedText',
  'Run',
  'coactivation',
  'coactivation_figure',
  'comparison',
  'comparison_markdown',
  'cutoff_figure',
  'difference',
  'domain_figure',
  'domain_shares',
  'frontier_figure',
  'load_heatmap_figure',
  'loss_figure',
  'margin_figure',
  'max_violation_figure',
  'price_figure',
  'progress_figure',
  'saturation',
  'saturation_figure',
  'save_figure',
  'sequence_violation_figure',
  'similarity_figure',
  'summarize',
  'text_figure',
  'typical_tokens',
  'typical_tokens_figure',
]
