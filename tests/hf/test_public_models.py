"""Public models, in and out: they compute what transformers computes."""

import json
import operator
import pathlib
import shutil
from unittest import mock

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax import hf, nn
from moe_jax.analysis import Run
from moe_jax.hf import __main__ as program
from moe_jax.hf import architectures, importing, tensor_files, tensors
from moe_jax.parallel import mesh as meshes
from moe_jax.runs import checkpoints
from tests import golden_data
from tests.hf.tiny import trained, write_tokenizer

GOLDEN = golden_data.DIRECTORY / 'hf'
NAMES = ['mixtral', 'olmoe', 'qwen3_moe', 'glm4_moe', 'deepseek_v3']


@pytest.fixture(
  scope='module',
  params=[
    'glm4_moe',
    *(
      pytest.param(name, marks=pytest.mark.long)
      for name in NAMES
      if name != 'glm4_moe'
    ),
  ],
)
def imported(request, tmp_path_factory):
  """Name and run of each golden model."""
  workdir = tmp_path_factory.mktemp('hf') / request.param
  (told,) = hf.import_model(str(GOLDEN / request.param), str(workdir))
  assert told.startswith('note: no tokenizer was taken along: ')
  return request.param, Run(workdir)


def test_logits_and_routes_are_those_of_transformers(imported):
  name, run = imported
  model = run.restore().model
  expected = golden_data.load(f'hf/{name}/expected')
  tokens = jnp.asarray(expected['tokens'])
  logits, outputs = _apply(model, tokens)
  scale = np.abs(expected['logits']).max()
  np.testing.assert_allclose(logits, expected['logits'], atol=1e-5 * scale)
  for ours, theirs in zip(
    _hidden_states(model, tokens), expected['hidden'], strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
  loss = -np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits[:, :-1])), tokens[:, 1:, None], -1
  )
  np.testing.assert_allclose(loss.mean(), expected['loss'], atol=1e-5)
  for ours in range(len(outputs.choice.experts)):
    theirs = ours + model.config.dense_layers
    experts, gates = (
      np.asarray(x[ours])
      for x in (outputs.choice.experts, outputs.choice.gates)
    )
    order, order_of_theirs = (
      np.argsort(x, axis=1) for x in (experts, expected[f'experts_{theirs}'])
    )
    np.testing.assert_array_equal(
      np.take_along_axis(experts, order, 1),
      np.take_along_axis(expected[f'experts_{theirs}'], order_of_theirs, 1),
    )
    # 1e-6 is less than float32 leaves open here: beside float64, the expected
    # gates of qwen3_moe are off by 0.8e-6, ours by 1.5e-6, NumPy's by 1.6e-6.
    np.testing.assert_allclose(
      np.take_along_axis(gates, order, 1),
      np.take_along_axis(expected[f'gates_{theirs}'], order_of_theirs, 1),
      atol=2e-6 * model.config.gate_scale,
    )
  # With a cache: the text in two parts.
  cache = model.init_cache(len(tokens), tokens.shape[1])
  first, _, cache = _extend(model, tokens[:, :9], cache)
  second, _, _ = _extend(model, tokens[:, 9:], cache)
  np.testing.assert_allclose(
    np.concatenate([first, second], axis=1), logits, atol=1e-5 * scale
  )


@nnx.jit
def _apply(model, tokens):
  return model(tokens, None, train=False)


@nnx.jit
def _hidden_states(model, tokens):
  """Returns what each layer takes, and what the last norm makes of the last."""
  x_BxSxD = jnp.take(model.embedding.embedding[...], tokens, axis=0)
  states = [x_BxSxD]
  for blocks in filter(None, (model.dense_blocks, model.moe_blocks)):
    graphdef, stacked = nnx.split(blocks)
    for layer in range(len(jax.tree.leaves(stacked)[0])):
      one = jax.tree.map(operator.itemgetter(layer), stacked)
      block = nnx.merge(graphdef, one)
      x_BxSxD, *_ = block(x_BxSxD, None, None, None, train=False)
      states.append(x_BxSxD)
  return [*states[:-1], model.norm(x_BxSxD)]


