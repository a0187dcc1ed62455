"""What the laboratory reads from a program's text, on a program small enough to add up by hand."""

import re

import pytest

from core.errors import RunError
from core.hlo_cost import Collective, Program, ProgramCost, shape_bytes

TEXT = """\
HloModule jit_step, is_scheduled=true

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %inner = bf16[8,128]{1,0} negate(%p), cycles=999
}

%gathered (p: bf16[8,128]) -> bf16[32,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  ROOT %all = bf16[32,128]{1,0} all-gather(%q), dimensions={0}
}

%condition (s: (s32[], bf16[8,128])) -> pred[] {
  %s = (s32[], bf16[8,128]{1,0}) parameter(0)
  %bound = s32[]{:T(128)} constant(24)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (t: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %t = (s32[], /*index=1*/bf16[8,128]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%t), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%j, %one)
  %x = bf16[8,128]{1,0} get-tuple-element(%t), index=1
  %copied = (bf16[8,128]{1,0}, bf16[8,128]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%x)
  %arrived = bf16[8,128]{1,0} copy-done(%copied)
  %up = bf16[8,128]{1,0} fusion(%arrived), calls=%fused, metadata={op_name="jit(f)/while/body/up/dot"}, cycles=100
  %kernel = bf16[8,128]{1,0} custom-call(%up), custom_call_target="tpu_custom_call"
  %sum = bf16[8,128]{1,0} all-reduce(%kernel), replica_groups={}
  ROOT %out = (s32[], bf16[8,128]{1,0}) tuple(%next, %sum)
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %counter = s32[]{:T(128)} copy(%zero)
  %rows = bf16[8,128]{1,0} fusion(%a), kind=kCustom, calls=%fused, metadata={op_name="jit(f)/shard_map/gather"}
  %everyones = bf16[32,128]{1,0} fusion(%a), kind=kCustom, calls=%gathered
  %room = bf16[8,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %start = (s32[], bf16[8,128]{1,0}) tuple(%counter, %rows)
  %loop = (s32[], bf16[8,128]{1,0}) while(%start), condition=%condition, body=%body
  %y = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
  ROOT %last = bf16[8,128]{1,0} copy(%y), cycles=7
}
"""
PROGRAM = re.sub(r"cycles=(\d+)", r'backend_config={"window_config":{"estimated_cycles":"\1"}}', TEXT)
ARRAY = 8 * 128 * 2


def test_every_operation_counts_as_often_as_it_runs_and_nothing_is_dropped():
    cost = ProgramCost.of(Program.parse(PROGRAM))
    assert cost.cycles == {"up/dot": 24 * 100, "copy": 7}
    assert cost.kernels == 24
    assert cost.unpriced == {"fusion gather": ARRAY}
    assert cost.collectives == (Collective("all-gather", 1, 4 * ARRAY), Collective("all-reduce", 24, 24 * ARRAY))
    assert cost.copied_bytes == 24 * ARRAY


def test_the_compilers_own_count_of_a_loop_is_taken_where_it_gives_one():
    noted = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert ProgramCost.of(Program.parse(noted)).kernels == 5


def test_of_a_conditional_the_longest_branch_counts():
    branches = '%a), branch_computations={%fused, %gathered}, metadata={op_name="choice"}'
    program = PROGRAM.replace('%a), kind=kCustom, calls=%fused, metadata={op_name="jit(f)/shard_map/gather"}', branches)
    program = re.sub(r"%rows = (\S+) fusion", r"%rows = \1 conditional", program)
    assert ProgramCost.of(Program.parse(program)).cycles["negate"] == 999


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("constant(24)", "parameter(1)", "does not tell how often its loop loop runs"),
        ("direction=LT", "direction=GT", "loop loop that does not count up"),
        ("ENTRY %main", "%main", "has no entry"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(old, new, reason):
    with pytest.raises(RunError, match=reason):
        ProgramCost.of(Program.parse(PROGRAM.replace(old, new)))


def test_bytes_of_shapes():
    assert shape_bytes("bf16[24,16,512,896]{3,2,1,0:T(8,128)(2,1)}") == 24 * 16 * 512 * 896 * 2
    assert shape_bytes("(f32[16,512]{1,0}, pred[8]{0}, s4[6]{0})") == 16 * 512 * 4 + 8 + 3
    assert shape_bytes("s32[]{:T(128)}") == 4
