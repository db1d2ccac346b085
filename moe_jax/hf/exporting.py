"""From a run to a folder that transformers, vLLM and SGLang read."""

from collections.abc import Callable, Mapping
import dataclasses
import json
from typing import Any

from etils import epath
import jax
import numpy as np
import optax

from moe_jax import config as config_lib
from moe_jax import nn
from moe_jax.config import Config
from moe_jax.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from moe_jax.hf import architectures, folders, tensor_files, tensors
from moe_jax.hf.architectures import Architecture
from moe_jax.hf.tensor_files import Planned
from moe_jax.options import Option
from moe_jax.parallel import mesh as meshes
from moe_jax.runs import checkpoints, files
from moe_jax.runs.reader import Reader
from moe_jax.train import state as states

_DTYPES = {'float32': 'F32', 'bfloat16': 'BF16'}


def export_model(
  workdir: str, out: str, *, step: int | None = None, dtype: str = ''
) -> str:
  """Writes the model of a run in the public format that can say it.

  That of an imported one is the format that it came in, with how it generates
  and its tokenizer; another model gets the first that computes the same. Prices
  become the bias by which experts are chosen, and stay float32.

  Args:
    workdir: of the run.
    out: folder to make; must not exist, or be empty.
    step: of the checkpoint; None takes the newest.
    dtype: 'float32' or 'bfloat16'; '' is what tensors were imported as, and
      float32 for a model that was not.

  Returns:
    The model type.

  Raises:
    ValueError, OSError: there is no such checkpoint, it is damaged, or no
      format can say what the model computes.
  """
  Option(among=('', *_DTYPES)).check('--dtype', dtype)
  run = Reader(workdir)
  steps = run.checkpoints
  step = steps[-1] if step is None and steps else step
  if step not in steps:
    raise ValueError(
      f'{workdir}: no checkpoint of step {step}; there are {steps or "none"}'
    )
  path = run.workdir / 'checkpoints' / str(step)
  meta = checkpoints.read_meta(path)
  config = config_lib.freeze(config_lib.upgrade(meta['config']))
  imported = run.workdir / folders.PUBLIC
  was = files.read_json(imported) if imported.exists() else {}
  architecture = _architecture(config.model, was.get('config'))
  with folders.made(out, '--out') as folder:
    items = _read(path, config, meta)
    q_LxE = np.asarray(nn.prices(items['router']))
    if not architecture.corrected and q_LxE.any():
      raise ValueError(_no_prices(architecture))
    public = _public(architecture, config, was.get('config', {}))
    kept = was.get('files', {})
    for name in kept.keys() & set(folders.BESIDE):  # No other is written.
      files.write(folder / name, kept[name].encode())
    _add_tokenizer(run, folder, public, config.data.vocabulary)
    known = was.get('dtypes', {})
    if dtype:
      known = {}
    default = _DTYPES[dtype or 'float32']
    planned = {
      name: Planned(known.get(name, default), shape, values)
      for name, shape, values in _theirs(architecture, config, public, items)
    }
    for layer, name in enumerate(
      tensors.corrections(architecture, config.model)
    ):
      planned[name] = _correction(-q_LxE[layer], known.get(name, 'F32'))
    types = {tensor.dtype for tensor in planned.values()}
    kind = 'bfloat16' if 'BF16' in types else 'float32'
    if known and 'quantization_config' in was['config']:
      kind = 'float32'  # What had factors is exact in no less.
    elif known:
      kind = public.get('dtype', public.get('torch_dtype', kind))
    public |= {'dtype': kind, 'torch_dtype': kind}
    files.write_json(folder / 'config.json', public)
    tensor_files.write(folder, planned)
  return architecture.name


