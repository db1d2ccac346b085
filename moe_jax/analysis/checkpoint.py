"""One checkpoint of a run, on the devices that are here.

Shape letters: B batch, S sequence, N all tokens, L layers, E experts, K chosen.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

import moe_jax
from moe_jax import config as config_lib
from moe_jax import nn
from moe_jax.analysis.results import Results
from moe_jax.analysis.routed_text import RoutedText
from moe_jax.parallel import compilers
from moe_jax.runs import checkpoints
from moe_jax.train import state as states

_SEQUENCES_AT_ONCE = 8  # on each device


class Checkpoint:
  """A model as it was after a step; each part is read when first asked for.

  `q` and `router` are small and quick to read, however large the model is.
  What is read is checked against the checksums that were saved with it.

  Args:
    run: whose checkpoint it is.
    step: after which it was saved.
    mesh: where to put the model: with axes 'data' and 'expert', whatever the
      run's own was.

  Attributes:
    path: of the checkpoint.
    step: steps completed.
    config: what it was saved under.
    mesh: where the model is.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: it is damaged, or of another version.
    OSError: it cannot be read now, which does not mean that it is damaged.
  """

  def __init__(self, run: Results, step: int, mesh: Mesh):
    self.path = run.workdir / 'checkpoints' / str(step)
    self.step, self.mesh, self._run = step, mesh, run
    self._version = run.facts.get('versions', {}).get('moe_jax', 'before 0.2')
    self._meta = self._read(checkpoints.read_meta)
    self.config = self._read(
      lambda _: config_lib.freeze(config_lib.upgrade(self._meta['config']))
    )

  def __repr__(self) -> str:
    return f'Checkpoint({str(self.path)!r})'

  @functools.cached_property
  def router(self) -> dict[str, Any]:
    """State of all routers, nested dicts of arrays [L, ...] as NumPy's."""
    return self._read(self._checked, 'router')

  @property
  def q(self) -> np.ndarray:
    """Price of every expert of every MoE layer, float32 [L, E]."""
    return nn.prices(self.router)

  @functools.cached_property
  def params(self) -> dict[str, Any]:
    """All parameters, nested dicts of float32 arrays on the mesh.

    Where the run averages them, that is the average.
    """
    name = states.evaluated_item(self.config)
    return self._read(self._checked, name, self._plan.abstract.params)

  @functools.cached_property
  def model(self) -> nn.Decoder:
    """The language model, which routes with this checkpoint's q."""
    router = self._read(self._checked, 'router', self._plan.abstract.router)
    return nnx.merge(self._plan.graphdef, self.params, router)

  def route(self, text: str) -> RoutedText:
    """Runs the model on a text and tells where each token went; q is frozen.

    Args:
      text: of any length. Each `config.sequence_length` tokens of it are read
        for themselves, as in training. It begins with `tokenizer.beginning`.

    Raises:
      ValueError: the text is empty.
    """
    tokenizer = self._run.tokenizer
    ids_N = tokenizer.encode(text)
    if not len(ids_N):
      raise ValueError("text='': must have at least one token")
    ids_N = np.int32([*tokenizer.beginning, *ids_N])
    length = min(self.config.sequence_length, len(ids_N))
    batch = self.mesh.size * min(
      _SEQUENCES_AT_ONCE, -(-len(ids_N) // (length * self.mesh.size))
    )
    end, shape = (0, -len(ids_N) % (batch * length)), (-1, batch, length)
    mask_N = np.ones_like(ids_N, bool)
    padded = [np.pad(x_N, end).reshape(shape) for x_N in (ids_N, mask_N)]
    graphdef, state = nnx.split(self.model)
    parts = [
      jax.device_get(_route(graphdef, state, tokens_BxS, mask_BxS))
      for tokens_BxS, mask_BxS in zip(*padded, strict=True)
    ]
    experts, gates, scores = (
      np.concatenate(part, axis=1)[:, : len(ids_N)]
      for part in zip(*parts, strict=True)
    )
    tokens = [tokenizer.decode([i]) for i in ids_N]
    return RoutedText(tokens, ids_N, experts, gates, scores, self.q)

  def generate(self, prompt: str, *, tokens: int = 100, **options: Any) -> str:
    """Continues a text.

    A model was never trained on more than `config.sequence_length` tokens.

    Args:
      prompt: the text; '' begins a document.
      tokens: how many to add.
      **options: `temperature`, `top_k` and `seed` of `nn.generate`.

    Returns:
      What follows the prompt.

    Raises:
      ValueError: an option is out of its range.
    """
    tokenizer = self._run.tokenizer
    prompt_S = [*tokenizer.beginning, *tokenizer.encode(prompt)]
    prompt_S = prompt_S or [tokenizer.end_of_document]
    new_N = self.continue_ids(prompt_S, tokens=tokens, **options)
    return tokenizer.decode(new_N)

  def continue_ids(
    self, prompt_S: Sequence[int], *, tokens: int, **options: Any
  ) -> np.ndarray:
    """Returns the ids of the tokens that follow a prompt; see `generate`."""
    # A row for each device; they are all alike.
    prompt_BxS = np.tile(np.int32(prompt_S), (self.mesh.size, 1))
    new_BxN = nn.generate(self.model, prompt_BxS, tokens=tokens, **options)
    return np.asarray(new_BxN)[0]

  def with_balancer(self, **balancer: Any) -> nn.Decoder:
    """Returns the model under another rule, with the prices that it begins at.

    Args:
      **balancer: the rule's `name`, and its options, as in `config.balancer`.

    Raises:
      ValueError: there is no such rule or option.
    """
    plan = self._planned(balancer=balancer)
    return nnx.merge(plan.graphdef, self.params, plan.init_router())

  @functools.cached_property
  def _plan(self) -> states.Training:
    return self._planned()

  def _planned(self, **changes: Any) -> states.Training:
    """Plans a model on this mesh, whatever the run's own mesh and batches."""
    config = dataclasses.replace(
      self.config,
      mesh=config_lib.MeshConfig(),
      batch_size=self.mesh.size,
      accumulation=1,
      model=dataclasses.replace(self.config.model, shards=0),
      **changes,
    )
    return states.make_training(config, self.mesh, optimizer=optax.identity())

  def _checked(self, path, name, abstract=None):
    item = checkpoints.read_item(path, name, abstract)
    checkpoints.check(self._meta, {name: item})
    return item

  def _read(self, read, *arguments):
    """Calls `read` of the path; errors name that and the run's version."""
    try:
      return read(self.path, *arguments)
    except FileNotFoundError as error:
      raise FileNotFoundError(f'{self.path}: {error}') from error
    except Exception as error:  # What damage leads to is not foreseeable.
      if checkpoints.may_pass(error):
        raise OSError(
          f'{self.path}: cannot be read now ({type(error).__name__}: {error})'
        ) from error
      raise ValueError(
        f'{self.path}: cannot be read ({error}); the run began with moe_jax '
        f'{self._version}, this is {moe_jax.__version__}'
      ) from error


@functools.partial(compilers.jit, static_argnums=0)
def _route(graphdef, state, tokens_BxS, mask_BxS):
  model = nnx.merge(graphdef, state, copy=True)
  _, outputs = model(tokens_BxS, mask_BxS, train=False)
  choice = outputs.choice
  experts = jnp.where(choice.active, choice.experts, -1)
  return experts, choice.gates, outputs.scores
