"""The reader of compiled programs, against what is counted by hand."""

import collections
import pathlib
import re

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from launch import hlo
from moe_jax.parallel import mesh as meshes

MODULE = pathlib.Path(__file__).with_name('module.hlo').read_text()


def test_each_way_of_writing_a_collective_counts_once():
  # The loop turns 7 times through the branch with two all-reduces.
  assert hlo.collectives(MODULE) == [
    ('all-reduce', 7, 32, '', (0, 1), False, False),
    ('all-reduce', 7, 32, '', (0, 1), False, False),
    ('all-gather', 1, 32, 'jit(step)/begin', (0, 2, 4, 6), False, False),
    ('all-reduce', 1, 40, '', (), False, False),
    # Spread over fusions that compute something else.
    ('all-gather', 1, 32, '', (0, 1, 2, 3), False, True),
    ('collective-permute', 1, 32, '', (3, 5), False, False),
  ]


def test_what_is_computed_before_the_end_of_a_collective_hides_it():
  end = '  %ended.9 ='
  work = '  %work.9 = f32[8]{0} fusion(%x.9), kind=kLoop, calls=%add.1\n'
  (gather,) = (
    call
    for call in hlo.collectives(MODULE.replace(end, work + end))
    if call.op_name
  )
  assert gather.asynchronous


def test_what_has_no_name_has_that_of_its_loop():
  body = ' body=%body.6'
  named = MODULE.replace(
    body, f'{body}, metadata={{op_name="jit(step)/router"}}'
  )
  names = {call.op_name for call in hlo.collectives(named) if call.count == 7}
  assert names == {'jit(step)/router'}


def test_of_a_conditional_the_branch_that_communicates_most_counts():
  larger = MODULE.replace('%few.2 = f32[8]', '%few.2 = f32[99]')
  calls = [call for call in hlo.collectives(larger) if call.count == 7]
  assert [(call.bytes, call.group) for call in calls] == [(396, (0, 2, 4, 6))]


def test_a_loop_of_unknown_length_counts_once_and_is_told():
  unknown = MODULE.replace('constant(7)', 'parameter(1)')
  assert hlo.unknown_loops(hlo.parse(MODULE)) == 0
  assert hlo.unknown_loops(hlo.parse(unknown)) == 1
  assert hlo.collectives(unknown)[0].count == 1


@pytest.mark.parametrize(
  ('shape', 'size'),
  [
    ('f32[]', 4),
    ('bf16[8,128]{1,0:T(8,128)(2,1)S(1)}', 2048),
    ('(pred[3]{0}, (s32[2]{0}, u8[0]{0}), token[])', 11),
    ('f8e4m3fn[16]', 16),
    ('s4[3]', 2),
    ('s32[<=5]{0}', 20),
  ],
)
def test_shape_bytes(shape, size):
  assert hlo.shape_bytes(shape) == size


def test_a_ragged_exchange_counts_what_is_sent_if_all_send_the_same():
  ragged = """
ENTRY %main (x: f32[4,8], y: f32[32,8], n: s32[2]) -> f32[32,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[32,8]{1,0} parameter(1)
  %n = s32[2]{0} parameter(2)
  %begun = ((f32[4,8]{1,0}, f32[32,8]{1,0}), f32[32,8]{1,0}) \
ragged-all-to-all-start(%x, %y, %n, %n, %n, %n), replica_groups={{0,1}}
  %ended = f32[32,8]{1,0} ragged-all-to-all-done(%begun)
  ROOT %back = f32[4,8]{1,0} ragged-all-to-all(%ended, %x, %n, %n, %n, %n), \
replica_groups={{0,1}}
}
"""
  there, back = hlo.collectives(ragged)
  assert (
    there[:5] == back[:5] == ('ragged-all-to-all', 1, 4 * 8 * 4, '', (0, 1))
  )


def test_what_tpu_slices_exchange_counts_once():
  program = """
ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (f32[4,8]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, \
is_host_transfer=true, frontend_attributes={\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[4,8]{1,0}, u32[], token[]) recv(%token), channel_id=1, \
is_host_transfer=true, frontend_attributes={\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2
  %received = (f32[4,8]{1,0}, token[]) recv-done(%recv), channel_id=1
  ROOT %y = f32[4,8]{1,0} get-tuple-element(%received), index=0
}
"""
  assert hlo.collectives(program) == [
    ('all-reduce', 1, 128, '', (), True, False)
  ]


def test_refuses_what_is_not_a_program():
  with pytest.raises(ValueError, match='compiled XLA program'):
    hlo.collectives('func.func @main()')


def test_counts_collectives_of_a_compiled_program():
  mesh = meshes.make_mesh(4, 2)

  def local(x):
    def turn(x, _):
      x = lax.psum(x, 'data') / 4  # 5 times [2, 16] float32
      y = lax.all_to_all(x, 'expert', 0, 1, tiled=True)  # 5 times
      return jnp.sin(lax.all_to_all(y, 'expert', 1, 0, tiled=True)), None

    x, _ = lax.scan(turn, x, length=5)
    return lax.all_gather(x, 'expert', tiled=True)

  step = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=P(('data', 'expert')),
      out_specs=P('data'),
      check_vma=False,
    )
  )
  x = jax.ShapeDtypeStruct(
    (16, 16), jnp.float32, sharding=NamedSharding(mesh, meshes.BATCH)
  )
  calls = hlo.collectives(step.lower(x).compile().as_text())
  total = collections.Counter()
  for kind, count, size, op_name, group, *_ in calls:
    assert re.search('psum|all_to_all|all_gather', op_name)
    total[kind, size, group] += count
  assert total == {
    ('all-reduce', 128, (0, 2, 4, 6)): 5,
    ('all-to-all', 128, (0, 1)): 10,
    ('all-gather', 256, (0, 1)): 1,
  }
