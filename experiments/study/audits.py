"""What is found out about the last checkpoint of a run, beside its metrics.

An audit returns rows of a table: name -> column -> number.

Shape letters: D domains, E experts, V vocabulary.
"""

from collections.abc import Callable
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments.study import runs
from experiments.study.runs import Arm
from moe_jax import analysis, data, routing
from moe_jax.analysis import causality as causality_program
from moe_jax.analysis import causality_audit
from moe_jax.analysis.expert_statistics import chosen
from moe_jax.analysis.placement_study import Options, Study

DOMAIN = 'domain information [nats]'
TOKENS = 8192  # of each text
ARRIVALS = 2048
SHUFFLES = 5
Rows = dict[str, dict[str, float]]


def causality(run: analysis.Run) -> Rows:
  """Tells which routes change with the tokens that follow, and the losses."""
  checkpoint = run.restore()
  tokens_BxS = causality_program.text_of(run, checkpoint)
  length = tokens_BxS.shape[1]
  found = causality_audit.causality(
    checkpoint.model,
    tokens_BxS,
    [part * length // 4 - 1 for part in (1, 2, 3)],
    passes=('frozen', 'solved'),
  )
  return {
    name: {'routes flipped': each.flipped, 'loss [nats]': each.loss}
    for name, each in found.items()
  }


def specialisation(run: analysis.Run) -> Rows:
  """Tells how much an expert says of a token's domain and of the token.

  Of validation text, as many tokens of each domain; means over layers. Mutual
  information is beyond what routes that are shuffled over the tokens have: so
  many tokens say something by chance, the more the evener the loads.
  """
  checkpoint = run.restore()
  text = data.load_text(checkpoint.config.data)
  routed = [
    run.route(run.tokenizer.decode(tokens_N[:TOKENS]))
    for tokens_N in text.evaluation.values()
  ]
  ids = np.concatenate([each.ids for each in routed])
  domain = np.repeat(range(len(routed)), [len(each.ids) for each in routed])
  layers = []
  for layer in range(len(checkpoint.q)):
    chosen_SxE = np.concatenate([chosen(each, layer) for each in routed])
    by_domain_DxE = _counts(domain, chosen_SxE)
    layers.append(
      {
        # Of an expert's tokens, those of its most frequent domain.
        'purity': by_domain_DxE.max(axis=0).sum() / by_domain_DxE.sum(),
        DOMAIN: _beyond_chance(domain, chosen_SxE),
        'token information [nats]': _beyond_chance(ids, chosen_SxE),
      }
    )
  means = {key: float(np.mean([x[key] for x in layers])) for key in layers[0]}
  return {'validation': means}


def _beyond_chance(label_S: np.ndarray, chosen_SxE: np.ndarray) -> float:
  random = np.random.default_rng(0)
  shuffled = [
    _information(_counts(random.permutation(label_S), chosen_SxE))
    for _ in range(SHUFFLES)
  ]
  return _information(_counts(label_S, chosen_SxE)) - float(np.mean(shuffled))


def _counts(label_S: np.ndarray, chosen_SxE: np.ndarray) -> np.ndarray:
  """Counts the routes from each label to each expert."""
  counts = np.zeros((label_S.max() + 1, chosen_SxE.shape[1]))
  np.add.at(counts, label_S, chosen_SxE)
  return counts


def _information(counts: np.ndarray) -> float:
  """Returns the mutual information of rows and columns, in nats."""
  joint = counts / counts.sum()
  apart = joint.sum(axis=0) * joint.sum(axis=1, keepdims=True)
  there = joint > 0
  return float(np.sum(joint[there] * np.log(joint[there] / apart[there])))


def online(run: analysis.Run) -> Rows:
  """Assigns the tokens of a text one by one, by rules of more or less memory.

  The scores are those of the trained router. Of each rule, means over layers:
  regret in % of the offline optimum where what is beyond an expert's capacity
  earns nothing, MaxVio, and bytes of memory of a layer.
  """
  checkpoint = run.restore()
  text = data.load_text(checkpoint.config.data)
  tokens_N = next(iter(text.evaluation.values()))[:ARRIVALS]
  scores = run.route(run.tokenizer.decode(tokens_N)).scores
  k = checkpoint.config.model.experts_per_token
  arrivals, experts = scores.shape[1:]
  capacity = -(-arrivals * k // experts)
  rules = {
    'top-k': routing.StreamRule(
      lambda experts: (), lambda state, x: (state, jax.lax.top_k(x, k)[1])
    )
  }
  priced = {'exact': routing.online_exact} | {
    f'{bins} bins': functools.partial(routing.online_histogram, bins=bins)
    for bins in (10, 100, 1000)
  }
  for name, rule in priced.items():
    rules[name] = rule(arrivals, k=k, iterations=2)
    rules[f'{name}, paced'] = rule(arrivals, k=k, iterations=2, paced=True)
  found = {}
  for name, rule in rules.items():
    assign = jax.jit(lambda x, rule=rule: routing.assign_stream(rule, x))
    layers = []
    for scores_SxE in scores:
      optimum = routing.lp_optimum(scores_SxE, k).value
      choice, state = assign(jnp.asarray(scores_SxE))
      regret = routing.regret(choice, optimum, capacity=capacity)
      violation = routing.max_violation(choice.load)
      size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
      layers.append([100 * float(regret), float(violation), size])
    keys = 'regret [%]', 'MaxVio', 'bytes a layer'
    means = np.mean(layers, axis=0).tolist()
    found[name] = dict(zip(keys, means, strict=True))
  return found


def placement(run: analysis.Run) -> Rows:
  """Tells how even the loads of 8 devices are under policies of placement.

  Load of the fullest over the mean: means over layers and steps. The last two
  are means over ten steps, and know the loads.
  """
  study = Study(run, Options(devices=8))
  predictors = {'contiguous': '-', 'greedy': 'ema', 'replicas': 'ema'}
  found = {
    policy: float(study.placed[policy, predictor].imbalance_NxL.mean())
    for policy, predictor in predictors.items()
  }
  best = [
    'replicas, tokens split at best',
    'optimum without copies, loads known',
  ]
  return {'8 devices': found | study.hindsight[best].mean().to_dict()}


def path(
  audit: Callable[[analysis.Run], Rows],
  arm: Arm,
  results: pathlib.Path = runs.RESULTS,
) -> pathlib.Path:
  """Returns the file of what was found out about an arm's last seed."""
  name = arm.path(max(arm.seeds), results).name
  return results / 'audits' / audit.__name__ / arm.experiment / name


def stored(
  audit: Callable[[analysis.Run], Rows],
  arm: Arm,
  results: pathlib.Path = runs.RESULTS,
) -> Rows:
  """Returns what is stored of an audit; nothing where it was not made."""
  file = path(audit, arm, results)
  return json.loads(file.read_text())['found'] if file.exists() else {}


def run(
  audit: Callable[[analysis.Run], Rows],
  arm: Arm,
  workdir: pathlib.Path,
  results: pathlib.Path = runs.RESULTS,
) -> None:
  """Audits the last seed of an arm; trains it again if it is not there."""
  seed = max(arm.seeds)
  directory = runs.train(arm, seed, workdir)
  found = audit(analysis.Run(directory))
  of_run = runs.origin(arm, seed, directory)
  runs.write({**of_run, 'found': found}, path(audit, arm, results))
