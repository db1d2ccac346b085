"""lm-evaluation-harness asks a work directory, on a task that lies here.

It is not in requirements-dev.txt, as it brings some 40 packages along.
"""

import importlib.util
import json
import pathlib

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

  class Asked:
    def __init__(self, *args):
      self.args = args

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
