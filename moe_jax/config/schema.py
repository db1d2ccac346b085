"""Every option of a training run, as frozen dataclasses."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
import re
from typing import Any

from moe_jax import routing
from moe_jax.config.balancers import METHODS, balancer_options, make_balancer
from moe_jax.data import DataConfig
from moe_jax.data.config import split_names
from moe_jax.nn import DecoderConfig
from moe_jax.options import Option, check_options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each axis of the mesh; -1 takes what is left."""

  data: int = option(-1, least=-1, most=2**20, change='yes')
  """Copies of the model, each with its own part of the batch."""
  expert: int = option(1, least=-1, most=2**14, change='yes')
  """Parts into which the experts are split."""
  expert_across: bool = option(False, change='yes')
  """Whether these parts may lie in several slices of TPUs or nodes of GPUs;
  every MoE layer then sends its rows through their slower network."""
  fsdp: bool = option(False, change='yes')
  """Whether parameters and optimizer state are split over `data` as well
  (ZeRO-3); needs model.remat."""

  def __post_init__(self):
    check_options(self, 'mesh.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossesConfig:
  """Weights of losses on every router, added to the balancer's; 0.0 is off."""

  sequence: float = option(0.0, least=0, most=1e6, change='named')
  """Auxiliary loss over each sequence (DeepSeek-V3 has 1e-4)."""
  batch: float = option(0.0, least=0, most=1e6, change='named')
  """Auxiliary loss over each microbatch."""
  step: float = option(0.0, least=0, most=1e6, change='named')
  """Auxiliary loss over the optimizer step, all microbatches so far."""
  similarity: float = option(0.0, least=0, most=1e6, change='named')
  """Mean distance of the router's columns from orthonormal ones (SimBal)."""
  z: float = option(0.0, least=0, most=1e6, change='named')
  """Mean of logsumexp(logits)^2."""

  def __post_init__(self):
    check_options(self, 'losses.')

  def make(self) -> list[Callable[..., Any]]:
    """Returns the losses that are on."""
    losses = [
      (
        self.sequence,
        functools.partial(routing.auxiliary_loss, over='sequence'),
      ),
      (self.batch, functools.partial(routing.auxiliary_loss, over='batch')),
      (self.step, functools.partial(routing.auxiliary_loss, over='step')),
      (self.similarity, routing.similarity_loss),
      (self.z, routing.z_loss),
    ]
    return [loss(weight) for weight, loss in losses if weight]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """How parameters move, by optax's names; its state follows from the name."""

  name: str = option('adamw', among=('adamw', 'adafactor', 'muon'))
  """Optimizer. 'muon' takes the matrices of all layers, and AdamW the rest."""
  schedule: str = option(
    'cosine', among=('cosine', 'linear', 'wsd', 'constant'), change='named'
  )
  """Of the learning rate after warm-up: to its end by a cosine or linearly,
  'wsd' linearly in the last `decay_steps` only, 'constant' never."""
  end: float = option(0.1, least=0, most=1, change='named')
  """Learning rate at the end, in units of its peak."""
  decay_steps: int = option(0, least=0, most=10**9, change='named')
  """Last steps of 'wsd', in which the learning rate falls."""
  b1: float = option(0.9, least=0, most=0.999999, change='named')
  """Decay of AdamW's mean of gradients."""
  b2: float = option(0.999, least=0, most=0.999999, change='named')
  """Decay of AdamW's mean of their squares."""
  eps: float = option(1e-8, above=0, most=1, change='named')
  """Added to the root of that mean."""
  first_moment: str = option('float32', among=('float32', 'bfloat16'))
  """Type of the mean of gradients in memory, of AdamW and Muon."""
  average: float = option(0.0, least=0, most=0.9999)
  """Decay, each step, of a moving average of the parameters, which begins at
  the first ones; 0.0 keeps none. It is what is evaluated, analysed and
  exported, saved beside the parameters; `init_from` takes the latter."""
  decay: str = option('all', among=('all', 'matrices'), change='named')
  """What `weight_decay` acts on: all parameters, as in MiniMind, or all but
  the scales of norms."""

  def __post_init__(self):
    check_options(self, 'optimizer.')
    for name in ('b1', 'b2', 'eps', 'first_moment'):
      value, default = getattr(self, name), getattr(OptimizerConfig, name)
      if self.name == 'adafactor' and value != default:
        raise ValueError(
          f'optimizer.{name}={value}: not with optimizer.name=adafactor, which '
          f'has none; leave it at {default}'
        )
    if (self.schedule == 'wsd') != bool(self.decay_steps):
      raise ValueError(
        f'optimizer.decay_steps={self.decay_steps}: 1 or more with '
        f'optimizer.schedule=wsd, and 0 with all others; it is {self.schedule}'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One training run.

  Raises:
    ValueError: a value is impossible; the message names option and value.
  """

  steps: int = option(200, least=1, most=10**9, change='named')
  """Optimizer steps. The learning rate falls to its end over all of them, so it
  jumps where a run is continued with another number."""
  seed: int = option(0, least=0, most=2**32 - 1)  # jax takes it modulo 2^32.
  """Seed of the initial weights and of the order of the data."""
  batch_size: int = option(8, least=1, most=2**24, change='named')
  """Sequences per step, over all devices and microbatches."""
  sequence_length: int = option(256, least=2, most=2**24, change='named')
  """Tokens per sequence."""
  accumulation: int = option(1, least=1, most=2**24, change='named')
  """Microbatches per step, computed one after the other."""
  learning_rate: float = option(5e-4, above=0, most=1e3, change='named')
  """Peak of the learning rate, after warm-up."""
  warmup_steps: int = option(0, least=0, most=10**9, change='named')
  """Steps of linear warm-up."""
  weight_decay: float = option(0.01, least=0, most=1e3, change='named')
  """Weight decay of the optimizer."""
  gradient_clip: float = option(1.0, least=0, most=1e30, change='named')
  """Greatest global norm of the gradient; 0.0 is off."""
  capacity_factor: float = option(0.0, least=0, most=2**14, change='named')
  """Room of each expert in training, in units of its even share; what does not
  fit is dropped. 0.0 is dropless; evaluation always is."""
  eval_every: int = option(0, least=0, most=10**9, change='named')
  """Steps between evaluations; 0 evaluates at the end only."""
  eval_sequences: int = option(256, least=0, most=10**9, change='named')
  """Most sequences of each evaluation set that are evaluated; 0 takes all."""
  eval_solved: bool = option(True, change='named')
  """Whether each evaluation makes a second pass, in which the balancer solves
  for the prices of each batch."""
  checkpoint_every: int = option(100, least=1, most=10**9, change='yes')
  """Steps between checkpoints; the last step is saved as well."""
  checkpoints_kept: int = option(2, least=1, most=10**6, change='yes')
  """Number of newest checkpoints to keep."""
  checkpoints_kept_every: int = option(0, least=0, most=10**9, change='yes')
  """Steps between further checkpoints to keep; 0 keeps none of them."""
  checkpoints_kept_best: int = option(0, least=0, most=10**6, change='yes')
  """Number of checkpoints to keep by lowest validation loss, of a mixture the
  mean over its sets, of those at steps with an evaluation."""
  skipped_steps: int = option(10, least=1, most=10**9, change='yes')
  """Number of skipped steps in a row that end the run. A step whose loss,
  gradient or router logits are not finite is skipped: it changes nothing."""
  experts_every: int = option(1, least=1, most=10**9, change='yes')
  """Steps between records of every expert's load, gates and price, the greater
  part of the metrics where there are many experts."""
  profile: str = option('', change='yes')
  """START:STEPS, such as '100:3': the profiler runs from step START on for that
  many, and leaves in the work directory what TensorBoard and xprof open; ''
  never."""
  tracker: str = option('', among=('', 'wandb'), change='yes')
  """Service that gets a copy of the metrics: 'wandb', Weights & Biases, for
  which the user is logged in or has set WANDB_MODE=offline; empty for none."""
  tracker_project: str = option('moe_jax', change='yes')
  """Name of the tracker's project that the run is in."""
  record_routes: bool = option(False, change='yes')
  """Whether the experts of every token are recorded, a file a step and process
  in DIR/routes."""
  replay_routes: str = option('', change='named')
  """Work directory of a run that recorded its routes: each step takes its
  experts instead of choosing, and the balancer moves as if it had chosen them.
  Evaluation chooses. '' chooses always."""
  init_from: str = option('')
  """Work directory of a run whose parameters this one begins with, as they were
  at its newest checkpoint or, as DIR@STEP, at that of a step. All else is new:
  data, schedule, optimizer, step 0. '' begins with random ones."""
  init_router: bool = option(True)
  """Whether the router state of that run, its q, is taken as well."""
  balancer: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: balancer_options('bip'),
    metadata={Option: Option(change='named')},
  )
  """Name of the balancer and the arguments of its function."""
  losses: LossesConfig = LossesConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  model: DecoderConfig = DecoderConfig()
  mesh: MeshConfig = MeshConfig()
  data: DataConfig = DataConfig()

  def __post_init__(self):
    check_options(self)
    slots = self.model.slots_per_token
    pairs = self.batch_size * self.sequence_length * slots
    if pairs >= 2**31:
      raise ValueError(
        f'batch_size={self.batch_size}: times sequence_length='
        f'{self.sequence_length} times {slots} experts a token, the most it '
        'can have, must be less than 2^31, or the loads of a step could not be '
        'counted'
      )
    if self.batch_size % self.accumulation:
      raise ValueError(
        f'accumulation={self.accumulation}: must divide '
        f'batch_size={self.batch_size}'
      )
    if self.warmup_steps >= self.steps:
      raise ValueError(
        f'warmup_steps={self.warmup_steps}: must be less than '
        f'steps={self.steps}'
      )
    if self.profile and not re.fullmatch(r'[1-9]\d*:[1-9]\d*', self.profile):
      raise ValueError(
        f'profile={self.profile}: must be START:STEPS, both 1 or more, such as '
        '100:3'
      )
    first, _, _ = self.profile.partition(':')
    if self.profile and int(first) > self.steps:
      raise ValueError(
        f'profile={self.profile}: must start in one of steps={self.steps}'
      )
    left = self.steps - self.warmup_steps
    if self.optimizer.decay_steps > left:
      raise ValueError(
        f'optimizer.decay_steps={self.optimizer.decay_steps}: must be at most '
        f'steps - warmup_steps = {left}'
      )
    self.model.check_capacity_factor(self.capacity_factor)
    if not self.balancer_rule.additive and self.accumulation > 1:
      additive = [m for m in METHODS if make_balancer(METHODS[m]).additive]
      raise ValueError(
        f'accumulation={self.accumulation}: what this balancer observes does '
        'not add up over microbatches; it does with 1, or by '
        f'--config=FILE.py:METHOD of {", ".join(additive)}'
      )
    why = why_none_is_best(dataclasses.asdict(self))
    if why and self.checkpoints_kept_best:
      raise ValueError(
        f'checkpoints_kept_best={self.checkpoints_kept_best}: {why}'
      )

  @functools.cached_property
  def balancer_rule(self) -> routing.Balancer:
    """The balancer that the options `balancer` and `losses` describe."""
    balancer, losses = make_balancer(self.balancer), self.losses.make()
    return routing.with_losses(balancer, *losses) if losses else balancer


def why_none_is_best(options: Mapping[str, Any]) -> str:
  """Says why no checkpoint could be kept as the best one; else empty.

  The last step has both a checkpoint and an evaluation, but it is the newest.
  """
  sets = options['data']['evaluation_sets']
  if 'validation' not in split_names(sets):
    return f'data.evaluation_sets={sets} has no validation set to choose by'
  names = ('eval_every', 'checkpoint_every', 'steps')
  evaluated, saved, steps = (options[name] for name in names)
  if not evaluated or math.lcm(evaluated, saved) >= steps:
    return (
      f'eval_every={evaluated} and checkpoint_every={saved} have no common '
      f'step before the last, steps={steps}; make one a multiple of the other'
    )
  return ''
