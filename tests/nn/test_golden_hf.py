"""Routers of public checkpoints, as transformers computes them."""

import json

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import nn, routing
from tests import golden_data


def _tensor(path, name):
  """Reads one float32 tensor of a safetensors file."""
  data = path.read_bytes()
  size = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8 : 8 + size])[name]
  first, end = (8 + size + offset for offset in header['data_offsets'])
  return np.frombuffer(data[first:end], np.float32).reshape(header['shape'])


@pytest.mark.parametrize(
  'name',
  [
    pytest.param('mixtral', marks=pytest.mark.long),
    pytest.param('olmoe', marks=pytest.mark.long),
    pytest.param('qwen3_moe', marks=pytest.mark.long),
    'glm4_moe',
    'deepseek_v3',
  ],
)
def test_experts_and_gates_follow_from_the_router_logits(name):
  folder = golden_data.DIRECTORY / 'hf' / name
  expected = golden_data.load(f'hf/{name}/expected')
  public = json.loads((folder / 'config.json').read_text())
  layer = public['num_hidden_layers'] - 1
  logits = expected[f'router_logits_{layer}']
  experts = logits.shape[1]
  corrected = 'n_group' in public
  moe = nn.MoE(
    nn.MoEConfig(
      width=experts,  # The logits themselves are the tokens.
      hidden=8,
      experts=experts,
      experts_per_token=public['num_experts_per_tok'],
      scoring='sigmoid' if corrected else 'softmax',
      expert_groups=public.get('n_group', 1),
      groups_per_token=public.get('topk_group', 1),
      renormalize_gates=public.get('norm_topk_prob', True),
      gate_scale=public.get('routed_scaling_factor', 1.0),
    ),
    routing.loss_free(),
    rngs=nnx.Rngs(0),
  )
  moe.router[...] = jnp.eye(experts)
  if corrected:
    bias = _tensor(
      folder / 'model.safetensors',
      f'model.layers.{layer}.mlp.gate.e_score_correction_bias',
    )
    moe.state.set_value(routing.State(-jnp.asarray(bias)))
  _, output = moe(jnp.asarray(logits)[None], train=False)
  theirs = expected[f'experts_{layer}']
  order = np.argsort(theirs, axis=1)
  ours = np.argsort(output.choice.experts, axis=1)
  np.testing.assert_array_equal(
    np.take_along_axis(np.asarray(output.choice.experts), ours, 1),
    np.take_along_axis(theirs, order, 1),
  )
  np.testing.assert_allclose(
    np.take_along_axis(np.asarray(output.choice.gates), ours, 1),
    np.take_along_axis(expected[f'gates_{layer}'], order, 1),
    rtol=1e-6,
  )
