"""Where a model sent each token of a text.

Shape letters: L MoE layers, S tokens, E experts, K chosen.
"""

import dataclasses

import numpy as np
import pandas as pd

_TIE = 1e-6  # of scores - q, a difference that rounding can make


@dataclasses.dataclass(frozen=True, eq=False)
class RoutedText:
  """A text, and the experts that its tokens went to, with q frozen.

  Attributes:
    tokens: S strings; half a character shows as U+FFFD, <s> and the like as
      ''.
    ids: of the tokens, int32 [S].
    experts: int32 [L, S, K], best first by score - q; -1 for a slot that is not
      used, where tokens take different numbers of experts.
    gates: of the chosen, as their outputs were mixed: scores that are by
      default divided by their sum, then scaled; float32 [L, S, K].
    scores: of all experts, float32 [L, S, E].
    q: price of each expert, float32 [L, E].
  """

  tokens: list[str]
  ids: np.ndarray
  experts: np.ndarray
  gates: np.ndarray
  scores: np.ndarray
  q: np.ndarray

  def __repr__(self) -> str:
    layers, tokens, chosen = self.experts.shape
    return (
      f'RoutedText({tokens} tokens, {layers} layers, {chosen} of '
      f'{self.q.shape[1]} experts each)'
    )

  @property
  def load(self) -> np.ndarray:
    """Tokens that each expert got, int64 [L, E]."""
    experts = self.q.shape[1]
    return np.stack(
      [
        np.bincount(layer[layer >= 0], minlength=experts)
        for layer in self.experts
      ]
    )

  @property
  def margins(self) -> np.ndarray:
    """How much better the last expert chosen is than the next; float32 [L, S].

    The k-th largest of score - q minus the one after it. A change of prices by
    half of that, or less, changes no choice.

    Raises:
      ValueError: every token goes to all experts, or not to those of largest
        score - q: prices of logits, groups of experts and other selections have
        no such margin.
    """
    experts, chosen = self.q.shape[1], self.experts.shape[2]
    if chosen == experts:
      raise ValueError(f'each token goes to all {experts} experts: no margin')
    adjusted_LxSxE = self.scores - self.q[:, None]
    chosen_LxSxK = np.take_along_axis(adjusted_LxSxE, self.experts, axis=-1)
    last, best = experts - chosen - 1, experts - chosen
    ranked = np.partition(adjusted_LxSxE, (last, best), axis=-1)
    worst_LxS = chosen_LxSxK.min(axis=-1)
    unlike_LxS = ranked[..., best] - worst_LxS > _TIE
    if unlike_LxS.any() or (self.experts < 0).any():
      raise ValueError(
        'margins: tokens did not go to the experts of largest score - q'
      )
    return ranked[..., best] - ranked[..., last]

  def table(self) -> pd.DataFrame:
    """Returns a row for each layer, token and expert that it went to.

    Columns: `layer`, `position`, `token`, `rank` (0: the best), `expert`,
    `gate`.
    """
    layer, position, rank = np.nonzero(self.experts >= 0)
    return pd.DataFrame(
      {
        'layer': layer,
        'position': position,
        'token': np.array(self.tokens, object)[position],
        'rank': rank,
        'expert': self.experts[layer, position, rank],
        'gate': self.gates[layer, position, rank],
      }
    )