@nnx.jit
def _extend(model, tokens, cache):
  return model.extend(tokens, cache)


def test_what_is_exported_has_the_same_bytes(imported, tmp_path):
  name, run = imported
  assert hf.export_model(str(run.workdir), str(tmp_path / 'out')) == name
  before, after = (
    tensor_files.find(epath.Path(folder))
    for folder in (GOLDEN / name, tmp_path / 'out')
  )
  assert before.keys() == after.keys()
  for key, tensor in before.items():
    assert after[key].dtype == tensor.dtype
    assert after[key].read().tobytes() == tensor.read().tobytes(), key
  was, public = (
    json.loads((folder / 'config.json').read_text())
    for folder in (GOLDEN / name, tmp_path / 'out')
  )
  (kind, ours), (same_kind, theirs) = map(architectures.read, (public, was))
  assert kind is same_kind and not architectures.differences(ours, theirs)
  # What the decoder does not know is as it was.
  for key in ('attention_dropout', 'max_position_embeddings', 'eos_token_id'):
    assert public[key] == was[key]


def copy(name, tmp_path):
  return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def change(folder, **keys):
  """Sets keys of a config.json; None removes one."""
  path = folder / 'config.json'
  public = json.loads(path.read_text()) | keys
  public = {key: value for key, value in public.items() if value is not None}
  path.write_text(json.dumps(public))
  return public


@pytest.mark.parametrize('name', NAMES)
def test_older_config_means_the_same(name):
  """Rotary options at top level, and names that have changed since."""
  public = json.loads((GOLDEN / name / 'config.json').read_text())
  older = dict(public)
  rope = older.pop('rope_parameters')
  del rope['rope_type']
  older |= rope | {'rope_scaling': None}
  if name == 'qwen3_moe':
    older['num_experts'] = older.pop('num_local_experts')
  assert architectures.read(older) == architectures.read(public)


@pytest.mark.parametrize(
  ('name', 'epsilon', 'renormalized'),
  [
    ('mixtral', 1e-5, True),  # It always does.
    ('olmoe', 1e-5, False),
    ('qwen3_moe', 1e-6, False),
    ('glm4_moe', 1e-5, True),
    ('deepseek_v3', 1e-6, True),
  ],
)
def test_missing_keys_mean_what_transformers_takes(name, epsilon, renormalized):
  public = json.loads((GOLDEN / name / 'config.json').read_text())
  for key in ('rms_norm_eps', 'norm_topk_prob', 'tie_word_embeddings'):
    public.pop(key, None)
  _, model = architectures.read(public)
  assert model.norm_epsilon == epsilon
  assert model.renormalize_gates == renormalized
  assert not model.tied_embeddings


def test_files_beside_the_tensors_are_exported_as_they_came(tmp_path):
  """But nothing that names code."""
  folder, out = copy('mixtral', tmp_path), tmp_path / 'out'
  write_tokenizer(folder / 'tokenizer.json', '</s>')
  change(folder, auto_map={'AutoConfig': 'configuration_mixtral.MixtralConfig'})
  beside = {
    'tokenizer_config.json': '{"eos_token": "</s>", "chat_template": "{{a}}"}',
    'generation_config.json': '{"temperature": 0.6}',
    'chat_template.jinja': '\uff5c{{ a }}',
  }
  for name, text in beside.items():
    (folder / name).write_text(text, encoding='utf-8')
  hf.import_model(str(folder), str(tmp_path / 'run'))
  hf.export_model(str(tmp_path / 'run'), str(out))
  for name, text in beside.items():
    assert (out / name).read_text(encoding='utf-8') == text
  assert 'auto_map' not in json.loads((out / 'config.json').read_text())


