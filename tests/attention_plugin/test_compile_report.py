# SPDX-License-Identifier: Apache-2.0
"""The compile report: its reading of machine code, on kernels compiled here, and its command."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version

import pytest

from attention_kernels.config_tables import SHARED_MEMORY
from attention_kernels.paths import interpreting
from attention_plugin.__main__ import main

pytest.importorskip("triton")

from attention_kernels.ahead_of_time import compile_ahead, shipped_cases
from attention_kernels.ahead_of_time.chips import resident
from attention_kernels.ahead_of_time.machine_code import (
    Instruction,
    in_flight,
    kind_of,
    main_loop,
    read_amd,
    read_sass,
    shared_bytes,
)
from attention_kernels.ahead_of_time.roofline import loop_products, roofline, tile_products
from attention_plugin import compile_report
from attention_plugin.compile_report import broken_limits, draw_up
from attention_plugin.compile_report.rows import HEAD_DIMS
from attention_plugin.compile_report.show import BEGIN, END

compiles = pytest.mark.skipif(interpreting(), reason="the interpreter does not compile")


def assembled(text):
    """Instructions from lines of a name and its operands, at addresses 0x10 apart."""
    words = [line.split(maxsplit=1) for line in text.strip().splitlines()]
    return [Instruction(16 * place, each[0], each[1] if len(each) > 1 else "") for place, each in enumerate(words)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("HGMMA.64x128x16.F32.BF16", "matrix"), ("UTCHMMA", "matrix"), ("v_mfma_f32_16x16x16_bf16", "matrix"),
        ("MUFU.EX2", "special"), ("STL.64", "spill"), ("UTMALDG.2D", "bulk copy"), ("LDGSTS.E.BYPASS.128", "global"),
        ("LDSM.16.M88.4", "shared"), ("WARPGROUP.DEPBAR.LE", "waiting"), ("FFMA", "float"),
        ("F2FP.BF16.F32.PACK_AB", "convert"), ("IMAD.MOV.U32", "integer"), ("UIADD3", "uniform"),
        ("LDG.E", "global"), ("FSETP.GEU", "compare"),
    ],
)  # fmt: skip
def test_kinds_of_instructions(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("name", "operands", "expected"),
    [
        ("HGMMA.64x32x16.F32.BF16", "R88, gdesc[UR8], RZ, !UPT", 16 * (64 + 32) * 2 / 4),
        ("HGMMA.64x32x16.F32.BF16", "R88, gdesc[UR8], R88, gsb0", 16 * (64 + 32) * 2 / 4),
        ("HGMMA.64x128x16.F32.BF16", "R24, R124, gdesc[UR8].tnspB, R24", 16 * 128 * 2 / 4),
        ("LDS", "R1, [R2]", 32 * 4), ("STS.64", "[R2], R4", 32 * 8), ("LDS.U.128", "R4, [R2]", 32 * 16),
        ("LDSM.16.MT88.4", "R4, [R2]", 4 * 8 * 8 * 2), ("STSM.16.M88", "[R2], R4", 8 * 8 * 2),
        ("LDGSTS.E.BYPASS.LTC128B.64", "[R1], [R2.64]", 32 * 8),
        ("LDG.E.128", "R4, [R2.64]", 0), ("FADD", "R1, R1, R2", 0),
    ],
)  # fmt: skip
def test_bytes_of_shared_memory(name, operands, expected):
    """A warp has a quarter of what its group's matrix instruction reads: the left operand only if not in registers."""
    assert shared_bytes(Instruction(0, name, operands)) == expected


def test_matrix_instructions_in_flight():
    waits = "HGMMA.64x64x16.F32 R24, gsb0\nWARPGROUP.DEPBAR.LE gsb0, 0x0\nMUFU.EX2 R1, R1\n"
    overlaps = "HGMMA.64x64x16.F32 R24, gsb0\nMUFU.EX2 R1, R1\nWARPGROUP.DEPBAR.LE gsb0, 0x0\nMUFU.EX2 R1, R1\n"
    across = "MUFU.EX2 R1, R1\nWARPGROUP.DEPBAR.LE gsb0, 0x0\nHGMMA.64x64x16.F32 R24, gsb0\n"
    assert [in_flight(assembled(code)) for code in (waits, overlaps, across)] == [0, 1, 1]
    assert in_flight(assembled("HMMA.16816.F32 R1, R2\nMUFU.EX2 R1, R1")) is None


