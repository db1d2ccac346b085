"""The selections that a layer can have, by name.

Each is `(priced_TxE, q_E, config, mask_T) -> Choice`: from scores, or logits if
those are priced, and prices to a choice. A selection of one's own is a function
like these, given to `MoE(select=...)`; or here, one line of the table.
"""

import jax

from moe_jax import routing


def _choose(priced_TxE, q_E, config, mask_T):
  return routing.choose(
    priced_TxE,
    q_E,
    k=config.experts_per_token,
    mask_T=mask_T,
    groups=config.expert_groups,
    groups_per_token=config.groups_per_token,
  )


def _choose_above(priced_TxE, q_E, config, mask_T):
  return routing.choose_above(
    priced_TxE, q_E, k_max=config.slots_per_token, mask_T=mask_T
  )


def _choose_by_experts(priced_TxE, q_E, config, mask_T):
  return routing.choose_by_experts(
    priced_TxE,
    k=config.experts_per_token,
    k_max=config.slots_per_token,
    mask_T=mask_T,
  )


def _choose_evenly(priced_TxE, q_E, config, mask_T):
  # One key: what balance is worth does not depend on who meets whom.
  return routing.choose_evenly(
    priced_TxE, k=config.experts_per_token, key=jax.random.key(0), mask_T=mask_T
  )


SELECTIONS = {
  'choose': _choose,
  'choose_above': _choose_above,
  'choose_by_experts': _choose_by_experts,
  'choose_evenly': _choose_evenly,
}
# Where a token's experts depend on the other tokens of its shard.
OF_SHARD = ('choose_by_experts', 'choose_evenly')
