"""What config.json says of a public model, in our options, and back.

One entry of `ARCHITECTURES` a model type: keys that are options by another
name, options that it always has, and two functions for the rest.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, NamedTuple

from moe_jax.nn import DecoderConfig
from moe_jax.options import build, expected, shown

Public = Mapping[str, Any]  # A config.json.


class Architecture(NamedTuple):
  """A type of model.

  Attributes:
    name: `model_type` of config.json.
    model_class: the class of transformers.
    keys: of config.json -> the option that has this value.
    defaults: values of keys that a config.json may lack, as in transformers.
    always: options that every model of this type has.
    read: from config.json to the options that are left.
    write: from the options to the keys of config.json that are left.
    moe: name of a feed-forward layer with experts among the tensors.
    expert: names of an expert's `gate`, `up` and `down`.
    corrected: whether the choice of experts adds a bias to their scores, -q.
  """

  name: str
  model_class: str
  keys: Mapping[str, str]
  defaults: Mapping[str, Any]
  always: Mapping[str, Any]
  read: Callable[[Public], dict[str, Any]]
  write: Callable[[DecoderConfig], dict[str, Any]]
  moe: str = 'mlp'
  expert: tuple[str, str, str] = ('gate_proj', 'up_proj', 'down_proj')
  corrected: bool = False


_KEYS = {
  'hidden_size': 'width',
  'num_hidden_layers': 'layers',
  'num_attention_heads': 'heads',
  'rms_norm_eps': 'norm_epsilon',
  'num_experts_per_tok': 'experts_per_token',
  'tie_word_embeddings': 'tied_embeddings',
}
_GROUPED = _KEYS | {'num_key_value_heads': 'kv_heads'}
_CORRECTED = {
  'moe_intermediate_size': 'hidden',
  'intermediate_size': 'dense_hidden',
  'n_routed_experts': 'experts',
  'n_shared_experts': 'shared_experts',
  'norm_topk_prob': 'renormalize_gates',
  'routed_scaling_factor': 'gate_scale',
  'n_group': 'expert_groups',
  'topk_group': 'groups_per_token',
  'first_k_dense_replace': 'dense_layers',
}


def _rope(public: Public) -> dict[str, Any]:
  """Reads rotary positions; newer releases have them in `rope_parameters`."""
  rope = public.get('rope_parameters') or {}
  scaling = public.get('rope_scaling') or rope
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  theta = rope.get('rope_theta', public.get('rope_theta'))
  if theta is None:
    raise ValueError('rope_theta: missing')
  if kind == 'yarn':
    return {'rope_theta': float(theta), **_yarn(public, scaling)}
  if kind != 'default':
    raise ValueError(
      f'rope_type={shown(kind)}: must be default or yarn, no other way to '
      'stretch positions is known here'
    )
  return {'rope_theta': float(theta)}


def _yarn(public: Public, scaling: Public) -> dict[str, Any]:
  """Reads how positions are stretched, as transformers does."""
  if not scaling.get('truncate', True):
    raise ValueError('truncate=False: is not known here')
  longest = public.get('max_position_embeddings')
  length = public.get(
    'original_max_position_embeddings',
    scaling.get('original_max_position_embeddings', longest),
  )
  factor = float(scaling.get('factor') or longest / length)
  whole = scaling.get('mscale_all_dim') or 0.0
  magnitude = scaling.get('attention_factor')
  if magnitude is None:
    scale = scaling.get('mscale')
    above, below = (scale, whole) if scale and whole else (1, 0)
    magnitude = _mscale(factor, above) / _mscale(factor, below)
  return {
    'rope_factor': factor,
    'rope_length': length,
    'rope_fast': float(scaling.get('beta_fast') or 32),
    'rope_slow': float(scaling.get('beta_slow') or 1),
    'rope_magnitude': float(magnitude),
    # Only one type of model has it act on all of a head.
    'rope_mscale': float(whole) if 'kv_lora_rank' in public else 0.0,
  }


def _mscale(factor: float, weight: float) -> float:
  """Returns by how much YaRN enlarges entries."""
  return 1 + 0.1 * weight * math.log(factor)


def _write_rope(config: DecoderConfig, **more: Any) -> dict[str, Any]:
  rope: dict[str, Any] = {'rope_type': 'default', **more}
  if config.rope_factor > 1:
    rope |= {
      'rope_type': 'yarn',
      'type': 'yarn',
      'factor': config.rope_factor,
      'original_max_position_embeddings': config.rope_length,
      'beta_fast': config.rope_fast,
      'beta_slow': config.rope_slow,
      'attention_factor': config.rope_magnitude,
    }
    if config.rope_mscale:
      rope['mscale_all_dim'] = config.rope_mscale
      if config.rope_magnitude == 1:  # As others than transformers read it.
        rope['mscale'] = config.rope_mscale
  # Older releases read the keys at top level, newer ones the group.
  return {
    'rope_parameters': rope | {'rope_theta': config.rope_theta},
    'rope_theta': config.rope_theta,
    'rope_scaling': rope if config.rope_factor > 1 else None,
    **more,
  }


def _must_be(public: Public, **wanted: Any) -> None:
  """Raises ValueError where a key has a value that means another model."""
  for key, value in wanted.items():
    found = public.get(key, value)
    if found != value:
      raise ValueError(f'{key}={shown(found)}: must be {value} here')


def _full_attention(public: Public) -> None:
  """Raises ValueError where attention does not reach back to the start."""
  window = public.get('sliding_window')
  used = public.get('use_sliding_window', True) and window
  if used and window < public.get('max_position_embeddings', math.inf):
    raise ValueError(
      f'sliding_window={shown(window)}: attention within a window is not known '
      'here'
    )


def _read_mixtral(public: Public) -> dict[str, Any]:
  _full_attention(public)
  return {'head_size': public.get('head_dim') or 0, **_rope(public)}


def _write_mixtral(config: DecoderConfig) -> dict[str, Any]:
  return {'head_dim': config.head_width, **_write_rope(config)}


def _read_olmoe(public: Public) -> dict[str, Any]:
  return {
    'attention_bias': 'all' if public.get('attention_bias') else 'none',
    'query_key_value_clip': float(public.get('clip_qkv') or 0),
    **_rope(public),
  }


def _write_olmoe(config: DecoderConfig) -> dict[str, Any]:
  return {
    'attention_bias': config.attention_bias == 'all',
    'clip_qkv': config.query_key_value_clip or None,
    **_write_rope(config),
  }


def _read_qwen3(public: Public) -> dict[str, Any]:
  _full_attention(public)
  _must_be(public, decoder_sparse_step=1)
  dense = public.get('mlp_only_layers') or []
  if sorted(dense) != list(range(len(dense))):
    raise ValueError(
      f'mlp_only_layers={shown(dense)}: layers without experts must be the '
      'first ones'
    )
  # Newer releases call the number of experts as Mixtral does.
  experts = public.get('num_experts', public.get('num_local_experts'))
  if experts is None:
    raise ValueError('num_experts: missing')
  return {
    'experts': experts,
    'head_size': public.get('head_dim') or 0,
    'attention_bias': 'all' if public.get('attention_bias') else 'none',
    'dense_layers': len(dense),
    **_rope(public),
  }


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
  return {
    'num_experts': config.experts,
    'num_local_experts': config.experts,
    'head_dim': config.head_width,
    'attention_bias': config.attention_bias == 'all',
    'decoder_sparse_step': 1,
    'mlp_only_layers': list(range(config.dense_layers)),
    'sliding_window': None,
    'use_sliding_window': False,
    **_write_rope(config),
  }


def _read_glm4(public: Public) -> dict[str, Any]:
  head = public.get('head_dim') or (
    public['hidden_size'] // public['num_attention_heads']
  )
  rope = public.get('rope_parameters') or {}
  share = rope.get(
    'partial_rotary_factor', public.get('partial_rotary_factor', 0.5)
  )
  return {
    'head_size': head,
    'rotary_size': int(head * share),
    'attention_bias': 'inputs' if public.get('attention_bias') else 'none',
    'query_key_norm': 'head' if public.get('use_qk_norm') else 'none',
    **_rope(public),
  }


def _write_glm4(config: DecoderConfig) -> dict[str, Any]:
  head = config.head_width
  return {
    'head_dim': head,
    'attention_bias': config.attention_bias == 'inputs',
    'use_qk_norm': config.query_key_norm == 'head',
    **_write_rope(
      config, partial_rotary_factor=(config.rotary_size or head) / head
    ),
  }


def _read_deepseek(public: Public) -> dict[str, Any]:
  _must_be(
    public,
    attention_bias=False,
    scoring_func='sigmoid',
    topk_method='noaux_tc',
    moe_layer_freq=1,
  )
  return {
    # In latent attention every head has keys of its own.
    'kv_heads': public['num_attention_heads'],
    'head_size': public['qk_nope_head_dim'] + public['qk_rope_head_dim'],
    'query_latent_size': public.get('q_lora_rank') or 0,
    **_rope(public),
  }


def _write_deepseek(config: DecoderConfig) -> dict[str, Any]:
  return {
    'num_key_value_heads': config.heads,
    'qk_nope_head_dim': config.head_width - config.rotary_size,
    'qk_head_dim': config.head_width,
    'head_dim': config.rotary_size,
    'v_head_dim': config.value_width,
    'q_lora_rank': config.query_latent_size or None,
    'attention_bias': False,
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'moe_layer_freq': 1,
    **_write_rope(config),
  }


_NO_SHARED = {'scoring': 'softmax', 'shared_experts': 0}

# The ones before are taken where several could express a model.
ARCHITECTURES = {
  architecture.name: architecture
  for architecture in (
    Architecture(
      'mixtral',
      'MixtralForCausalLM',
      _GROUPED
      | {'num_local_experts': 'experts', 'intermediate_size': 'hidden'},
      {'rms_norm_eps': 1e-5},
      _NO_SHARED,
      _read_mixtral,
      _write_mixtral,
      moe='block_sparse_moe',
      expert=('w1', 'w3', 'w2'),
    ),
    Architecture(
      'olmoe',
      'OlmoeForCausalLM',
      _GROUPED
      | {
        'num_experts': 'experts',
        'intermediate_size': 'hidden',
        'norm_topk_prob': 'renormalize_gates',
      },
      {'rms_norm_eps': 1e-5, 'norm_topk_prob': False},
      _NO_SHARED | {'query_key_norm': 'whole'},
      _read_olmoe,
      _write_olmoe,
    ),
    Architecture(
      'qwen3_moe',
      'Qwen3MoeForCausalLM',
      _GROUPED
      | {
        'moe_intermediate_size': 'hidden',
        'intermediate_size': 'dense_hidden',
        'norm_topk_prob': 'renormalize_gates',
      },
      {
        'rms_norm_eps': 1e-6,
        'norm_topk_prob': False,
        'use_sliding_window': False,
      },
      _NO_SHARED | {'query_key_norm': 'head'},
      _read_qwen3,
      _write_qwen3,
    ),
    Architecture(
      'glm4_moe',
      'Glm4MoeForCausalLM',
      _GROUPED | _CORRECTED,
      {'rms_norm_eps': 1e-5, 'norm_topk_prob': True},
      {'scoring': 'sigmoid'},
      _read_glm4,
      _write_glm4,
      corrected=True,
    ),
    Architecture(
      'deepseek_v3',
      'DeepseekV3ForCausalLM',
      _KEYS
      | _CORRECTED
      | {
        'kv_lora_rank': 'latent_size',
        'qk_rope_head_dim': 'rotary_size',
        'v_head_dim': 'value_size',
      },
      {'rms_norm_eps': 1e-6, 'norm_topk_prob': True},
      {'scoring': 'sigmoid'},
      _read_deepseek,
      _write_deepseek,
      corrected=True,
    ),
  )
}


def read(public: Public) -> tuple[Architecture, DecoderConfig]:
  """Translates a config.json.

  Raises:
    ValueError: the model is of another type, or has what the decoder has not;
      the message names the key.
  """
  name = public.get('model_type')
  if name not in ARCHITECTURES:
    raise ValueError(
      f'model_type={shown(name)}: {expected(name, ARCHITECTURES)}'
    )
  architecture = ARCHITECTURES[name]
  _must_be(public, hidden_act='silu')
  public = {'tie_word_embeddings': False, **architecture.defaults, **public}
  try:
    options = {option: public[key] for key, option in architecture.keys.items()}
    options |= architecture.read(public) | dict(architecture.always)
  except KeyError as error:
    raise ValueError(f'{error.args[0]}: missing') from error
  except (TypeError, AttributeError, ArithmeticError) as error:
    raise ValueError(
      f'a key has a value of the wrong type ({error})'
    ) from error
  return architecture, build(DecoderConfig, options, 'model.')


def write(architecture: Architecture, config: DecoderConfig) -> dict[str, Any]:
  """Translates a model's options; whether they fit is asked by `nearest`."""
  return {
    'architectures': [architecture.model_class],
    'model_type': architecture.name,
    'hidden_act': 'silu',
    **{
      key: getattr(config, option) for key, option in architecture.keys.items()
    },
    **architecture.write(config),
  }


