"""What may differ between two configs: of a run continued, of runs compared."""

from collections.abc import Iterable, Mapping
from typing import Any

from moe_jax.config.balancers import filled
from moe_jax.config.dicts import flatten, to_dict
from moe_jax.config.schema import Config, why_none_is_best
from moe_jax.data import DataConfig
from moe_jax.options import Change, Option, options_of

_OPTIONS = options_of(Config)
_CORPORA = {'data.corpus', 'data.anneal_corpus'}


def may_change(name: str) -> Change:
  """Says whether an option may change in a continued run; see `Option`."""
  group = name.partition('.')[0]
  field = _OPTIONS.get(name) or _OPTIONS.get(group)  # `balancer` is a group.
  return field.metadata[Option].change if field else 'no'


def differences(
  before: Mapping[str, Any], now: Mapping[str, Any], but: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
  """Returns the options that differ, but for those that change no result.

  Args:
    before: options as nested dicts.
    now: those of another config.
    but: further options, or groups of them, that are not compared.

  Returns:
    Full name -> (value before, value now), None where there is no such option.
  """
  before, now, but = flatten(before), flatten(now), list(but)
  return {
    name: (before.get(name), now.get(name))
    for name in sorted(before.keys() | now.keys())
    if before.get(name) != now.get(name)
    and may_change(name) != 'yes'
    and not is_among(name, but)
  }


def check_changes(
  before: Mapping[str, Any] | None,
  now: Mapping[str, Any],
  allowed: Iterable[str] = (),
  *,
  where: str,
) -> None:
  """Raises ValueError unless a run may be continued with other options.

  Args:
    before: the options of the run; None where there is no run.
    now: the options that are wanted now.
    allowed: options, or groups, that may differ, as --allow_config_change names
      them.
    where: the start of the message, such as `--workdir=DIR`.
  """
  allowed = list(allowed)
  for name in allowed:
    named = [option for option in flatten(now) if is_among(option, [name])]
    if not named:
      raise ValueError(f'--allow_config_change={name}: no such option')
    if 'no' in map(may_change, named):
      changeable = [n for n in _OPTIONS if may_change(n) == 'named']
      raise ValueError(
        f'--allow_config_change={name}: cannot change in a run; what can is '
        f'{", ".join(changeable)}'
      )
  if before is None:
    return
  if _shares(before) != _shares(now):
    corpora = differences(before, now, but=_OPTIONS.keys() - _CORPORA)
    raise ValueError(
      f'{where}: holds a run of another mixture: {_told(corpora)}; corpora may '
      'move, but must keep their weights and, if they are several, the last '
      'parts of their paths; choose another work directory'
    )
  changes = differences(before, now, but=allowed)
  if not changes:
    return
  hint = ''
  if 'no' not in map(may_change, changes):
    hint = (
      ', or continue with the change by --allow_config_change='
      f'{",".join(changes)}'
    )
  raise ValueError(
    f'{where}: holds a run of another config: {_told(changes)}; choose another '
    f'work directory{hint}'
  )


def _told(changes: Mapping[str, tuple[Any, Any]]) -> str:
  return ', '.join(
    f'{name}={now!r} (was {before!r})'
    for name, (before, now) in changes.items()
  )


def _shares(options: Mapping[str, Any]) -> list[tuple[Any, ...]]:
  names = ('corpus', 'anneal_corpus', 'anneal_from')
  return DataConfig(**{name: options['data'][name] for name in names}).shares


def upgrade(options: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the options of an older config.json as they are called today.

  What it lacks gets its default: an option that is added later needs a default
  that does what was done before it, or a line here.
  """
  defaults = to_dict(Config())
  options = defaults | dict(options)
  for name, default in defaults.items():
    if isinstance(default, Mapping) and name != 'balancer':
      options[name] = default | options[name]
  options['balancer'] = filled(options['balancer'])
  options.pop('method', None)  # It followed from the balancer's options.
  options['model'].pop('ragged_exchange', None)  # It changed no result.
  if z := options['model'].pop('router_z_loss', 0.0):
    options['losses'] = options['losses'] | {'z': z}
  if why_none_is_best(options):
    options['checkpoints_kept_best'] = 0  # It was accepted and did nothing.
  return options


def is_among(name: str, options: Iterable[str]) -> bool:
  """Whether an option is one of `options`, or in a group that is one."""
  return any(name == of or name.startswith(f'{of}.') for of in options)
