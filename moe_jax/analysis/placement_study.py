"""What policies of placement make of the loads that a run recorded.

Shape letters: N records, L layers, E experts, P devices.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moe_jax.analysis import load_prediction as prediction
from moe_jax.analysis import placement_policies as policies
from moe_jax.analysis.results import Results
from moe_jax.analysis.step_time import ASSUMPTIONS, step_time
from moe_jax.options import check_options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What is asked of a run's loads; `moe_jax.analysis.placement` tells each."""

  devices: int = option(8, least=2, most=2**14)
  redundant: int = option(-1, least=-1, most=2**16)
  interval: int = option(10, least=1, most=10**9)
  window: int = option(prediction.WINDOW, least=2, most=10**9)
  drift: float = option(prediction.DRIFT, least=0, most=1)
  predictor: str = option('ema', among=tuple(prediction.PREDICTORS))
  hindsight: int = option(10, least=1, most=10**6)
  flops: float = option(989.4e12, above=0, most=1e30)
  bandwidth: float = option(450e9, above=0, most=1e30)

  def __post_init__(self):
    check_options(self, '--')

  def check(self, records: int, experts: int) -> None:
    """Raises ValueError where such loads cannot be placed as is asked."""
    if experts % self.devices:
      fits = [p for p in range(2, experts + 1) if experts % p == 0]
      raise ValueError(
        f'--devices={self.devices}: must divide the {experts} experts; '
        f'{", ".join(map(str, fits))} would do'
      )
    if self.copies % self.devices:
      raise ValueError(
        f'--redundant={self.redundant}: must be a multiple of '
        f'--devices={self.devices}'
      )
    if self.interval >= records:
      raise ValueError(
        f'--interval={self.interval}: must be less than the {records} records '
        'of loads'
      )

  @property
  def copies(self) -> int:
    """Copies of experts in the policy 'replicas'."""
    return self.devices if self.redundant < 0 else self.redundant


class Placed(NamedTuple):
  """How even the work was under a policy.

  Attributes:
    imbalance_NxL: max over mean load of the devices, from the second record on.
    moves: experts that the device with most of them got anew in a layer, mean
      over layers, a record.
  """

  imbalance_NxL: np.ndarray
  moves: float


def simulate(
  loads_NxLxE: np.ndarray,
  predicted_NxLxE: np.ndarray,
  place: Callable[[np.ndarray], np.ndarray],
  interval: int,
) -> Placed:
  """Places experts after the first record and then every `interval` records.

  Args:
    loads_NxLxE: what was recorded.
    predicted_NxLxE: row i is what was expected after record i.
    place: from loads [L, E] to shares [L, E, P], see `placement_policies`.
      Experts begin where it puts them for equal loads.
    interval: records that a placement is for.
  """
  share_LxExP = place(np.ones(loads_NxLxE.shape[1:]))
  imbalances, moves = [], 0.0
  for start in range(0, len(loads_NxLxE) - 1, interval):
    before_LxExP, share_LxExP = share_LxExP, place(predicted_NxLxE[start])
    new_LxP = np.sum((share_LxExP > 0) & (before_LxExP == 0), axis=1)
    moves += new_LxP.max(axis=1).mean()
    later_NxLxE = loads_NxLxE[start + 1 :][:interval]
    imbalances.append(policies.imbalance(later_NxLxE, share_LxExP))
  imbalance_NxL = np.concatenate(imbalances)
  return Placed(imbalance_NxL, float(moves / len(imbalance_NxL)))


def recorded_loads(run: Results) -> tuple[np.ndarray, np.ndarray]:
  """Reads the loads of all MoE layers.

  Returns:
    The steps that were recorded, int [N], and their loads, float64 [N, L, E].

  Raises:
    ValueError: there are less than two records.
  """
  layers = [key for key in run.metrics if key.startswith('router/load/layer_')]
  tables = [run.loads(layer) for layer in range(len(layers))]
  if not tables or len(tables[0]) < 2:
    raise ValueError(
      f'{run}: has loads of {len(tables and tables[0])} steps; at least 2 are '
      'needed'
    )
  loads_NxLxE = np.stack([table.to_numpy(float) for table in tables], axis=1)
  return tables[0].index.to_numpy(), loads_NxLxE


