"""Where experts are: policies that place them on devices by their loads.

A placement is an array of shares: how much of an expert's load each device
gets; they sum to 1 over the devices.

Shape letters: L layers, E experts, P devices, S slots for experts on all
devices, C pairs of an expert and a device that has it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, sparse

# An integer program ends when it is as close to the optimum, or after as long.
_GAP = 0.01
_SECONDS = 2.0


def contiguous(experts: int, devices: int) -> np.ndarray:
  """Places experts in order, equally many on each device, as a mesh does.

  Returns:
    Shares, float64 [E, P].
  """
  return np.repeat(np.eye(devices), experts // devices, axis=0)


def greedy(load_LxE: np.ndarray, devices: int) -> np.ndarray:
  """Places the heaviest expert first, on the least loaded device with room.

  Longest processing time first (Graham, 1969), but each device takes E / P
  experts.

  Returns:
    Shares, float64 [L, E, P]: 1 where an expert is.
  """
  return np.eye(devices)[pack(load_LxE, devices)]


def replicas(load_LxE: np.ndarray, devices: int, redundant: int) -> np.ndarray:
  """Copies heavy experts before placing all as `greedy` does.

  The algorithm of DeepSeek's EPLB, without its groups and nodes. An expert's
  tokens are dealt evenly to its copies. As there, two copies may be on one
  device.

  Returns:
    Shares, float64 [L, E, P].

  References:
    github.com/deepseek-ai/EPLB, read in November 2026; DeepSeek-V3, arXiv
    2412.19437, section 3.4.
  """
  layers, experts = load_LxE.shape
  copies_LxE = copies(load_LxE, redundant)
  expert_LxS = np.stack(
    [np.repeat(np.arange(experts), copies_E) for copies_E in copies_LxE]
  )
  load_LxS = np.take_along_axis(load_LxE / copies_LxE, expert_LxS, axis=1)
  share_LxExP = np.zeros((layers, experts, devices))
  rows = np.arange(layers)[:, None]
  np.add.at(share_LxExP, (rows, expert_LxS, pack(load_LxS, devices)), 1.0)
  return share_LxExP / copies_LxE[..., None]


def copies(load_LxE: np.ndarray, redundant: int) -> np.ndarray:
  """Adds copies one by one, each for the highest load a copy.

  The highest load a copy is then the least possible.

  Returns:
    How often each expert is there, int [L, E].
  """
  rows = np.arange(len(load_LxE))
  copies_LxE = np.ones(load_LxE.shape, int)
  for _ in range(redundant):
    copies_LxE[rows, np.argmax(load_LxE / copies_LxE, axis=1)] += 1
  return copies_LxE


def pack(load_LxS: np.ndarray, devices: int) -> np.ndarray:
  """Packs S items into as many on each device, the heaviest first.

  Of equal items and of equally loaded devices, the first one is taken.

  Returns:
    The device of each item, int [L, S].
  """
  layers, slots = load_LxS.shape
  rows = np.arange(layers)
  load_LxP, room_LxP = np.zeros((2, layers, devices))
  room_LxP += slots // devices
  device_LxS = np.zeros((layers, slots), int)
  for item_L in np.argsort(-load_LxS, axis=1, kind='stable').T:
    device_L = np.argmin(np.where(room_LxP > 0, load_LxP, np.inf), axis=1)
    device_LxS[rows, item_L] = device_L
    load_LxP[rows, device_L] += load_LxS[rows, item_L]
    room_LxP[rows, device_L] -= 1
  return device_LxS


def imbalance(load_E: np.ndarray, share_ExP: np.ndarray) -> np.ndarray:
  """Computes max over mean load of the devices; 1 where there is no load.

  Both arguments may have leading axes, which are broadcast.
  """
  load_P = np.einsum('...e,...ep->...p', load_E, share_ExP)
  mean = load_P.mean(-1)
  return np.where(mean > 0, load_P.max(-1) / np.where(mean > 0, mean, 1.0), 1.0)


def best_split(load_E: np.ndarray, share_ExP: np.ndarray) -> np.ndarray:
  """Splits each expert's load over the devices that have it, at best.

  The linear program: the least t such that no device gets more than t, over all
  splits of loads among the copies that there are. It needs loads that a router
  knows only once all tokens have chosen; DeepSeek's LPLB solves such a program
  for each batch.

  Returns:
    Shares, float64 [E, P].

  References:
    github.com/deepseek-ai/LPLB, read in November 2026.
  """
  experts, devices = share_ExP.shape
  expert_C, device_C = np.nonzero(share_ExP)
  whole_ExC = np.arange(experts)[:, None] == expert_C
  work_PxC = (np.arange(devices)[:, None] == device_C) * load_E[expert_C]
  mean = max(load_E.sum() / devices, 1.0)
  solved = optimize.linprog(
    [0.0] * len(expert_C) + [1.0],
    A_ub=_beside(work_PxC / mean, -1.0),
    b_ub=np.zeros(devices),
    A_eq=_beside(whole_ExC, 0.0),
    b_eq=np.ones(experts),
  )
  split_ExP = np.zeros((experts, devices))
  split_ExP[expert_C, device_C] = solved.x[:-1]
  return split_ExP


class Optimum(NamedTuple):
  """The best placement of whole experts, as far as it was found.

  Attributes:
    imbalance: max over mean load of the best placement found.
    bound: no placement has less.
  """

  imbalance: float
  bound: float


def optimum(
  load_E: np.ndarray, devices: int, *, seconds: float = _SECONDS
) -> Optimum:
  """Places experts at best, E / P on each device, without copies.

  The integer program: the least t such that the loads of no device add up to
  more than t. It knows the loads, as no policy can. Its linear relaxation says
  nothing: experts that may be split over all devices give each the mean, 1.

  Args:
    load_E: of one layer and step.
    devices: P, a divisor of E.
    seconds: after which the best placement so far is taken. It is also taken
      once it is within 1 % of the bound.
  """
  experts, slots = len(load_E), len(load_E) // devices
  if not load_E.any():
    return Optimum(1.0, 1.0)
  load_E = load_E * devices / load_E.sum()  # in units of the mean
  # The heaviest expert has company, of the lightest at best.
  ordered_E = np.sort(load_E)
  bound = max(1.0, ordered_E[-1] + ordered_E[: slots - 1].sum())
  found = imbalance(load_E, greedy(load_E[None], devices)[0]).item()
  if found <= bound * (1 + _GAP):
    return Optimum(found, min(bound, found))
  each_P = sparse.eye_array(devices)
  places_PxPE = sparse.kron(each_P, np.ones((1, experts)))
  places_ExPE = sparse.kron(np.ones((1, devices)), sparse.eye_array(experts))
  work_PxPE = sparse.kron(each_P, load_E[None])
  count = devices * experts
  solved = optimize.milp(
    [0.0] * count + [1.0],
    constraints=[
      optimize.LinearConstraint(_beside(places_PxPE, 0.0), slots, slots),
      optimize.LinearConstraint(_beside(places_ExPE, 0.0), 1.0, 1.0),
      optimize.LinearConstraint(_beside(work_PxPE, -1.0), -np.inf, 0.0),
    ],
    integrality=[1] * count + [0],
    bounds=optimize.Bounds(
      [0.0] * count + [bound], [1.0] * count + [found + 1e-6]
    ),
    options={'time_limit': seconds, 'mip_rel_gap': _GAP},
  )
  if solved.fun is not None:
    found = min(found, solved.fun)
  if solved.mip_dual_bound is not None:
    bound = max(bound, solved.mip_dual_bound)
  return Optimum(found, min(bound, found))


def _beside(matrix: ArrayLike, last: float) -> sparse.csr_array:
  """Adds a column of t, the last variable of a program."""
  column = np.full((matrix.shape[0], 1), last)
  return sparse.csr_array(sparse.hstack([sparse.csr_array(matrix), column]))
