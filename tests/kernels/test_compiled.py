# SPDX-License-Identifier: Apache-2.0
"""What the compile report reads from machine code, and what it says of one freshly compiled kernel."""

from __future__ import annotations

import json

import pytest

from attention_kernels.operators import interpreting, triton_installed
from attention_plugin import __main__ as program
from attention_plugin import compile_report

if not triton_installed() or interpreting():
    pytest.skip("compiling needs Triton, and not its interpreter", allow_module_level=True)

from attention_kernels.compiled.ahead import Compiled
from attention_kernels.compiled.chips import CHIPS, estimate, flops_of, programs_at_a_time
from attention_kernels.compiled.machine_code import inner_loop, parse

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x0 */
        /*0010*/                   MUFU.EX2 R2, R3 ;                      /* 0x0 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R4], [R5.64] ;    /* 0x0 */
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8, gsb0 ; /* 0x0 */
        /*0040*/             @!P2 BRA 0x0070 ;                            /* 0x0 */
        /*0050*/                   ISETP.GE.AND P0, PT, R6, R7, PT ;      /* 0x0 */
        /*0060*/                   FSEL R8, R8, -INF , P0 ;               /* 0x0 */
        /*0070*/                   {before}
        /*0080*/                   MUFU.EX2 R2, R3 ;                      /* 0x0 */
        /*0090*/                   FFMA R2, R2, R3, R4 ;                  /* 0x0 */
        /*00a0*/                   {after}
        /*00b0*/              @P1 BRA 0x0020 ;                            /* 0x0 */
        /*00c0*/                   EXIT ;                                 /* 0x0 */
        /*00d0*/                   BRA 0xd0 ;                             /* 0x0 */
"""
WAIT, NOTHING = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ; /* 0x0 */", "NOP ; /* 0x0 */"


def listing(before: str, after: str) -> str:
    return SASS.replace("{before}", before).replace("{after}", after)


def test_the_inner_loop_is_counted_without_what_it_jumps_over():
    code = listing(WAIT, NOTHING)
    instructions, loops = parse(code)
    assert len(instructions) == 14 and loops == [(0x20, 0xB0)]
    loop = inner_loop(code)
    assert loop.counts == {
        "asynchronous copy": 1, "matrix": 1, "branch": 2, "barrier": 1, "exponential": 1, "float32": 1,
        "integer and moves": 1,
    }  # fmt: skip
    assert loop.matrix_names() == {"HGMMA.64x64x16.F32.BF16": 1}


@pytest.mark.parametrize(
    ("before", "after", "overlaps"), [(WAIT, NOTHING, False), (NOTHING, WAIT, True), (WAIT, WAIT, False)]
)
def test_a_product_under_way_across_the_softmax_is_seen(before, after, overlaps):
    assert inner_loop(listing(before, after)).in_flight is overlaps
    asks = listing(before, after).replace("HGMMA.64x64x16", "HMMA.16816")
    assert inner_loop(asks).in_flight is None


def test_amd_loops_are_read_by_their_labels():
    code = """
    .amdgcn_target "amdgcn-amd-amdhsa--gfx942"
.LBB0_1:
    v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
    v_exp_f32_e32 v1, v2
    s_cbranch_scc1 .LBB0_1
    s_endpgm
"""
    loop = inner_loop(code)
    assert loop.counts == {"matrix": 1, "exponential": 1, "branch": 1}
    assert flops_of("v_mfma_f32_32x32x8_bf16", CHIPS["gfx942"]) == 2 * 32 * 32 * 8


def test_programs_at_a_time_and_the_estimate():
    chip = CHIPS["sm_90"]
    compiled = Compiled(shared_memory=64 * 1024, registers=127, spills=0, warps=8, seconds=0.0, code="")
    assert programs_at_a_time(compiled, chip) == 2
    wide = Compiled(shared_memory=64 * 1024, registers=255, spills=0, warps=8, seconds=0.0, code="")
    assert programs_at_a_time(wide, chip) == 1
    large = Compiled(shared_memory=120 * 1024, registers=32, spills=0, warps=4, seconds=0.0, code="")
    assert programs_at_a_time(large, chip) == 1
    found = estimate(compiled, inner_loop(listing(WAIT, NOTHING)), chip)
    # 8 warps take part in products of 64 x 64 x 16, four to each; a lane has one exponential.
    assert found.cycles["matrix"] == 2 * (2 * 64 * 64 * 16) / 4096
    assert found.cycles["exponential"] == 256 / 16
    assert found.narrowest == "matrix" and found.overlapped == 1.0 and 0.5 < found.in_turn < 1.0


def test_hopper_waits_once_for_the_products_of_a_tile(tmp_path):
    """Two loops one after the other made the compiler wait for each instruction by itself: not again."""
    out, page = tmp_path / "rows.json", tmp_path / "page.md"
    page.write_text("above\n" + "".join(compile_report.MARKS) + "\nbelow")
    arguments = ["compile-report", "--chip", "sm_90", "--kernel", "forward", "--head-dim", "128", "--bits", "16"]
    assert program.main([*arguments, "--jobs", "1", "--json", str(out), "--markdown", str(page)]) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())}
    row = rows["sm_90 forward 16bit d128 spans"]
    assert row["spills"] == 0 and row["fits"] and row["programs"] == 1
    assert sum(row["matrix"].values()) == 12 and row["waits"] <= 2 and row["in_flight"] is False
    assert row["copies"] == "cp.async" and row["counts"]["exponential"] >= 32
    assert 0 < row["in_turn"] < row["overlapped"] <= 1
    text = page.read_text()
    assert text.startswith("above\n<!--") and text.endswith("below") and "sm_90 forward 16bit d128 spans" in text


def test_impossible_requests_end_with_one_line(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    narrow = ["compile-report", "--chip", "sm_90", "--kernel", "decode", "--head-dim", "512", "--bits", "32"]
    assert program.main([*narrow, "--jobs", "1", "--markdown", str(page)]) == 2
    assert "must hold the marks" in capsys.readouterr().err


def test_a_spill_is_a_failure_where_it_is_promised_that_there_is_none():
    assert compile_report.must_not_spill("sm_90 forward 16bit d256 spans")
    assert not compile_report.must_not_spill("sm_90 forward 16bit d512 spans")
    assert not compile_report.must_not_spill("sm_80 forward 16bit d64 spans")
