"""Where a model sent each token of a text.

Shape letters: L MoE layers, S tokens, E experts, K chosen.
"""

import dataclasses

import numpy as np
import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False)
class RoutedText:
  """A text, and the experts that its tokens went to, with q frozen.

  Attributes:
    tokens: S strings; half a character shows as U+FFFD.
    ids: of the tokens, int32 [S].
    experts: int32 [L, S, K], best first by score - q.
    gates: scores of the chosen, float32 [L, S, K].
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
      [np.bincount(layer.ravel(), minlength=experts) for layer in self.experts]
    )

  @property
  def margins(self) -> np.ndarray:
    """How much better the last expert chosen is than the next; float32 [L, S].

    The k-th largest of score - q minus the one after it. A change of prices by
    half of that, or less, changes no choice.

    Raises:
      ValueError: every token goes to all experts.
    """
    experts, chosen = self.q.shape[1], self.experts.shape[2]
    if chosen == experts:
      raise ValueError(f'each token goes to all {experts} experts: no margin')
    adjusted_LxSxE = self.scores - self.q[:, None]
    last, best = experts - chosen - 1, experts - chosen
    ranked = np.partition(adjusted_LxSxE, (last, best), axis=-1)
    return ranked[..., best] - ranked[..., last]

  def table(self) -> pd.DataFrame:
    """Returns a row for each layer, token and expert that it went to.

    Columns: `layer`, `position`, `token`, `rank` (0: the best), `expert`,
    `gate`.
    """
    layer, position, rank = (i.ravel() for i in np.indices(self.experts.shape))
    return pd.DataFrame(
      {
        'layer': layer,
        'position': position,
        'token': np.array(self.tokens, object)[position],
        'rank': rank,
        'expert': self.experts.ravel(),
        'gate': self.gates.ravel(),
      }
    )
