"""From a folder of a public model to a work directory."""

from collections.abc import Callable, Mapping
import dataclasses
import json
import math
import re
from typing import Any
import uuid

from etils import epath
import jax
from jax.sharding import Mesh
import numpy as np
import optax

from moe_jax import config as config_lib
from moe_jax import nn
from moe_jax.config import Config
from moe_jax.data import pretrained
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.hf import architectures, folders, tensor_files, tensors
from moe_jax.hf.architectures import Architecture
from moe_jax.hf.tensor_files import DTYPES, FP8, Tensor
from moe_jax.hf.tensors import Row
from moe_jax.options import one_line, shown
from moe_jax.parallel import mesh as meshes
from moe_jax.runs import checkpoints, files, records
from moe_jax.runs.saver import Saver
from moe_jax.train import facts as facts_lib
from moe_jax.train import state as states

_LONGEST = 4096  # Tokens of a text that are routed together, if it allows them.
_ALIGNED = 64  # Arrays that begin at such an address, jax need not copy.


def import_model(
  folder: str, workdir: str, *, mesh: Mesh | None = None
) -> list[str]:
  """Makes a work directory of a public model; reads one tensor at a time.

  All that can be refused is, before anything is written: a work directory is
  there whole or not at all.

  Args:
    folder: has config.json and model.safetensors, or an index of several.
    workdir: to make; must not exist, or be empty.
    mesh: where the parameters are put on their way, each device reading its
      part; None takes the first device.

  Returns:
    Lines that say what was left out.

  Raises:
    ValueError: the model is of another type, or not whole; or there is
      something at `workdir`.
  """
  source = epath.Path(folder).expanduser()
  if not source.is_dir():
    raise ValueError(f'{folder}: no such folder')
  public = tensor_files.read_json(source / 'config.json')
  try:
    architecture, model = architectures.read(public)
    config = _config(public, architecture.corrected, model)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{source / "config.json"}: {error}') from error
  mesh = mesh or meshes.make_mesh(1, 1, devices=jax.devices()[:1])
  training = _training(config, mesh)
  rows = {row.ours: row for row in tensors.table(architecture, model, public)}
  biases = tensors.corrections(architecture, model)
  found, told = _without_what_is_not_used(
    _of_experts(_scaled(tensor_files.find(source), public), architecture),
    public,
  )
  _check(source, found, rows, biases, training.abstract.params, model.experts)
  dtypes = {tensor.dtype for tensor in found.values()}
  if 'BF16' in dtypes:
    config = dataclasses.replace(
      config, model=dataclasses.replace(model, dtype='bfloat16')
    )
  tokenizer, why = _tokenizer(source, config.data.vocabulary)
  beside = {
    name: (source / name).read_bytes().decode()
    for name in folders.BESIDE
    if (source / name).is_file()
  }
  with folders.made(workdir, '--workdir') as place:
    params = _parameters(training.abstract.params, rows, found)
    router = _router(training, found, biases)
    _write(place, config, params, router, tokenizer)
    dtypes = {
      name: 'F32' if tensor.scale else tensor.dtype
      for name, tensor in found.items()
    }
    was = {'config': public, 'dtypes': dtypes, 'files': beside}
    files.write_json(place / folders.PUBLIC, was)
  return told + why


def _config(public: Mapping[str, Any], corrected: bool, model) -> Config:
  """Returns the options of a run that has this model and no text yet."""
  longest = public.get('max_position_embeddings', _LONGEST)
  # The correction of the choice is what this rule makes.
  balancer = 'loss_free' if corrected else 'unbalanced'
  return config_lib.freeze(
    {
      'balancer': config_lib.balancer_options(balancer),
      'model': dataclasses.asdict(model),
      'sequence_length': min(longest, _LONGEST),
      'data': {
        'dataset': '',
        'vocabulary': public.get('vocab_size'),
        'evaluation_sets': 'validation',
      },
    }
  )


def _training(config: Config, mesh: Mesh) -> states.Training:
  """Plans the model on the mesh."""
  config = dataclasses.replace(config, batch_size=mesh.size)
  return states.make_training(config, mesh, optimizer=optax.identity())


