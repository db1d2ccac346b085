"""lm-evaluation-harness asks a work directory, on a task that lies here.

It is not in requirements-dev.txt, as it brings some 40 packages along.
"""

import importlib.util
import json
import pathlib
import sys
import types

import numpy as np
import pytest

from moe_jax.analysis import harness
from moe_jax.analysis.run import Run

STORED = pathlib.Path(__file__).parents[1] / 'runs/stored/bip'
INSTALLED = importlib.util.find_spec('lm_eval') is not None
TASK = """
task: two_words
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{target}"
{more}
"""
QUESTIONS = [
  {'text': 'Friends, Romans,', 'choices': [' countrymen', ' lend'], 'label': 0},
  {'text': 'To be, or not', 'choices': [' to be', ' the'], 'label': 1},
  {'text': 'A text', 'choices': [' of', ' an expert'], 'label': 0},
]


@pytest.mark.skipif(INSTALLED, reason='lm_eval is installed')
def test_what_to_install_is_said(capsys):
  assert harness.main([f'--run={STORED}', '--tasks=lambada_openai']) == 2
  assert 'pip install -r requirements-harness.txt' in capsys.readouterr().err


class Asked:
  """A request of the harness."""

  def __init__(self, *args):
    self.args = args


@pytest.fixture
def answering(monkeypatch, request):
  """A model that answers ' of', ends the document and goes on; its prompts."""
  library = types.SimpleNamespace(LM=object)
  monkeypatch.setitem(sys.modules, 'lm_eval.api.model', library)
  run, prompts = Run(STORED), []
  end = run.tokenizer.end_of_document

  def answer(prompt_S, *, tokens, temperature):
    prompts.append(list(prompt_S))
    encode = run.tokenizer.encode
    return np.array([*encode(' of'), end, *encode(' another')])

  run.tokenizer.beginning = getattr(request, 'param', [])
  checkpoint = run.restore()
  monkeypatch.setattr(checkpoint, 'continue_ids', answer)
  return harness.language_model(run, checkpoint), prompts


def test_an_answer_ends_with_its_document(answering):
  model, prompts = answering
  asked = Asked('To be', {'until': ['.'], 'max_gen_toks': 4})
  assert model.generate_until([asked]) == [' of']
  tokenizer = Run(STORED).tokenizer
  start = tokenizer.end_of_document
  assert prompts == [[start, *tokenizer.encode('To be')]]


@pytest.mark.parametrize('answering', [[7, 5]], indirect=True)
def test_a_prompt_begins_as_the_texts_of_the_model(answering):
  model, prompts = answering
  model.generate_until([Asked('To be', {'max_gen_toks': 4})])
  assert prompts == [[7, 5, *Run(STORED).tokenizer.encode('To be')]]


def test_prompt_and_answer_fit_into_a_sequence(answering):
  model, prompts = answering
  text = 'To be, or not to be, that is the question'
  model.generate_until([Asked(text, {'max_gen_toks': 4})])
  assert prompts == [Run(STORED).tokenizer.encode(text)[-12:].tolist()]
  with pytest.raises(ValueError, match='max_gen_toks=16: must be less than'):
    model.generate_until([Asked(text, {'max_gen_toks': 16})])


def write_task(folder, kind, target, more):
  data = folder / 'questions.json'
  data.write_text('\n'.join(map(json.dumps, QUESTIONS)))
  text = TASK.format(data=data, kind=kind, target=target, more=more)
  (folder / 'two_words.yaml').write_text(text)


@pytest.mark.long
@pytest.mark.skipif(not INSTALLED, reason='requirements-harness.txt has it')
@pytest.mark.parametrize(
  ('kind', 'target', 'more', 'metric'),
  [
    ('multiple_choice', '{{label}}', 'doc_to_choice: choices', 'acc,none'),
    ('loglikelihood_rolling', '{{text}}', '', 'word_perplexity,none'),
    (
      'generate_until',
      '{{choices[label]}}',
      'generation_kwargs: {until: ["."], max_gen_toks: 3}',
      'exact_match,none',
    ),
  ],
)
def test_a_task(kind, target, more, metric, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
  monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
  write_task(tmp_path, kind, target, more)
  out = tmp_path / 'out.json'
  command = [
    f'--run={STORED}',
    '--tasks=two_words',
    f'--include={tmp_path}',
    f'--out={out}',
  ]
  assert harness.main(command) == 0
  found = json.loads(out.read_text())['results']['two_words']
  assert (
    f'| two_words | {metric.partition(",")[0]} |' in capsys.readouterr().out
  )
  if kind == 'multiple_choice':
    assert found[metric] == pytest.approx(by_hand())
  else:
    assert found[metric] >= 0


def by_hand():
  """Accuracy from the likelihoods of the choices, each by itself."""
  run = Run(STORED)
  model = harness.language_model(run, run.restore())

  right = 0
  for each in QUESTIONS:
    logs = [
      model.loglikelihood([Asked(each['text'], choice)])[0][0]
      for choice in each['choices']
    ]
    right += logs.index(max(logs)) == each['label']
  return right / len(QUESTIONS)


@pytest.mark.skipif(not INSTALLED, reason='requirements-harness.txt has it')
def test_an_unknown_task_is_refused(capsys):
  assert harness.main([f'--run={STORED}', '--tasks=nowhere']) == 2
  assert '--tasks=nowhere: the harness has no such task' in (
    capsys.readouterr().err
  )