def nearest(config: DecoderConfig) -> tuple[Architecture, dict[str, Any]]:
  """Finds the type of model that says the most of a decoder.

  Returns:
    It, and its values of the options that it has otherwise: none where it
    expresses the decoder.
  """
  found = []
  for architecture in ARCHITECTURES.values():
    public = write(architecture, config)
    if 'n_shared_experts' in public:  # Public implementations always have one.
      public['n_shared_experts'] = max(1, config.shared_experts)
    try:
      _, near = read(public)
    except ValueError:  # The type has no such heads.
      continue
    found.append((architecture, differences(config, near)))
  # Other scores are the greatest difference: prices have no place in some.
  return min(found, key=lambda each: ('scoring' in each[1], len(each[1])))


def differences(config: DecoderConfig, other: DecoderConfig) -> dict[str, Any]:
  """Returns the other's values of options by which they compute differently."""
  wanted, has = _computed(config), _computed(other)
  both = has.keys() & wanted.keys()
  return {name: has[name] for name in both if has[name] != wanted[name]}


def _computed(config: DecoderConfig) -> dict[str, Any]:
  """Returns the options that decide what a trained model computes."""
  options = dataclasses.asdict(config) | {
    'head_size': config.head_width,
    'value_size': config.value_width,
    'rotary_size': config.rotary_size or config.head_width,
  }
  for name in (
    'dtype',
    'remat',
    'remat_policy',
    'shards',
    'round_to_capacity',
  ):
    del options[name]  # Of training, or of the device.
  del options['most_experts_per_token']  # Of other selections than 'choose'.
  if not config.dense_layers:
    del options['dense_hidden']
  if config.latent_size:
    del options['kv_heads']
  if config.expert_groups == 1:
    del options['groups_per_token']
  if config.rope_factor == 1:
    for name in ('rope_length', 'rope_fast', 'rope_slow', 'rope_mscale'):
      del options[name]
  return options