def _scaled(
  found: dict[str, Tensor], public: Mapping[str, Any]
) -> dict[str, Tensor]:
  """Gives matrices of 8-bit floats the factors of their blocks.

  Published DeepSeek-V3 is stored so: one factor for 128 x 128 entries.
  """
  quantization = public.get('quantization_config') or {}
  block = quantization.get('weight_block_size')
  if quantization.get('quant_method') != 'fp8' or not block:
    return found
  rows_and_columns = isinstance(block, list) and len(block) == 2
  if not rows_and_columns or not all(type(n) is int and n > 0 for n in block):
    raise ValueError(
      f'weight_block_size={shown(block)}: must be like [128, 128]'
    )
  scaled = dict(found)
  for name, tensor in found.items():
    scale = found.get(f'{name}_scale_inv')
    if tensor.dtype != FP8 or len(tensor.shape) != 2 or scale is None:
      continue
    blocks = tuple(-(-n // m) for n, m in zip(tensor.shape, block, strict=True))
    if scale.shape == blocks and scale.dtype in DTYPES:
      scaled[name] = tensor._replace(scale=scale, block=tuple(block))
      del scaled[f'{name}_scale_inv']
  return scaled


def _of_experts(
  found: dict[str, Tensor], architecture: Architecture
) -> dict[str, Tensor]:
  """Finds the matrices of every expert where they are stored as one tensor.

  Newer releases of transformers compute with `gate_up_proj` [E, 2F, D] and
  `down_proj` [E, D, F], some checkpoints have them so.
  """
  gate, up, down = architecture.expert
  separate = {}
  for name, tensor in found.items():
    layer, _, part = name.rpartition('.mlp.experts.')
    parts = {'gate_up_proj': (gate, up), 'down_proj': (down,)}.get(part, ())
    if not parts or len(tensor.shape) != 3 or tensor.dtype not in DTYPES:
      separate[name] = tensor
      continue
    experts, rows, columns = tensor.shape
    shape = rows // len(parts), columns
    size = math.prod(shape) * DTYPES[tensor.dtype].itemsize
    each = ((expert, part) for expert in range(experts) for part in parts)
    for number, (expert, part) in enumerate(each):
      place = f'{layer}.{architecture.moe}.experts.{expert}.{part}.weight'
      separate[place] = tensor._replace(
        shape=shape, start=tensor.start + number * size
      )
  if separate.keys() == found.keys():
    return separate
  # In such a layer the router goes by the newer name as well.
  return {
    name.replace('.mlp.gate.', f'.{architecture.moe}.gate.'): tensor
    for name, tensor in separate.items()
  }


def _without_what_is_not_used(
  found: dict[str, Tensor], public: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
  """Drops tensors that no model here has; says which."""
  layers, kept, predictors = public['num_hidden_layers'], {}, set()
  for name, tensor in found.items():
    layer = re.match(r'model\.layers\.(\d+)\.', name)
    if layer and int(layer[1]) >= layers:
      predictors.add(int(layer[1]))
    elif name.endswith('.rotary_emb.inv_freq'):
      pass  # It follows from the options.
    elif name != 'lm_head.weight' or not public.get('tie_word_embeddings'):
      kept[name] = tensor
  told = [
    f'note: layer {layer} predicts tokens further ahead; skipped'
    for layer in sorted(predictors)
  ]
  return kept, told


def _check(
  source: epath.Path,
  found: Mapping[str, Tensor],
  rows: Mapping[tuple[str, ...], Row],
  biases: list[str],
  abstract: Any,
  experts: int,
) -> None:
  """Raises ValueError unless the tensors are those of the table."""
  for name, tensor in found.items():
    if tensor.dtype not in DTYPES and tensor.scale is None:
      raise ValueError(
        f'{tensor.file}: {name} is of type {one_line(tensor.dtype)}; must be '
        f'{", ".join(DTYPES)}, so convert the checkpoint first'
      )
  wanted = dict.fromkeys(biases, (experts,))
  ours = tensors.leaves(abstract)
  assert ours.keys() == rows.keys(), ours.keys() ^ rows.keys()
  for path, row in rows.items():
    shape = row.shape(ours[path].shape)
    wanted |= {name: shape for _, name in row.names()}
  for names, what in (
    (wanted.keys() - found.keys(), 'missing'),
    (found.keys() - wanted.keys(), 'not of this type of model'),
  ):
    if names:
      raise ValueError(f'{source}: {tensor_files.names(names)}: {what}')
  for name, tensor in found.items():
    if tensor.shape != wanted[name]:
      raise ValueError(
        f'{tensor.file}: {name} has shape {tensor.shape}, but by config.json '
        f'{wanted[name]}'
      )


def _tokenizer(
  source: epath.Path, vocabulary: int
) -> tuple[Tokenizer | None, list[str]]:
  """Reads the tokenizer of a folder, or says why there is none."""
  try:
    tokenizer = pretrained.open_tokenizer(str(source))
    why = (
      f'it needs {tokenizer.vocabulary} ids, the model has {vocabulary}'
      if tokenizer.vocabulary > vocabulary
      else ''
    )
  except ValueError as error:
    why = one_line(error).removeprefix(f'--tokenizer={source}: ')
  if why:
    return None, [f'note: no tokenizer was taken along: {why}']
  return tokenizer, []


def _parameters(
  abstract: Any,
  rows: Mapping[tuple[str, ...], Row],
  found: Mapping[str, Tensor],
) -> Any:
  """Reads all parameters, each device its part."""

  def read(path, leaf):
    row = rows[tuple(key.key for key in path)]

    def part(index):
      return row.read(
        index, leaf.shape, lambda name: found[name].read(), _aligned
      )

    return _on_devices(leaf, part)

  return jax.tree.map_with_path(read, abstract)


def _on_devices(
  leaf: jax.ShapeDtypeStruct, read: Callable[..., np.ndarray]
) -> jax.Array:
  """Makes a sharded array; parts that are the same are read once."""
  parts, shards = {}, []
  where = leaf.sharding.addressable_devices_indices_map(leaf.shape)
  for device, index in where.items():
    key = tuple(i.indices(n) for i, n in zip(index, leaf.shape, strict=True))
    if key not in parts:
      parts[key] = read(index)
    shards.append(jax.device_put(parts[key], device))
  return jax.make_array_from_single_device_arrays(
    leaf.shape, leaf.sharding, shards
  )


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
  """Returns an empty float32 array that jax on CPU takes as it is."""
  size = math.prod(shape) * 4
  room = np.empty(size + _ALIGNED, np.uint8)
  start = -room.ctypes.data % _ALIGNED
  return room[start : start + size].view(np.float32).reshape(shape)


def _router(
  training: states.Training, found: Mapping[str, Tensor], biases: list[str]
) -> Any:
  """Makes the routers' state, of prices that are the corrections, negated."""
  router = training.init_router()
  if not biases:
    return router
  q_LxE = np.stack([-found[name].read() for name in biases])
  return nn.carry_prices(q_LxE, router)


def _write(
  workdir: epath.Path,
  config: Config,
  params: Any,
  router: Any,
  tokenizer: Tokenizer | None,
) -> None:
  """Writes what a run leaves before its first step."""
  options = config_lib.to_dict(config)
  total, active = nn.parameter_counts(config.model, params)
  facts = {
    'run': uuid.uuid4().hex,
    'versions': facts_lib.versions(),
    'parameters': total,
    'active_parameters': active,
    'tokens_per_step': config.batch_size * config.sequence_length,
  }
  if tokenizer is not None:
    text = tokenizer.to_json()
    facts['end_of_document'] = tokenizer.end_of_document_token
    facts['beginning'] = tokenizer.beginning
    files.write_json(workdir / 'tokenizer.json', json.loads(text))
  files.write_json(workdir / 'config.json', options)
  files.write_json(workdir / 'run.json', facts)
  files.write(workdir / records.NAME, b'')
  items = {'params': params, 'router': router}
  # What is written at a time is the part of a device.
  largest = max(
    leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)
  )
  with Saver(
    workdir / 'checkpoints', options, facts['run'], losses={}, largest=largest
  ) as saver:
    saver.save(items, checkpoints.Position(), record={}, wait=True)