def test_the_main_loop_is_the_one_without_masks():
    masked = "HMMA.16816.F32 R1\nISETP.GE P0\nFSEL R1\nMUFU.EX2 R1\nBRA 0x0"
    body = "HMMA.16816.F32 R1\nMUFU.EX2 R1\nBRA 0x50"
    loop = main_loop(assembled(f"{masked}\n{body}\nBRA 0x80"))
    assert loop.counts == {"matrix": 1, "special": 1, "control": 1} and not loop.nested
    assert main_loop(assembled("IADD3 R1\nBRA 0x0")) is None


def test_what_a_branch_jumps_over_does_not_count():
    code = "HMMA.16816.F32 R1\nBRA 0x40\nISETP.GE P0\nFSEL R1\nMUFU.EX2 R1\nBRA 0x0"
    assert main_loop(assembled(code)).counts == {"matrix": 1, "special": 1, "control": 2}
    with_products = code.replace("FSEL R1", "MUFU.RCP R1")
    assert main_loop(assembled(with_products)).counts["integer"] == 1


def test_text_that_is_no_code_is_refused():
    with pytest.raises(RuntimeError, match="printed no instruction"):
        read_sass("nothing", 1)


def test_programs_per_multiprocessor():
    assert resident("sm_90", 255, 256, 131072) == 1  # 65,536 registers hold one of 255 x 256
    assert resident("sm_90", 128, 128, 100 * 1024) == 2  # two times 101 of 228 KB
    assert resident("sm_80", 32, 1024, 0) == 2  # 2,048 threads
    assert resident("sm_86", 16, 32, 0) == 16  # blocks
    assert resident("sm_120", 64, 128, 100 * 1024) == 0  # 1 KB too much
    assert resident("gfx942", 128, 256, 16 * 1024) == 4


def test_amd_assembly():
    code = read_amd("  v_mfma_f32_32x32x8_bf16 a\n  v_exp_f32 b\n .vgpr_count: 77\n .vgpr_spill_count: 3\n")
    assert (code.registers, code.spills, code.counts) == (77, 3, {"matrix": 1, "special": 1})


