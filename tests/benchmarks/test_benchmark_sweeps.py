# SPDX-License-Identifier: Apache-2.0
"""Sweeps, the work that problems are, and the limits of the machine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import cases, measure, plots, problem, saved, sections, training, work
from benchmarks.rows import share_of_limit

CPU = torch.device("cpu")
SMALL = cases.Sizes(tokens=96, num_heads=4, num_kv_heads=2, head_dim=16, window=24, decode_batch=3)
TWICE = measure.Effort(seconds=1e3, most=2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_work_counts_what_the_stated_mask_keeps(case: cases.Case, batch: int) -> None:
    posed = problem.build_problem(case, replace(SMALL, batch=batch, value_dim=8), torch.bfloat16, CPU)
    rows, sequences = posed.query.shape[2], posed.query.shape[0]
    visible = posed.visible(torch.arange(rows))[:, 0].expand(sequences, -1, -1)
    pairs, keys = int(visible.sum()), int(visible.any(1).sum())
    forward = work.work_of(posed)
    assert (forward.kept_pairs, forward.all_pairs) == (pairs, sequences * rows * posed.key.shape[2])
    assert forward.flops == 2 * pairs * 4 * (16 + 8)
    bias = 4 * 96 * 96 * 2 if case.bias else 0
    assert forward.bytes == 2 * (sequences * rows * 4 + keys * 2) * (16 + 8) + bias
    backward = work.work_of(posed, forward=False, backward=True)
    assert backward.flops == 2 * pairs * 4 * (3 * 16 + 2 * 8) and backward.bytes > 2 * forward.bytes
    both = work.work_of(posed, backward=True)
    assert both.flops == forward.flops + backward.flops and both.bytes == forward.bytes + backward.bytes


def test_only_keys_that_a_row_sees_are_read() -> None:
    posed = problem.build_problem(cases.case_named("left_padded"), SMALL, torch.float32, CPU)
    assert work.seen_keys(work.spans_of(posed)) == 48
    quantised, plain = (work.work_of(posed, cache_bytes=size).bytes for size in (1, 4))
    assert plain - quantised == 3 * 48 * 2 * 32


@pytest.mark.parametrize("sweep", cases.SWEEPS.values(), ids=lambda sweep: sweep.name)
def test_points_of_sweeps_have_names_of_their_own_and_room(sweep: cases.Sweep) -> None:
    for points in sweep.points.values():
        assert len({point.label for point in points}) == len(points) > 1
        for point in points:
            sizes = point.sizes
            assert sizes.num_heads % sizes.num_kv_heads == 0 and 1 <= sizes.head_dim <= 512
            tokens = sizes.tokens * (sizes.decode_batch if point.case.decode else sizes.batch)
            if point.piece is not None:
                piece = point.piece
                heads = (piece.num_heads, piece.num_kv_heads, piece.head_dim)
                assert heads == (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)
                assert 1 < piece.new_tokens <= piece.tokens
                tokens += piece.tokens
            # Keys and values of the largest problem in bfloat16 leave a GPU of 80 GB room for copies.
            assert 4 * tokens * sizes.num_kv_heads * sizes.head_dim <= 2**33, point.label


def test_sweeps_follow_the_papers() -> None:
    points = cases.LENGTHS.points["cuda", "full"]
    assert {point.sizes.batch * point.sizes.tokens for point in points} == {16384}
    assert {point.sizes.num_heads * point.sizes.head_dim for point in points} == {2048}
    assert {(p.case.name, p.sizes.head_dim, p.sizes.tokens) for p in points} == {
        (name, head_dim, tokens)
        for name in ("causal", "bidirectional")
        for head_dim in (64, 128, 256)
        for tokens in (512, 1024, 2048, 4096, 8192, 16384)
    }
    decode = {(point.sizes.decode_batch, point.sizes.tokens) for point in cases.DECODE.points["cuda", "full"]}
    assert {1, 128} <= {batch for batch, _ in decode} and {1024, 131072} <= {keys for _, keys in decode}
    mixed = {(p.sizes.decode_batch, p.piece.new_tokens) for p in cases.MIXED.points["cuda", "full"]}
    assert mixed == {(batch, new) for batch in (31, 255) for new in (2048, 7936)}
    dims = {(p.sizes.head_dim, p.sizes.value_dim) for p in cases.HEAD_DIMS.points["cuda", "full"]}
    assert {(72, 72), (80, 80), (96, 96), (192, 128), (512, 512)} <= dims


def test_ranks_hold_whole_heads() -> None:
    assert cases.MODELS["llama3-70b"].on_rank(8) == (8, 1)
    assert cases.MODELS["qwen3-14b"].on_rank(8) == (5, 1)
    assert cases.Shape(32, 4, 64).on_rank(8) == (4, 1)
    with pytest.raises(ValueError, match="cannot be shared by 3 ranks"):
        cases.MODELS["llama3-8b"].on_rank(3)
    sinks = [p for p in cases.RANKS.points["cuda", "full"] if p.label.startswith("gpt-oss-20b TP8")]
    assert len(sinks) == 3 and all(p.case.sinks and p.sizes.num_heads == 8 for p in sinks)


def test_the_backward_pass_is_timed_by_itself() -> None:
    ours = [each for each in sections.PROVIDERS if each.name in ("my_triton", "sdpa")]
    place = (cases.CAUSAL, replace(SMALL, batch=2), torch.float32, CPU, ours, TWICE)
    results = training.run_case(*place, label="causal d16 2x96", forward=False)
    assert [(each.section, each.case) for each in results] == [("backward", "causal d16 2x96")] * 2
    for each in results:
        assert each.measured and set(each.details["gradients"]) == {"query", "key", "value"}


def test_limits_are_what_the_machine_does() -> None:
    limits = work.measure_limits(CPU, [torch.float32, torch.bfloat16], seconds=0.01)
    assert limits.flops_per_second["float32"] > 1e8 and limits.bytes_per_second > 1e8
    assert limits.flops_per_second["bfloat16"] >= limits.flops_per_second["float32"], "16 bits can be widened"
    assert limits.seconds(1.0, 1.0, "float16") is None
    rough = work.Limits({"float32": 100.0}, 10.0)
    assert rough.seconds(200.0, 10.0, "float32") == 2.0 and rough.seconds(200.0, 40.0, "float32") == 4.0
    result = measure.Result("kernels", "causal", "my_triton", "float32", samples=[8.0])
    assert share_of_limit(result, rough) is None
    result.details["work"] = {"flops": 200.0, "bytes": 40.0}
    assert share_of_limit(result, rough) == 0.5


def test_long_rows_are_checked_on_fewer_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    posed = problem.build_problem(cases.case_named("encoder_padded"), SMALL, torch.float32, CPU)
    assert measure.build_reference(posed).sequences.numel() == 4
    monkeypatch.setattr(measure, "CHECKED_KEYS", 60)
    reference = measure.build_reference(posed)
    assert reference.sequences.tolist() == [3, 0]
    right = problem.build_problem(cases.case_named("encoder_padded"), SMALL, torch.float32, CPU)
    output = sections.PROVIDERS[0].bind(right, right.mask_builder("my_triton")())()
    result = measure.Result("kernels", "encoder_padded", "my_triton")
    assert measure.check(output, reference, result) and result.details["sequences_checked"] == 2
    output[3] += 1
    assert not measure.check(output, reference, result)


def test_sweeps_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "run.json", tmp_path / "run.png"
    arguments = ["kernels", "--quick", "--device", "cpu", "--sweep", "ranks", "--against", "sdpa"]
    arguments += ["--shapes-of", "gpt-oss-20b", "--degrees", "8", "--json", str(out), "--plot", str(picture)]
    assert runner.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "gpt-oss-20b TP8 prefill" in shown and "the sweep ranks, forward" in shown
    document = saved.load(out)
    assert {row["provider"] for row in document["results"]} == {"my_triton", "sdpa"}
    assert len(document["results"]) == 2 * 3
    assert all(row["details"]["shape"]["num_heads"] == 8 for row in document["results"])


def test_time_that_is_up_ends_a_run_and_keeps_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.json"
    arguments = ["kernels", "--quick", "--tokens", "64", "--device", "cpu", "--seconds", "0.001"]
    assert runner.main([*arguments, "--json", str(out), "--plot", str(tmp_path / "run.png")]) == 0
    assert "Stopped after --seconds 0.001" in capsys.readouterr().out
    assert {row["case"] for row in json.loads(out.read_text(encoding="utf-8"))["results"]} == {"causal"}


def synthetic_run() -> list[measure.Result]:
    """Made-up results, one kind of each, to draw: no figure of it is claimed anywhere."""
    shape = {"batch": 1, "query_len": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "value_dim": 16}
    results = []
    for provider in ("my_triton", "sdpa"):
        for keys in (64, 128):
            details = {"work": {"kept_pairs": 9, "all_pairs": 9, "flops": 10**6, "bytes": 10**4}}
            details |= {"shape": shape | {"key_len": keys}}
            for section, case, sweep in (
                ("kernels", f"causal d16 1x{keys}", "lengths"),
                ("backward", f"causal d16 1x{keys}", "lengths"),
                ("kernels", f"decode 1x{keys}", "decode"),
                ("kernels", f"decode 1x{keys} pages", "decode"),
                ("kernels", "causal", ""),
                ("kernels", "bidirectional", ""),
            ):
                own = details | ({"sweep": sweep} if sweep else {})
                results.append(measure.Result(section, case, provider, "float32", samples=[0.01], details=own))
            results.append(
                measure.Result("memory", f"{keys}", provider, unit="bytes", samples=[4e6], details={"tokens": keys})
            )
            results.append(
                measure.Result("tp", "decode", f"{keys} ranks", samples=[1.0], work=8, details={"ranks": keys})
            )
        for section in ("models", "serve", "host"):
            results.append(measure.Result(section, "decode", provider, "float32", samples=[1.0], work=8))
    return results


def test_every_picture_is_drawn() -> None:
    machine = {"device": "a machine", "threads": 1, "device_type": "cpu"}
    drawn = plots.figures_of(synthetic_run(), machine, work.Limits({"float32": 1e9}, 1e9))
    assert list(drawn) == list(plots.FIGURES)
    for figure in drawn.values():
        assert plots.png(figure).startswith(b"\x89PNG\r\n\x1a\n")
        assert any(axis.has_data() for axis in figure.axes)
    assert plots.figures_of([], machine, None) == {}