def test_texts_begin_as_the_tokenizer_of_the_model_does(tmp_path):
  folder = copy('mixtral', tmp_path)
  write_tokenizer(folder / 'tokenizer.json', '</s>')
  config = {'add_bos_token': True, 'bos_token': 'balance'}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  hf.import_model(str(folder), str(tmp_path / 'run'))
  checkpoint = Run(tmp_path / 'run').restore()
  assert checkpoint.route('router load').ids.tolist() == [1, 4, 8]
  with mock.patch.object(checkpoint, 'continue_ids', return_value=[2]) as ids:
    checkpoint.generate('router', tokens=1)
  ids.assert_called_once_with([1, 4], tokens=1)


def test_positions_are_stretched_as_deepseek_publishes(tmp_path):
  """Its keys, of https://huggingface.co/deepseek-ai/DeepSeek-V3."""
  folder = copy('deepseek_v3', tmp_path)
  published = {
    'max_position_embeddings': 163840,
    'rope_parameters': None,
    'rope_theta': 10000,
    'rope_scaling': {
      'beta_fast': 32,
      'beta_slow': 1,
      'factor': 40,
      'mscale': 1.0,
      'mscale_all_dim': 1.0,
      'original_max_position_embeddings': 4096,
      'type': 'yarn',
    },
  }
  architecture, model = architectures.read(change(folder, **published))
  assert (model.rope_factor, model.rope_length) == (40.0, 4096)
  assert (model.rope_magnitude, model.rope_mscale) == (1.0, 1.0)
  # 1 + 0.1 ln 40, squared.
  width = model.head_width
  assert model.attention_scale == pytest.approx(1.87386 / width**0.5, rel=1e-5)
  written = architectures.write(architecture, model)
  assert architectures.read(written) == (architecture, model)
  assert written['rope_scaling'].items() >= published['rope_scaling'].items()


def test_magnitude_follows_from_the_factor_unless_it_is_given():
  public = json.loads((GOLDEN / 'qwen3_moe' / 'config.json').read_text())
  stretched = {'rope_type': 'yarn', 'rope_theta': 1e6, 'factor': 4.0}
  for more, magnitude in (
    ({}, 1.13863),  # 1 + 0.1 ln 4
    ({'attention_factor': 1.5}, 1.5),
    ({'mscale': 2.0, 'mscale_all_dim': 1.0}, 1.27726 / 1.13863),
  ):
    _, model = architectures.read(
      public | {'rope_parameters': stretched | more}
    )
    assert model.rope_magnitude == pytest.approx(magnitude, rel=1e-5)
    assert model.rope_mscale == 0  # Of latent attention alone.
    assert model.rope_length == public['max_position_embeddings']


