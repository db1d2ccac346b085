"""Log-likelihoods are those of the model alone, whatever they are padded to."""

import jax
import numpy as np
import pytest

from moe_jax.analysis.likelihood import Likelihood, log_likelihoods
from tests.analysis.test_causality import VOCABULARY, build

LONGEST = 40


@pytest.fixture(scope='module')
def model():
  return build('bip')


def by_hand(model, context, continuation):
  tokens = np.int32([*context, *continuation])[-LONGEST - 1 :]
  logits, _ = model(tokens[None, :-1], train=False)
  logs = np.float64(jax.nn.log_softmax(logits[0]))[-len(continuation) :]
  best = np.argmax(logs, axis=-1)
  return (
    logs[np.arange(len(continuation)), list(continuation)].sum(),
    bool((best == np.int32(continuation)).all()),
  )


def test_padding_and_order_change_nothing(model):
  """Of lengths on both sides of a power of two, and longer than is read."""
  random = np.random.default_rng(0)
  sizes = [(1, 1), (30, 4), (3, 2), (31, 1), (50, 3), (1, 40)]
  requests = [
    tuple(random.integers(0, VOCABULARY, size).tolist() for size in pair)
    for pair in sizes
  ]
  found = log_likelihoods(model, requests, longest=LONGEST, batch=4)
  for each, request in zip(found, requests, strict=True):
    log, greedy = by_hand(model, *request)
    assert each.log == pytest.approx(log, rel=1e-5)
    assert each.greedy == greedy


def test_what_is_most_likely_is_greedy(model):
  logits, _ = model(np.int32([[7, 3]]), train=False)
  best = int(np.argmax(logits[0, -1]))
  requests = [([7, 3], [best]), ([7, 3], [(best + 1) % VOCABULARY])]
  found = log_likelihoods(model, requests, longest=LONGEST, batch=2)
  assert [each.greedy for each in found] == [True, False]
  assert found[1].log < found[0].log < 0


def test_nothing_that_follows_is_certain(model):
  requests = [([1], [])]
  found = log_likelihoods(model, requests, longest=LONGEST, batch=1)
  assert found == [Likelihood(0.0, True)]


@pytest.mark.parametrize(
  ('request_', 'words'),
  [
    (([], [1]), 'context 0 is empty'),
    (([1], [1] * 41), 'continuation 0 has 41 tokens, the model reads 40'),
  ],
)
def test_refuses(model, request_, words):
  with pytest.raises(ValueError, match=words):
    log_likelihoods(model, [request_], longest=LONGEST, batch=1)