def _architecture(
  model: nn.DecoderConfig, public: Mapping[str, Any] | None
) -> Architecture:
  """Returns the type of model that says what ours computes.

  Raises:
    ValueError: there is none.
  """
  if public is not None:
    architecture, imported = architectures.read(public)
    if not architectures.differences(model, imported):
      return architecture
  architecture, other = architectures.nearest(model)
  if other:
    has = ', '.join(
      f'model.{name}={value}, not {getattr(model, name)}'
      for name, value in sorted(other.items())
    )
    raise ValueError(
      'no public format says what this model computes; the nearest, '
      f'{architecture.name}, has {has}'
    )
  return architecture


def _no_prices(architecture: Architecture) -> str:
  return (
    f'{architecture.name}: its routers have prices, which no public format '
    'subtracts from softmax scores; a model with model.scoring=sigmoid can be '
    'exported with its prices as glm4_moe, best trained with balancer.lag=True '
    '(or loss_free), whose choices, as in serving, are by prices known before'
  )


def _read(
  path: epath.Path, config: Config, meta: dict[str, Any]
) -> checkpoints.Items:
  """Reads parameters and routers, once, and checks them."""
  mesh = meshes.make_mesh(1, 1, devices=jax.devices()[:1])
  config = dataclasses.replace(
    config,
    mesh=config_lib.MeshConfig(),
    batch_size=1,
    accumulation=1,
    model=dataclasses.replace(config.model, shards=0),
  )
  abstract = states.make_training(
    config, mesh, optimizer=optax.identity()
  ).abstract
  name = states.evaluated_item(config)
  items = {
    name: checkpoints.read_item(path, name, abstract.params),
    'router': checkpoints.read_item(path, 'router', abstract.router),
  }
  checkpoints.check(meta, items)
  return {'params': items[name], 'router': items['router']}


def _public(
  architecture: Architecture, config: Config, was: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the config.json: what it was, with what the options say."""
  public = {'max_position_embeddings': config.sequence_length, **was}
  public |= architectures.write(architecture, config.model)
  public['vocab_size'] = config.data.vocabulary
  if 'num_nextn_predict_layers' in public:
    public['num_nextn_predict_layers'] = 0  # They were skipped.
  public.pop('quantization_config', None)  # Written as what it stands for.
  public.pop('auto_map', None)  # Names code that is not exported.
  return public


def _theirs(
  architecture: Architecture,
  config: Config,
  public: Mapping[str, Any],
  items: checkpoints.Items,
):
  """Yields name, shape and how to make each tensor but the corrections."""
  rows = tensors.table(architecture, config.model, public)
  params = tensors.leaves(items['params'])
  assert params.keys() == {row.ours for row in rows}
  for row in rows:
    ours = params[row.ours]
    shape = row.shape(ours.shape)
    for place, name in row.names():
      yield name, shape, _values(row, ours, place)


def _values(
  row: tensors.Row, ours: jax.Array, place: tuple[int, ...]
) -> Callable[[], np.ndarray]:
  return lambda: row.to_theirs(np.asarray(ours)[place])


def _correction(bias_E: np.ndarray, dtype: str) -> Planned:
  """Keeps a bias as it was stored, unless it has become finer than that."""
  kind = tensor_files.DTYPES[dtype]
  if not np.array_equal(bias_E.astype(kind).astype(np.float32), bias_E):
    dtype = 'F32'
  return Planned(dtype, bias_E.shape, lambda: bias_E)


def _add_tokenizer(
  run: Reader, folder: epath.Path, public: dict[str, Any], vocabulary: int
) -> None:
  """Writes the run's tokenizer, if it has one."""
  if not (run.workdir / 'tokenizer.json').exists():
    return
  end = run.facts.get('end_of_document', END_OF_DOCUMENT)
  text = json.dumps(run.tokenizer)
  tokenizer = Tokenizer.from_json(text, vocabulary, end)
  public.setdefault('bos_token_id', None)
  public.setdefault('eos_token_id', tokenizer.end_of_document)
  (folder / 'tokenizer.json').write_text(text)
  if not (folder / 'tokenizer_config.json').exists():
    files.write_json(
      folder / 'tokenizer_config.json',
      {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': end},
    )
