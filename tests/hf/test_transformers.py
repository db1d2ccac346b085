"""What is exported computes the same in transformers.

TRANSFORMERS_PYTHON names an interpreter that has torch and transformers, in an
environment of its own.
"""

import os
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import hf
from moe_jax.analysis import Run
from tests.hf.tiny import trained

PYTHON = os.environ.get('TRANSFORMERS_PYTHON', '')
_LOGITS = """
import sys
import numpy as np
import torch
import transformers

folder, tokens, logits = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(
  folder, dtype=torch.float32, attn_implementation='eager'
).eval()
with torch.no_grad():
  found = model(torch.from_numpy(np.load(tokens))).logits
np.save(logits, found.numpy())
"""


@pytest.mark.long
@pytest.mark.skipif(not PYTHON, reason='TRANSFORMERS_PYTHON is not set')
@pytest.mark.parametrize(
  ('name', 'prices', 'options'),
  [
    ('mixtral', 0.0, {'shared_experts': 0, 'tied_embeddings': False}),
    (
      'olmoe',
      0.0,
      {
        'shared_experts': 0,
        'query_key_norm': 'whole',
        'query_key_value_clip': 0.3,
        'renormalize_gates': False,
      },
    ),
    (
      'qwen3_moe',
      0.0,
      {
        'shared_experts': 0,
        'query_key_norm': 'head',
        'head_size': 6,
        'dense_layers': 1,
        'dense_hidden': 20,
        'attention_bias': 'all',
      },
    ),
    ('glm4_moe', 0.1, {'scoring': 'sigmoid', 'gate_scale': 2.0}),
    (
      'glm4_moe',
      0.1,
      {
        'scoring': 'sigmoid',
        'expert_groups': 2,
        'groups_per_token': 1,
        'attention_bias': 'inputs',
        'query_key_norm': 'head',
        'rotary_size': 4,
        'dense_layers': 1,
        'dense_hidden': 20,
        'shared_experts': 2,
      },
    ),
    (
      'deepseek_v3',
      0.1,
      {
        'scoring': 'sigmoid',
        'latent_size': 6,
        'head_size': 10,
        'rotary_size': 4,
        'value_size': 12,
        'tied_embeddings': False,
      },
    ),
    (
      'deepseek_v3',
      0.1,
      {
        'scoring': 'sigmoid',
        'latent_size': 6,
        'head_size': 20,
        'rotary_size': 12,
        'rope_theta': 100.0,
        'rope_factor': 8.0,
        'rope_length': 64,
        'rope_fast': 4.0,
        'rope_magnitude': 1.1,
        'rope_mscale': 1.0,
      },
    ),
    (
      'mixtral',
      0.0,
      {
        'shared_experts': 0,
        'head_size': 12,
        'rope_theta': 100.0,
        'rope_factor': 8.0,
        'rope_length': 64,
        'rope_fast': 4.0,
        'rope_magnitude': 1.2,
      },
    ),
  ],
)
def test_logits_are_the_same(name, prices, options, tmp_path):
  trained(tmp_path / 'run', prices, **options)
  out = tmp_path / 'out'
  assert hf.export_model(str(tmp_path / 'run'), str(out)) == name
  tokens_BxS = np.random.default_rng(0).integers(0, 300, (2, 11))
  np.save(tmp_path / 'tokens.npy', tokens_BxS)
  files = [str(tmp_path / file) for file in ('tokens.npy', 'logits.npy')]
  subprocess.run([PYTHON, '-c', _LOGITS, str(out), *files], check=True)
  model = Run(tmp_path / 'run').restore().model
  logits, _ = model(jnp.asarray(tokens_BxS, jnp.int32), None, train=False)
  expected = np.load(tmp_path / 'logits.npy')
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits, expected, atol=2e-5 * scale)