@pytest.mark.long
def test_blocks_of_8_bit_floats_are_multiplied_by_their_factors(tmp_path):
  """As DeepSeek-V3 is published; edges have smaller blocks."""
  folder = copy('deepseek_v3', tmp_path)
  change(
    folder,
    quantization_config={'quant_method': 'fp8', 'weight_block_size': [10, 12]},
    dtype='bfloat16',
  )
  planned, meant, random = {}, {}, np.random.default_rng(0)
  for name, tensor in tensor_files.find(epath.Path(folder)).items():
    kind = 'F8_E4M3' if name.endswith('proj.weight') else tensor.dtype
    if name.endswith('norm.weight'):
      kind = 'BF16'
    stored = tensor.read().astype(tensor_files._SIZED[kind]).astype('f')
    planned[name] = tensor_files.Planned(
      kind, tensor.shape, lambda stored=stored: stored
    )
    meant[name] = stored
    if kind == 'F8_E4M3':
      blocks = -(-stored.shape[0] // 10), -(-stored.shape[1] // 12)
      scale = np.float32(random.uniform(0.5, 2.0, blocks))
      planned[f'{name}_scale_inv'] = tensor_files.Planned(
        'F32', blocks, lambda scale=scale: scale
      )
      rows, columns = np.indices(stored.shape)
      meant[name] = stored * scale[rows // 10, columns // 12]
  tensor_files.write(epath.Path(folder), planned)
  hf.import_model(str(folder), str(tmp_path / 'run'))
  assert Run(tmp_path / 'run').config['model']['dtype'] == 'bfloat16'
  hf.export_model(str(tmp_path / 'run'), str(tmp_path / 'out'))
  public = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert 'quantization_config' not in public
  assert public['dtype'] == 'float32'
  out = tensor_files.find(epath.Path(tmp_path / 'out'))
  assert out.keys() == meant.keys()
  for name, values in meant.items():
    np.testing.assert_array_equal(out[name].read(), values, name)
  hf.import_model(str(tmp_path / 'out'), str(tmp_path / 'again'))
  jax.tree.map(
    np.testing.assert_array_equal,
    *(Run(tmp_path / run).restore().params for run in ('run', 'again')),
  )


@pytest.mark.parametrize(
  ('keys', 'scale', 'message'),
  [
    ({'weight_block_size': 128}, 'F32', 'weight_block_size=128: must be like'),
    ({'weight_block_size': [0, 1]}, 'F32', r'weight_block_size=\[0, 1\]: must'),
    ({'weight_block_size': [32, 32]}, 'I32', 'F8_E4M3; must be F32, BF16'),
    ({'weight_block_size': [16, 32]}, 'F32', 'F8_E4M3; must be F32, BF16'),
    ({'quant_method': 'other'}, 'F32', 'F8_E4M3; must be F32, BF16, F16'),
  ],
)
def test_8_bit_floats_without_their_factors_are_refused(
  tmp_path, keys, scale, message
):
  """By blocks of 32 x 32, in a file of this one matrix."""
  folder = copy('mixtral', tmp_path)
  quantization = {'quant_method': 'fp8', 'weight_block_size': [32, 32]} | keys
  change(folder, quantization_config=quantization)
  name = 'model.layers.0.self_attn.q_proj.weight'
  ones = np.ones((32, 32), np.float32)
  kind = tensor_files.Planned
  tensor_files.write(
    epath.Path(folder),
    {
      name: kind('F8_E4M3', ones.shape, lambda: ones),
      f'{name}_scale_inv': kind('F32', (1, 1), lambda: ones[:1, :1]),
    },
  )
  path = folder / tensor_files.SINGLE
  path.write_bytes(path.read_bytes().replace(b'"F32"', f'"{scale}"'.encode()))
  with pytest.raises(ValueError, match=message):
    hf.import_model(str(folder), str(tmp_path / 'run'))


@pytest.mark.long
def test_many_files_bfloat16_and_what_predicts_further_ahead(tmp_path):
  """As public checkpoints are; through two devices."""
  folder = copy('glm4_moe', tmp_path)
  found = tensor_files.find(epath.Path(GOLDEN / 'glm4_moe'))
  planned = {
    name: tensor_files.Planned(
      'F32' if name.endswith('_bias') else 'BF16', tensor.shape, tensor.read
    )
    for name, tensor in found.items()
  }
  ahead = {
    name.replace('layers.1', 'layers.2'): tensor
    for name, tensor in planned.items()
    if '.layers.1.' in name
  }
  (folder / tensor_files.SINGLE).unlink()
  tensor_files.write(epath.Path(folder), planned | ahead, shard=20_000)
  write_tokenizer(folder / 'tokenizer.json', '</s>')
  mesh = meshes.make_mesh(1, 2, devices=jax.devices()[:2])
  workdir = tmp_path / 'run'
  told = hf.import_model(str(folder), str(workdir), mesh=mesh)
  assert told == ['note: layer 2 predicts tokens further ahead; skipped']
  run = Run(workdir)
  assert run.tokenizer.encode('router load').tolist() == [4, 8]
  checkpoint = run.restore()
  assert checkpoint.config.model.dtype == 'bfloat16'
  name = 'model.layers.1.mlp.experts.5.up_proj.weight'
  np.testing.assert_array_equal(
    checkpoint.params['moe_blocks']['feed_forward']['up'][0, 5],
    found[name].read().astype(jnp.bfloat16).astype(np.float32).T,
  )
  bias = found['model.layers.1.mlp.gate.e_score_correction_bias'].read()
  np.testing.assert_array_equal(checkpoint.q, -bias[None])
  out = tmp_path / 'out'
  hf.export_model(str(workdir), str(out))
  assert json.loads((out / 'tokenizer_config.json').read_text()) == {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'eos_token': '</s>',
  }
  assert (out / 'tokenizer.json').exists()
  after = tensor_files.find(epath.Path(out))
  assert after.keys() == planned.keys()
  for name, tensor in planned.items():
    assert after[name].dtype == tensor.dtype
    np.testing.assert_array_equal(
      after[name].read(),
      tensor.values()
      .astype(tensor_files.DTYPES[tensor.dtype])
      .astype(np.float32),
    )


@pytest.mark.parametrize('name', ['mixtral', 'deepseek_v3'])
def test_experts_that_are_one_tensor_are_told_apart(name, tmp_path):
  """As newer releases of transformers hold them."""
  architecture = architectures.ARCHITECTURES[name]
  gate, up, down = architecture.expert
  separate = tensor_files.find(epath.Path(GOLDEN / name))
  fused = {
    key.replace(f'.{architecture.moe}.gate.', '.mlp.gate.'): tensor.read()
    for key, tensor in separate.items()
    if '.experts.' not in key
  }
  for layer in range(2):
    place = f'model.layers.{layer}.{architecture.moe}.experts'
    if f'{place}.0.{gate}.weight' not in separate:
      continue

    def stacked(part, place=place):
      each = [separate[f'{place}.{e}.{part}.weight'].read() for e in range(8)]
      return np.stack(each)

    together = f'model.layers.{layer}.mlp.experts'
    fused[f'{together}.gate_up_proj'] = np.concatenate(
      [stacked(gate), stacked(up)], axis=1
    )
    fused[f'{together}.down_proj'] = stacked(down)
  planned = {
    key: tensor_files.Planned('F32', x.shape, lambda x=x: x)
    for key, x in fused.items()
  }
  tensor_files.write(epath.Path(tmp_path), planned)
  found = importing._of_experts(
    tensor_files.find(epath.Path(tmp_path)), architecture
  )
  assert found.keys() == separate.keys()
  for key, tensor in separate.items():
    np.testing.assert_array_equal(found[key].read(), tensor.read())


def test_each_device_reads_its_part():
  mesh = meshes.make_mesh(2, 4, devices=jax.devices())
  spec = jax.sharding.PartitionSpec(None, 'expert')
  leaf = jax.ShapeDtypeStruct(
    (2, 8, 3, 5), jnp.float32, sharding=jax.NamedSharding(mesh, spec)
  )
  row = tensors.Row(
    '{layer}/{expert}', ('moe_blocks', 'up'), range(1, 3), experts=8
  )
  asked, read = [], {}
  for _, name in row.names():
    read[name] = np.random.default_rng(len(read)).normal(size=(5, 3))

  def part(index):
    names = []
    asked.append(names)

    def tensor(name):
      names.append(name)
      return read[name]

    return row.read(index, leaf.shape, tensor, importing._aligned)

  array = importing._on_devices(leaf, part)
  assert array.sharding == leaf.sharding
  assert len(asked) == 4  # Devices along `data` have the same.
  assert sorted(sum(asked, [])) == sorted(read)
  assert all(len(names) == 4 for names in asked)
  for (layer, expert), name in row.names():
    np.testing.assert_array_equal(
      array[layer, expert], read[name].T.astype(np.float32)
    )


@pytest.mark.parametrize(
  ('name', 'keys', 'message'),
  [
    (
      'mixtral',
      {'model_type': 'mixtrall'},
      "model_type='mixtrall': unknown; did you mean mixtral",
    ),
    ('mixtral', {'model_type': None}, 'model_type=None: unknown'),
    ('mixtral', {'hidden_act': 'gelu'}, "hidden_act='gelu': must be silu"),
    ('mixtral', {'hidden_size': None}, 'hidden_size: missing'),
    ('mixtral', {'hidden_size': 'x'}, "model.width='x': must be of type int"),
    ('mixtral', {'vocab_size': None}, 'data.vocabulary=None'),
    ('mixtral', {'sliding_window': 64}, 'sliding_window=64: attention within'),
    (
      'mixtral',
      {'sliding_window': 4096, 'max_position_embeddings': None},
      'sliding_window=4096: attention within',
    ),
    ('mixtral', {'rope_parameters': None}, 'rope_theta: missing'),
    (
      'olmoe',
      {'rope_parameters': {'rope_type': 'linear', 'rope_theta': 1e4}},
      "rope_type='linear': must be default or yarn",
    ),
    ('qwen3_moe', {'mlp_only_layers': [1]}, r'mlp_only_layers=\[1\]: layers'),
    ('qwen3_moe', {'decoder_sparse_step': 2}, 'decoder_sparse_step=2: must'),
    ('deepseek_v3', {'attention_bias': True}, 'attention_bias=True: must be'),
    ('glm4_moe', {'n_group': 3}, 'model.expert_groups=3'),
    ('glm4_moe', {'rope_parameters': 3}, 'a key has a value of the wrong type'),
    (
      'glm4_moe',
      {'head_dim': 0, 'num_attention_heads': 0},
      'a key has a value',
    ),
    ('olmoe', {'max_position_embeddings': 'x'}, "'<' not supported"),
  ],
)
def test_what_the_decoder_has_not_is_refused(tmp_path, name, keys, message):
  folder = copy(name, tmp_path)
  change(folder, **keys)
  with pytest.raises(ValueError, match=f'config.json: {message}'):
    hf.import_model(str(folder), str(tmp_path / 'run'))
  assert list(tmp_path.iterdir()) == [folder]


def test_tensors_that_do_not_fit_are_refused(tmp_path, capsys):
  folder = copy('mixtral', tmp_path)
  found = tensor_files.find(epath.Path(GOLDEN / 'mixtral'))
  planned = {
    name: tensor_files.Planned('F32', tensor.shape, tensor.read)
    for name, tensor in found.items()
  }
  norm, gate = (
    'model.norm.weight',
    'model.layers.0.block_sparse_moe.gate.weight',
  )
  wide = tensor_files.Planned('F32', (33,), lambda: np.ones(33, np.float32))
  for tensors_, message in (
    ({k: v for k, v in planned.items() if k != gate}, f"'{gate}': missing"),
    (planned | {'a.bias': planned[norm]}, "'a.bias': not of this type"),
    (planned | {norm: wide}, f'{norm} has shape \\(33,\\), but by config.json'),
  ):
    tensor_files.write(epath.Path(folder), tensors_)
    with pytest.raises(ValueError, match=message):
      hf.import_model(str(folder), str(tmp_path / 'run'))
  tensor_files.write(epath.Path(folder), planned)
  path = folder / tensor_files.SINGLE
  data = path.read_bytes()
  size = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8 : 8 + size])
  header[norm]['dtype'] = 'F8_E5M2'
  text = json.dumps(header, separators=(',', ':')).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + size :])
  arguments = ['hf', 'import', str(folder), f'--workdir={tmp_path / "run"}']
  assert program.main(arguments) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert f'{norm} is of type F8_E5M2; must be F32, BF16, F16' in error
  assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'required: command'),
    (['import', 'nowhere', '--workdir=run'], 'nowhere: no such folder'),
    (['import', str(GOLDEN / 'olmoe')], 'required: --workdir'),
    (['import', str(GOLDEN), '--workdir=run'], 'config.json: is not there'),
    (['import', str(GOLDEN / 'olmoe'), '--workdir={here}'], 'is not empty'),
    (
      ['import', str(GOLDEN / 'olmoe'), '--workdir=run', '--expert=9'],
      'cannot arrange',
    ),
    (['export', 'nowhere', '--out=out'], 'no checkpoint of step None'),
    (['export', 'nowhere', '--out=out', '--dtype=int8'], 'must be one of'),
    (['export', 'nowhere', '--out=out', '--step=x'], 'invalid int value'),
  ],
)
def test_the_program_refuses_in_one_line(
  arguments, message, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a').write_text('')
  arguments = [argument.format(here=tmp_path) for argument in arguments]
  assert program.main(['hf', *arguments]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert message in error
  assert [path.name for path in tmp_path.iterdir()] == ['a']


@pytest.mark.long
def test_a_model_of_ours_is_served_with_its_prices(tmp_path):
  """Sigmoid scores with prices are GLM-4-MoE; all that it computes is kept."""
  params, q_LxE = trained(tmp_path / 'run', 0.1, scoring='sigmoid')
  name = hf.export_model(str(tmp_path / 'run'), str(tmp_path / 'out'))
  assert name == 'glm4_moe'
  hf.import_model(str(tmp_path / 'out'), str(tmp_path / 'again'))
  again = Run(tmp_path / 'again').restore()
  ours = checkpoints.read_meta(tmp_path / 'run' / 'checkpoints' / '0')['config']
  assert not architectures.differences(
    config_lib.freeze(ours).model, again.config.model
  )
  np.testing.assert_array_equal(again.q, q_LxE)
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  # Rounded by wish, but not the prices.
  hf.export_model(
    str(tmp_path / 'run'), str(tmp_path / 'small'), dtype='bfloat16'
  )
  small = tensor_files.find(epath.Path(tmp_path / 'small'))
  kinds = {
    name.endswith('e_score_correction_bias'): tensor.dtype
    for name, tensor in small.items()
  }
  assert kinds == {True: 'F32', False: 'BF16'}


def test_prices_of_softmax_scores_cannot_be_said(tmp_path):
  trained(tmp_path / 'run', 0.1, shared_experts=0)
  with pytest.raises(ValueError, match='model.scoring=sigmoid .*balancer.lag'):
    hf.export_model(str(tmp_path / 'run'), str(tmp_path / 'out'))
  trained(tmp_path / 'free', 0.0, shared_experts=0)
  name = hf.export_model(str(tmp_path / 'free'), str(tmp_path / 'out'))
  assert name == 'mixtral'
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    *('free', 'out', 'run')
  ]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({}, 'mixtral, has model.shared_experts=0, not 1'),
    (
      {'scoring': 'sigmoid', 'shared_experts': 0},
      'glm4_moe, has model.shared_experts=1, not 0',
    ),
    (
      {'scoring': 'sigmoid', 'priced': 'logits'},
      'glm4_moe, has model.priced=scores, not logits',
    ),
    (
      {'scoring': 'sigmoid', 'selection': 'choose_evenly'},
      'glm4_moe, has model.selection=choose, not choose_evenly',
    ),
  ],
)
def test_what_no_format_says_is_named(options, message):
  from moe_jax.hf import exporting

  with pytest.raises(ValueError, match=message):
    exporting._architecture(nn.DecoderConfig(**options), None)


@pytest.mark.parametrize(
  ('options', 'name'),
  [
    ({'shared_experts': 0}, 'mixtral'),
    ({'shared_experts': 0, 'query_key_norm': 'whole'}, 'olmoe'),
    (
      {'shared_experts': 0, 'query_key_norm': 'head', 'dense_layers': 2},
      'qwen3_moe',
    ),
    ({'scoring': 'sigmoid', 'attention_bias': 'inputs'}, 'glm4_moe'),
    (
      {'scoring': 'sigmoid', 'rotary_size': 8, 'latent_size': 32},
      'deepseek_v3',
    ),
  ],
)
def test_the_format_follows_from_the_options(options, name):
  architecture, other = architectures.nearest(nn.DecoderConfig(**options))
  assert (architecture.name, other) == (name, {})
