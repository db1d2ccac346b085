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


def test_a_long_continuation_is_read_in_parts(model):
  """Each part after as much of what is before it as the model reads."""
  random = np.random.default_rng(1)
  context, continuation = (random.integers(0, VOCABULARY, n) for n in (3, 95))
  (found,) = log_likelihoods(
    model, [(context, continuation)], longest=LONGEST, batch=2
  )
  parts = [
    by_hand(model, [*context, *continuation[:start]], part)
    for start, part in zip(
      range(0, 95, LONGEST),
      np.split(continuation, range(LONGEST, 95, LONGEST)),
      strict=True,
    )
  ]
  assert len(parts) == 3
  assert found.log == pytest.approx(sum(log for log, _ in parts), rel=1e-5)
  assert found.greedy == all(greedy for _, greedy in parts)


def test_refuses_an_empty_context(model):
  with pytest.raises(ValueError, match='context 0 is empty'):
    log_likelihoods(model, [([], [1])], longest=LONGEST, batch=1)