class Study:
  """All policies and predictors on the loads of a run.

  Args:
    run: its work directory.
    options: what is asked.

  Attributes:
    steps: those that were recorded, int [N].
    loads: float64 [N, L, E].
    placed: a `Placed` by policy and predictor.
    time: the `StepTime` of the run.
    settled: for each layer the first step from which on its loads were settled,
      None where there is none.

  Raises:
    ValueError: the run does not suit the options.
  """

  def __init__(self, run: Results, options: Options):
    self.run, self.options = run, options
    self.steps, self.loads = recorded_loads(run)
    records, _, experts = self.loads.shape
    options.check(records, experts)
    self.predictors = prediction.predictors(options.window, options.drift)
    horizon = (options.interval + 1) // 2  # the middle of what it is for
    predicted = {
      name: predict(self.loads, horizon)
      for name, predict in self.predictors.items()
    }
    self.places = _places(experts, options)
    self.placed = {
      (policy, name): simulate(
        self.loads, predicted.get(name, self.loads), place, options.interval
      )
      for policy, place in self.places.items()
      for name in (self.predictors if policy != 'contiguous' else ['-'])
    }
    self._chosen = predicted[options.predictor]
    self.drift = prediction.drift(self.loads, options.window)
    self.settled = [
      None if i is None else int(self.steps[i])
      for i in prediction.settled_since(self.drift, options.drift)
    ]
    self.time = step_time(
      run.config,
      pairs=self.loads.sum(-1).mean(),
      devices=options.devices,
      flops=options.flops,
      bandwidth=options.bandwidth,
    )

  @functools.cached_property
  def policies(self) -> pd.DataFrame:
    """A row a policy and predictor; the last one is that of even loads."""
    rows = []
    for (policy, predictor), placed in self.placed.items():
      imbalance_NxL = placed.imbalance_NxL
      slots = self.options.copies / self.options.devices
      seconds = self.time.seconds(
        imbalance_NxL.mean(),
        moves=placed.moves,
        copies=slots if policy == 'replicas' else 0.0,
      )
      rows.append(
        {
          'policy': policy,
          'predictor': predictor,
          'max / mean': imbalance_NxL.mean(),
          'worst layer': imbalance_NxL.mean(0).max(),
          'worst record': imbalance_NxL.mean(1).max(),
          'moves': placed.moves,
          'step, us': 1e6 * seconds,
        }
      )
    even = {'policy': 'even loads', 'predictor': '-', 'moves': 0.0}
    even |= dict.fromkeys(['max / mean', 'worst layer', 'worst record'], 1.0)
    table = pd.DataFrame([*rows, even | {'step, us': 1e6 * self.even_seconds}])
    table['over even, %'] = table['step, us'] / (1e4 * self.even_seconds) - 100
    return table

  @property
  def even_seconds(self) -> float:
    """Seconds of a step in which all devices have the mean load."""
    return self.time.seconds(1.0)

  @functools.cached_property
  def hindsight(self) -> pd.DataFrame:
    """Max over mean load by who knows what: a row a record, mean over layers.

    Placements are those that the chosen predictor leads to, unless loads are
    known.
    """
    wanted, last = self.options.hindsight, len(self.loads) - 1
    records = np.unique(np.linspace(1, last, wanted).round().astype(int))
    rows = [self._in_hindsight(i) for i in records]
    return pd.DataFrame(rows, index=self.steps[records]).rename_axis('step')

  def _in_hindsight(self, i: int) -> dict[str, float]:
    load_LxE = self.loads[i]
    guess_LxE = self._chosen[
      (i - 1) // self.options.interval * self.options.interval
    ]
    row = {
      f'{name}{known}': policies.imbalance(load_LxE, place(by_LxE)).mean()
      for known, by_LxE in (('', guess_LxE), (', loads known', load_LxE))
      for name, place in self.places.items()
      if not (known and name == 'contiguous')
    }
    copies = self.places['replicas'](guess_LxE)
    split = [
      policies.best_split(load_E, share_ExP)
      for load_E, share_ExP in zip(load_LxE, copies, strict=True)
    ]
    best = [
      policies.optimum(load_E, self.options.devices) for load_E in load_LxE
    ]
    return row | {
      'replicas, tokens split at best': policies.imbalance(
        load_LxE, np.stack(split)
      ).mean(),
      'optimum without copies, loads known': np.mean(
        [o.imbalance for o in best]
      ),
      'bound of that optimum': np.mean([o.bound for o in best]),
    }

  @functools.cached_property
  def errors(self) -> pd.DataFrame:
    """Mean relative L1 error: a row a predictor, a column a horizon.

    The last two are of the horizon `interval`, from records where a layer
    fluctuates and from those where it is settled.
    """
    interval = self.options.interval
    settled_NxL = (self.drift <= self.options.drift)[:-interval]
    rows = {}
    for name, predict in self.predictors.items():
      errors = {
        horizon: prediction.errors(self.loads, predict, horizon)
        for horizon in sorted({1, interval, 10 * interval})
        if horizon < len(self.loads)
      }
      rows[name] = {f'{h} ahead': wrong.mean() for h, wrong in errors.items()}
      for regime, where in (
        ('fluctuating', ~settled_NxL),
        ('settled', settled_NxL),
      ):
        wrong = errors[interval][where]
        rows[name][regime] = wrong.mean() if len(wrong) else np.nan
    return pd.DataFrame(rows).T.rename_axis('predictor')

  @property
  def settling(self) -> str:
    """A sentence on when loads settled."""
    options, last = self.options, self.steps[-1]
    rule = (
      f'at most {options.drift:.1%} of the tokens change experts from the mean '
      f'of {options.window} records to that of the next {options.window}'
    )
    found = sorted(step for step in self.settled if step is not None)
    layers = f'{len(found)} of {len(self.settled)} layers'
    if not found:
      return f'Loads settle in {layers} up to step {last} ({rule}).'
    when = f'{found[0]}' if found[0] == found[-1] else f'{found[0]}-{found[-1]}'
    return f'Loads settle in {layers}, by step {when} of {last} ({rule}).'

  def to_json(self) -> dict[str, Any]:
    """Returns all numbers as JSON-able objects."""
    curves = {
      f'{policy}/{predictor}': placed.imbalance_NxL.mean(1).tolist()
      for (policy, predictor), placed in self.placed.items()
    }
    return {
      'run': str(self.run.workdir),
      'method': self.run.method,
      'options': dataclasses.asdict(self.options),
      'policies': self.policies.to_dict('records'),
      'hindsight': _plain(self.hindsight),
      'errors': _plain(self.errors),
      'settled': self.settled,
      'settling': self.settling,
      'seconds': self.time._asdict() | {'step, even': self.even_seconds},
      'steps': self.steps[1:].tolist(),
      'max / mean': curves,
      'assumptions': ASSUMPTIONS,
    }


def _places(
  experts: int, options: Options
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
  """Returns the policies: from loads [L, E] to shares [L, E, P]."""
  devices = options.devices
  in_order = policies.contiguous(experts, devices)
  return {
    'contiguous': lambda load_LxE: np.stack([in_order] * len(load_LxE)),
    'greedy': functools.partial(policies.greedy, devices=devices),
    'replicas': functools.partial(
      policies.replicas, devices=devices, redundant=options.copies
    ),
  }


def _plain(table: pd.DataFrame) -> dict[str, Any]:
  """Returns a row a key; what is not a number is null in JSON."""
  return table.astype(object).where(table.notna(), None).to_dict('index')