@compiles
def test_a_row_of_the_report_holds_on_a_kernel_compiled_now():
    (row,) = (each for each in draw_up(["sm_90"], ["forward"], [128], "bfloat16") if each.case.work == "spans")
    loop = row.code.loop
    assert broken_limits([row]) == [] and row.code.spills == 0
    # What is counted is what the tile has: 128 x 64 scores over 128 columns, twice.
    assert loop_products(row.case, loop, row.threads // 32) == tile_products(row.case) == 128 * 64 * 256
    # Each thread has 32 of the tile's scores, and each row's rescaling.
    assert 32 <= loop.counts["special"] <= 40
    # The assembler does not wait for every matrix instruction, but once for the tile.
    assert sum(loop.matrix.values()) == 12 and loop.waits == 1
    # Shared memory: queries and keys of each of 8 instructions, values of each of 4, and the next tiles as they arrive.
    tiles = 2 * 64 * 128 * 2
    products = 8 * 16 * (64 + 64) * 2 + 4 * 16 * 128 * 2
    # Triton 3.9 passes a little more through it than the pinned one.
    most = 1.1 if version("triton").startswith("3.7.") else 1.15
    assert 2 * products + tiles <= loop.shared_bytes * 8 < most * (2 * products + tiles)
    assert row.resident == 1 and 0 < row.roofline.share_serial < row.roofline.share_overlapped <= 1


@compiles
def test_tiles_that_the_hardware_copies_count_as_those_that_warps_copy():
    wanted = ("forward", 2, 128, "spans")
    (case,) = (each for each in shipped_cases("sm_90") if (each.part, each.element_size, each.dim, each.work) == wanted)
    cycles = []
    for descriptors in (False, True):
        one = replace(case, config=case.config._replace(descriptors=descriptors))
        kernel, arguments = one.kernel()
        cycles.append(roofline(one, compile_ahead(kernel, "sm_90", arguments)).cycles["shared"])
    assert 0.9 < cycles[1] / cycles[0] < 1.1


@compiles
def test_a_passed_limit_is_reported():
    row = draw_up(["sm_90"], ["merge"], [64])[0]
    object.__setattr__(row.code, "spills", 2)
    object.__setattr__(row, "shared_memory", 1 << 20)
    assert broken_limits([row]) == [
        "sm_90-merge-16bit-64: 1048576 bytes of shared memory, at most 232448",
        "sm_90-merge-16bit-64: 2 instructions that spill registers",
    ]


@compiles
def test_the_command_prints_and_writes(tmp_path, capsys, monkeypatch):
    file = tmp_path / "report.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    few = ["compile-report", "--architecture", "sm_90", "--part", "merge", "--head-dim", "64"]
    with monkeypatch.context() as patched:  # in place of minutes of compiling
        patched.setattr(compile_report, "draw_up", lambda *given, **options: draw_up(["sm_90"], ["merge"], [64]))
        assert main(["compile-report", "--write", str(file), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["name"] == "sm_90-merge-16bit-64" and row["registers"] > 0 and row["seconds"] > 0
    text = file.read_text()
    assert text.startswith(f"before\n{BEGIN}\n<details>") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert "| merge | 16 | 64 |" in text
    assert main(few) == 0
    assert "Every limit holds." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--architecture", "sm_70"],
            "--architecture must be of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942, got",
        ),
        (["--part", "middle"], "--part must be of forward, gluon, backward, decode, merge, statistics, got 'middle'"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--write", "no-such.md"], "--write must be a file with the marks of the tables in it, got 'no-such.md'"),
        (
            ["--head-dim", "64", "65"],
            "--head-dim must be of 64, 128, 256, 512, got 65: narrower heads use the next row",
        ),
        (
            ["--architecture", "sm_80", "--part", "gluon", "--head-dim", "64"],
            "no configuration fits --architecture sm_80 --part gluon --head-dim 64 together; leave one of them out",
        ),
    ],
)
def test_what_cannot_be_drawn_up_is_said(options, words, capsys):
    assert main(["compile-report", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_head_dims_are_those_of_the_tables():
    assert {case.dim for chip in SHARED_MEMORY for case in shipped_cases(chip)} == set(HEAD_DIMS)


def test_the_interpreter_compiles_nothing(monkeypatch, capsys):
    monkeypatch.setattr("attention_plugin.compile_report.interpreting", lambda: True)
    assert main(["compile-report", "--part", "merge", "--architecture", "sm_90"]) == 2
    assert "TRITON_INTERPRET is set: the interpreter compiles nothing; unset it" in capsys.readouterr().err


@compiles
def test_a_file_without_marks_is_refused_before_anything_is_compiled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compile_report, "draw_up", lambda *given, **options: pytest.fail("compiled"))
    file = tmp_path / "plain.md"
    file.write_text("text")
    assert main(["compile-report", "--write", str(file)]) == 2
    assert "must have the lines" in capsys.readouterr().err and file.read_text() == "text"
    file.write_bytes(b"\xff\xfe")
    assert main(["compile-report", "--write", str(file)]) == 2
    assert "is no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "given"), [("--architecture", ["sm_90", "sm_80"]), ("--part", ["merge"]), ("--head-dim", ["64"])]
)
def test_a_selection_takes_the_place_of_no_tables(option, given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compile_report, "interpreting", lambda: False)
    monkeypatch.setattr(compile_report, "draw_up", lambda *given, **options: pytest.fail("compiled"))
    file = tmp_path / "report.md"
    text = f"{BEGIN}\nold\n{END}\n"
    file.write_text(text)
    assert main(["compile-report", option, *given, "--write", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"my-triton compile-report: --write replaces all tables of the file, so it takes no {option}, got "
        f"{' '.join(given)}; leave out {option}, or print these rows without --write\n"
    )
    assert file.read_text() == text
