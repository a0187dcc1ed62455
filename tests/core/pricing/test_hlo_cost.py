"""What the laboratory reads from a program's text, on a program small enough to add up by hand."""

import re

import pytest

from core.base.errors import RunError
from core.pricing.hlo_cost import Collective, Program, ProgramCost, shape_bytes

TEXT = """\
HloModule jit_step, is_scheduled=true

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %inner = bf16[8,128]{1,0} negate(%p), cycles=999
}

%gathered (p: bf16[8,128]) -> bf16[32,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  ROOT %all = bf16[32,128]{1,0} all-gather(%q), replica_groups=[1,4]<=[4], dimensions={0}
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
  %sum = bf16[8,128]{1,0} all-reduce(%kernel), replica_groups={{0,2},{1,3}}
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
    assert cost.collectives == (
        Collective("all-gather", (0, 1, 2, 3), 1, 4 * ARRAY),
        Collective("all-reduce", (0, 2), 24, 24 * ARRAY),
    )
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
        ("constant(24)", "parameter(1)", "loop loop of the compiled program: its trip count cannot be determined"),
        ("direction=LT", "direction=GT", "loop loop of the compiled program does not count up"),
        ("ENTRY %main", "%main", "has no entry"),
        ("replica_groups={{0,2},{1,3}}", "groups=?", "all-reduce sum of the compiled program: its device groups"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(old, new, reason):
    with pytest.raises(RunError, match=reason):
        ProgramCost.of(Program.parse(PROGRAM.replace(old, new)))


def collective(text):
    """The one collective of a program of one line."""
    program = f"ENTRY %main (a: bf16[8]) -> bf16[8] {{\n  ROOT %x = {text}\n}}"
    (found,) = ProgramCost.of(Program.parse(program)).collectives
    return found


def test_each_kind_of_exchange_sends_what_a_ring_does():
    """Of 8 KB of results: a sum goes round twice, less the part that each device keeps."""
    groups = "(%a), replica_groups={{0,1,2,3},{4,5,6,7}}"
    assert collective(f"f32[2048]{{0}} all-reduce{groups}").sent(4) == 2 * 3 / 4 * 8192
    assert collective(f"f32[2048]{{0}} all-reduce{groups}").sent(2) == 8192
    assert collective(f"f32[2048]{{0}} all-gather{groups}").sent(4) == 3 / 4 * 8192
    assert collective(f"f32[2048]{{0}} reduce-scatter{groups}").sent(4) == 3 * 8192
    assert collective("f32[2048]{0} collective-permute(%a), source_target_pairs={{1,2},{2,1}}").sent(2) == 8192


def test_of_an_exchange_that_is_started_the_results_alone_count():
    groups = "(%a), replica_groups={{0,1},{2,3}}"
    assert collective(f"(f32[512]{{0}}, f32[1024]{{0}}) all-gather-start{groups}").bytes == 4096
    assert collective(f"(f32[512]{{0}}, f32[256]{{0}}) all-reduce-start{groups}").bytes == 3072
    pairs = "(%a), source_target_pairs={{0,1}}"
    assert collective(f"(f32[512], f32[512], u32[], u32[]) collective-permute-start{pairs}").bytes == 2048


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("{{4,5},{6,7}}", (4, 5)),
        ("{}", ()),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        # Devices in 2 rows of 4, read by columns.
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
    ],
)
def test_who_exchanges_is_read_in_both_spellings(written, group):
    assert collective(f"f32[2048]{{0}} all-reduce(%a), replica_groups={written}, to_apply=%add").group == group


def test_names_lose_what_calls_and_choices_add():
    text = 'fusion(%a), metadata={op_name="jit(f)/shard_map/while/body/closed_call/gate/branch_0_fun/BTI,OI->BTO/dot"}'
    program = f'ENTRY %main (a: bf16[8]) -> bf16[8] {{\n  ROOT %x = f32[64] {text}, "estimated_cycles":"5"\n}}'
    assert ProgramCost.of(Program.parse(program)).cycles == {"gate/BTI,OI->BTO/dot": 5}


def test_bytes_of_shapes():
    assert shape_bytes("bf16[24,16,512,896]{3,2,1,0:T(8,128)(2,1)}") == 24 * 16 * 512 * 896 * 2
    assert shape_bytes("(f32[16,512]{1,0}, pred[8]{0}, s4[6]{0})") == 16 * 512 * 4 + 8 + 3
    assert shape_bytes("s32[]{:T(128)}") == 4
