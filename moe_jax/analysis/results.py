"""What a run recorded, in numbers."""

from collections.abc import Sequence
import functools
import json
import math
import os
import pathlib
from typing import Any

import pandas as pd

from moe_jax.config import method_of, upgrade
from moe_jax.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from moe_jax.runs import records
from moe_jax.runs.reader import Reader


class Results(Reader):
  """What one training run recorded in its work directory.

  The run may be under way, or copied here from another machine. Files are read
  when first asked for and kept.

  Attributes:
    workdir: absolute path of the work directory, or gs://...
  """

  def __repr__(self) -> str:
    return f'{type(self).__name__}({os.fspath(self.workdir)!r})'

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """The nested config, from `config.json`, its options named as today."""
    return upgrade(super().config)

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """What made tokens of the text, from `tokenizer.json`."""
    vocabulary = self.config['data']['vocabulary']
    text = json.dumps(super().tokenizer)
    # Older runs have no other.
    end = self.facts.get('end_of_document', END_OF_DOCUMENT)
    beginning = self.facts.get('beginning', ())  # Of imported models alone.
    return Tokenizer.from_json(text, vocabulary, end, beginning)

  @functools.cached_property
  def metrics(self) -> pd.DataFrame:
    """One row a completed step (1-based index), one column a metric key.

    A metric that a step does not have, such as an evaluation, is NaN, and so is
    one that was not finite.

    Raises:
      FileNotFoundError: there is no `metrics.jsonl`.
      ValueError: a line is damaged.
    """
    found = records.read(self.workdir / records.NAME)
    return pd.DataFrame(found or {'step': []}).set_index('step')

  @property
  def finished(self) -> bool:
    """Whether the last of the configured steps was completed."""
    return self.config['steps'] in self.metrics.index[-1:]

  @property
  def tokens_per_step(self) -> int:
    """Positions that a step trains on now, padding included."""
    return self.config['batch_size'] * self.config['sequence_length']

  @property
  def tokens(self) -> pd.Series:
    """Positions trained on up to each step, padding included."""
    sizes = {k: self.config[k] for k in ('batch_size', 'sequence_length')}
    per_step = pd.Series(self.tokens_per_step, self.metrics.index)
    changes = self.facts.get('config_changes', {})
    for at in sorted(map(int, changes), reverse=True):
      before = {k: change['from'] for k, change in changes[str(at)].items()}
      sizes |= {k: before[k] for k in sizes.keys() & before.keys()}
      per_step.loc[:at] = math.prod(sizes.values())
    return per_step.cumsum()

  @property
  def method(self) -> str:
    """The balancer's name in tables and figures."""
    return method_of(self.config['balancer'], self.config['losses'])

  @property
  def evaluation_sets(self) -> list[str]:
    """Names of the sets that were evaluated, in the order first met."""
    parts = (key.split('/') for key in self.metrics)
    return [p[1] for p in parts if p[0] == 'eval' and p[-1] == 'perplexity']

  @property
  def texts(self) -> list[str]:
    """Names of the texts that a mixture was trained on, in order; else none."""
    prefix = 'train/loss/'
    keys = (key for key in self.metrics if key.startswith(prefix))
    return [key.removeprefix(prefix) for key in keys]

  @property
  def max_violation(self) -> pd.Series:
    """MaxVio by step, mean over the MoE layers."""
    return self.metrics['router/max_violation']

  @property
  def layer_max_violation(self) -> pd.DataFrame:
    """MaxVio by step and MoE layer; columns `layer_00` and so on."""
    layers = self.metrics.filter(like='router/max_violation/')
    layers = layers.rename(columns=lambda key: key.rpartition('/')[2])
    return layers.sort_index(axis='columns')

  @property
  def least_balanced_layer(self) -> int:
    """The MoE layer of worst AvgMaxVio."""
    worst = self.layer_max_violation.mean().idxmax()
    return int(worst.removeprefix('layer_'))

  def loads(self, layer: int) -> pd.DataFrame:
    """Tokens that each expert of a layer got; a column an expert.

    A row for each step that they were recorded of, see `experts_every`.

    Raises:
      ValueError: the run has no loads of that layer.
    """
    return self._by_expert('load', layer)

  def gates(self, layer: int) -> pd.DataFrame:
    """Sum of the gates by which each expert of a layer was mixed; as `loads`.

    Raises:
      ValueError: the run has no gates of that layer; older ones recorded
        none.
    """
    return self._by_expert('gates', layer)

  def prices(self, layer: int) -> pd.DataFrame:
    """q of each expert of a layer, as it was after a step; as `loads`.

    Raises:
      ValueError: the run has no prices of that layer; runs before version 0.2
        recorded none.
    """
    return self._by_expert('q', layer)

  def _by_expert(self, what: str, layer: int) -> pd.DataFrame:
    key = f'router/{what}/layer_{layer:02d}'
    if key not in self.metrics:
      group = key.removesuffix(f'{layer:02d}')
      has = sorted(k for k in self.metrics if k.startswith(group))
      raise ValueError(
        f'layer {layer}: {self} has no {key}, but {has or "none of these"}'
      )
    rows = self.metrics[key].dropna()
    return pd.DataFrame(rows.tolist(), index=rows.index)


def name_runs(runs: Sequence[Results]) -> dict[str, Results]:
  """Names runs by as much of their paths' ends as tells them apart.

  Returns:
    The runs by their names, one printable line each: not every path is one.

  Raises:
    ValueError: a path is there twice, or two differ in what cannot be shown.
  """
  paths = [
    ''.join(c if c.isprintable() else '?' for c in os.fspath(run.workdir))
    for run in runs
  ]
  parts = [pathlib.PurePath(path).parts for path in paths]
  if len(set(parts)) < len(parts):
    raise ValueError(f'the same work directory twice: {", ".join(paths)}')
  ends = 1
  while len({part[-ends:] for part in parts}) < len(parts):
    ends += 1
  names = ['/'.join(part[-ends:]) for part in parts]
  return dict(zip(names, runs, strict=True))
