"""Loads MiniMind's reference weights into our decoder."""

import json

from flax import nnx
import jax.numpy as jnp
import numpy as np

from moe_jax import nn


def decoder_config(golden, **overrides) -> nn.DecoderConfig:
  """Translates MiniMind's configuration."""
  config = json.loads(str(golden['config_json']))
  return nn.DecoderConfig(
    width=config['dim'],
    hidden=config['hidden_dim'],
    experts=config['n_routed_experts'],
    experts_per_token=config['num_experts_per_tok'],
    shared_experts=int(config['n_shared_experts']),
    scoring=config['scoring_func'],
    renormalize_gates=config['norm_topk_prob'],
    layers=config['n_layers'],
    heads=config['n_heads'],
    kv_heads=config['n_kv_heads'],
    rope_theta=config['rope_theta'],
    norm_epsilon=config['norm_eps'],
    **overrides,
  )


def vocabulary(golden) -> int:
  """Returns the number of tokens that MiniMind knows."""
  return json.loads(str(golden['config_json']))['vocab_size']


def set_weights(model: nn.Decoder, golden) -> None:
  """Overwrites every parameter; ours are [in, out], MiniMind's [out, in]."""
  layers, experts = model.config.layers, model.config.experts

  def stacked(name):
    return np.stack([golden[f'layers_{i}_{name}'] for i in range(layers)])

  def transposed(name):
    return stacked(name).swapaxes(-1, -2)

  def of_experts(name):
    per_expert = [transposed(f'moe_expert_{e}_{name}') for e in range(experts)]
    return np.stack(per_expert, axis=1)

  block = model.moe_blocks
  moe = block.feed_forward
  values = [
    (model.embedding.embedding, golden['token_embedding']),
    (model.norm.scale, golden['final_norm']),
    (block.attention_norm.scale, stacked('attention_norm')),
    (block.feed_forward_norm.scale, stacked('ffn_norm')),
    (block.attention.query.kernel, transposed('attention_wq')),
    (block.attention.key.kernel, transposed('attention_wk')),
    (block.attention.value.kernel, transposed('attention_wv')),
    (block.attention.out.kernel, transposed('attention_wo')),
    (moe.router, transposed('moe_gate')),
    (moe.gate, of_experts('w1')),
    (moe.down, of_experts('w2')),
    (moe.up, of_experts('w3')),
    (moe.shared.gate.kernel, transposed('moe_shared_expert_w1')),
    (moe.shared.down.kernel, transposed('moe_shared_expert_w2')),
    (moe.shared.up.kernel, transposed('moe_shared_expert_w3')),
  ]
  assert len(values) == len(nnx.to_flat_state(nnx.state(model, nnx.Param)))
  for variable, value in values:
    assert variable.shape == value.shape, (variable, value.shape)
    variable[...] = jnp.asarray(value)
