# SPDX-License-Identifier: Apache-2.0
"""Batches over pages: decoding, and single tokens beside a piece of a prompt in one call."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention_kernels import Spans
from attention_kernels.paged import causal_spans
from attention_plugin import flash_api
from benchmarks import __main__ as runner
from benchmarks import cases, measure, paged, problem, saved, work

CPU = torch.device("cpu")
SMALL = cases.Sizes(tokens=96, num_heads=4, num_kv_heads=2, head_dim=16, decode_batch=3)
DECODE = cases.Point("decode 3x96", cases.DECODE_EVEN, SMALL)
MIXED = cases.Point("mixed 3x96 + 24 after 40", cases.SINGLE_TOKENS, SMALL, replace(SMALL, tokens=64, new_tokens=24))
TWICE = measure.Effort(seconds=1e3, most=2)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, paged.FLOAT8], ids=measure.dtype_name)
def test_decoding_from_pages_is_right(kept: torch.dtype) -> None:
    dtype = torch.bfloat16 if kept == paged.FLOAT8 else kept
    results = {each.provider: each for each in paged.run_point(DECODE, dtype, kept, CPU, TWICE)}
    assert results["my_triton"].measured and results["sdpa"].measured
    if importlib.util.find_spec("flash_attn") is None:
        assert results["flash_attention_2"].status == "unavailable" and results["flash_attention_2"].reason
    keys, rows = 3 * 96 * 2 * 32 * kept.itemsize, 3 * 4 * 32 * dtype.itemsize
    assert results["my_triton"].details["work"]["bytes"] == keys + rows


def test_spans_that_are_found_beforehand_are_those_that_count() -> None:
    """As on a GPU, where finding them takes a call longer than decoding over few keys."""
    posed = paged.in_pages(
        [problem.build_problem(cases.DECODE_EVEN, SMALL, torch.float32, CPU)], paged.PAGE_SIZE, torch.float32
    )
    assert posed.spans is None  # on a CPU
    output = paged.run_ours(replace(posed, spans=causal_spans(posed.cache, 1, None)))
    assert torch.equal(output, paged.run_ours(posed))
    first = paged.run_ours(replace(posed, spans=Spans.sliding(1, posed.cache.key_len, left=0, offset=0)))
    assert not torch.allclose(first, output)


def test_pages_that_are_read_wrongly_fail() -> None:
    def unshuffled(posed: paged.PagedProblem) -> torch.Tensor:
        table = torch.arange(posed.cache.block_table.numel(), dtype=torch.int32).view_as(posed.cache.block_table)
        return paged.run_ours(replace(posed, cache=replace(posed.cache, block_table=table)))

    wrong = replace(paged.PROVIDERS[0], name="wrong", run=unshuffled)
    (result,) = paged.run_point(DECODE, torch.float32, torch.float32, CPU, TWICE, providers=[wrong])
    assert result.status == "failed" and "wrong result" in result.reason and not result.samples
    with pytest.raises(ValueError, match="must fill pages of 16"):
        paged.in_pages(
            [problem.build_problem(DECODE.case, replace(SMALL, tokens=90), torch.float32, CPU)], 16, paged.FLOAT8
        )


def mixed_parts(dtype: torch.dtype = torch.float32) -> list[problem.Problem]:
    singles = problem.build_problem(MIXED.case, MIXED.sizes, dtype, CPU)
    return [singles, problem.build_problem(cases.PIECE, MIXED.piece, dtype, CPU, seed=1)]


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, paged.FLOAT8], ids=measure.dtype_name)
def test_single_tokens_beside_a_piece_are_right(kept: torch.dtype) -> None:
    dtype = torch.bfloat16 if kept == paged.FLOAT8 else kept
    results = {each.provider: each for each in paged.run_point(MIXED, dtype, kept, CPU, TWICE)}
    assert list(results) == ["my_triton", "sdpa", "flash_attention_2"]
    for name in ("my_triton", "sdpa"):
        assert results[name].measured, results[name].reason
        assert [part["rows_checked"] for part in results[name].details["parts"]] == [1, 24]
        for part in results[name].details["parts"]:
            assert part["error"] <= part["error_bound"]
    if not torch.cuda.is_available():
        assert results["flash_attention_2"].reason == "FlashAttention runs on GPUs only"
    own = results["my_triton"]
    assert own.case == f"{MIXED.label} {'pages fp8' if kept == paged.FLOAT8 else 'pages'}"
    assert own.description == (
        "one new token for each of 3 sequences over up to 96 keys beside 24 new tokens of a prompt after 40 others"
    )
    assert (own.details["shape"]["batch"], own.details["shape"]["piece_query_len"]) == (3, 24)


def test_work_of_a_mixed_batch_is_that_of_its_parts() -> None:
    """Keys of padding are none, and those before the piece are read."""
    lengths, before = (96, 80, 64), range(41, 65)
    for kept in (torch.bfloat16, paged.FLOAT8):
        result = paged.run_point(MIXED, torch.bfloat16, kept, CPU, TWICE, providers=paged.PROVIDERS[:1])[0]
        counted = result.details["work"]
        pairs = sum(lengths) + sum(before)
        assert counted["kept_pairs"] == pairs and counted["all_pairs"] == 3 * 96 + 24 * 64
        assert counted["flops"] == 2 * pairs * 4 * 32
        keys, rows = (sum(lengths) + 64) * 2 * 32 * kept.itemsize, (3 + 24) * 4 * 32 * 2
        assert counted["bytes"] == keys + rows


def test_a_piece_sees_what_transformers_lets_it_see() -> None:
    _, piece = mixed_parts()
    assert (piece.query.shape[2], piece.key.shape[2], piece.query_offset) == (24, 64, 40)
    visible = piece.visible(torch.arange(24))[:, 0]
    assert torch.equal(work.spans_of(piece).to_dense(), visible)
    assert torch.equal(piece.mask_builder("sdpa")().expand(1, 1, -1, -1)[:, 0], visible)


def test_pages_begin_with_the_first_key_of_a_sequence() -> None:
    parts = mixed_parts()
    posed = paged.in_pages(parts, paged.PAGE_SIZE, torch.float32)
    assert posed.cache.seq_lens.tolist() == [96, 80, 64, 64]
    assert posed.query_offsets.tolist() == [0, 1, 2, 3, 27] and posed.max_query_len == 24
    assert posed.key_offsets.tolist() == [0, 96, 176, 240, 304]
    sequences = [(parts[0], 0, 96), (parts[0], 1, 80), (parts[0], 2, 64), (parts[1], 0, 64)]
    for table, (part, index, length) in zip(posed.cache.block_table, sequences, strict=True):
        for kept, given in ((posed.cache.key, part.key), (posed.cache.value, part.value)):
            rows = kept[table.long()].flatten(0, 1)[:length]
            assert torch.equal(rows, given[index, :, -length:].transpose(0, 1))
    (_, padded), (_, piece) = posed.layers
    assert padded.shape == (3, 1, 1, 96) and padded.sum((1, 2, 3)).tolist() == [96, 80, 64]
    assert padded[2, ..., :64].all() and piece.shape[-2:] == (24, 64)
    even = problem.build_problem(cases.DECODE_EVEN, SMALL, torch.float32, CPU)
    ((_, none),) = paged.in_pages([even], paged.PAGE_SIZE, torch.float32).layers
    assert none is None, "a mask would cost sdpa its fastest kernels"


def test_spans_of_a_mixed_batch_may_be_found_beforehand() -> None:
    posed = paged.in_pages(mixed_parts(), paged.PAGE_SIZE, torch.float32)
    assert posed.spans is None and posed.query.shape == (1, 4, 27, 16)
    spans = causal_spans(posed.cache, 27, posed.query_offsets)
    assert torch.equal(paged.run_ours(replace(posed, spans=spans)), paged.run_ours(posed))


@pytest.mark.parametrize("wrong", [0, 1])
def test_either_part_alone_may_be_wrong(wrong: int) -> None:
    """The single tokens' numbers are smaller: together with the piece's their error might pass."""

    def halves(posed: paged.PagedProblem) -> torch.Tensor:
        output = paged.run_ours(posed).clone()
        posed.by_part(output)[wrong].mul_(0.5)
        return output

    provider = replace(paged.PROVIDERS[0], name="wrong", run=halves)
    (result,) = paged.run_point(MIXED, torch.float32, torch.float32, CPU, TWICE, providers=[provider])
    assert result.status == "failed" and "wrong result" in result.reason and not result.samples
    right = [part["error"] <= part["error_bound"] for part in result.details["parts"]]
    assert right == [wrong == 1, wrong == 0] and result.details["error"] > result.details["error_bound"]


@pytest.mark.parametrize("point", [DECODE, MIXED], ids=["decode", "mixed"])
def test_flash_attn_is_asked_for_the_same_in_pages_of_its_size(
    point: cases.Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place is taken by this project's functions of the same names, which run on a CPU."""
    sizes = set()

    def run(posed: paged.PagedProblem) -> torch.Tensor:
        sizes.add(posed.cache.page_size)
        return paged.run_flash(posed)

    monkeypatch.setitem(sys.modules, "flash_attn", flash_api)
    flash = replace(paged.PROVIDERS[2], unavailable=lambda posed: None, page_size=32, run=run)
    (result,) = paged.run_point(point, torch.bfloat16, torch.bfloat16, CPU, TWICE, providers=[flash])
    assert result.measured, result.reason
    assert sizes == {32}


def test_pages_of_flash_attn_s_size_are_filled_on_a_gpu() -> None:
    points = [point for sweep in (cases.DECODE, cases.MIXED) for point in sweep.points["cuda", "full"]]
    sizes = [size for point in points for size in (point.sizes, point.piece) if size is not None]
    assert all(size.tokens % paged.FLASH_PAGE_SIZE == 0 for size in sizes)


def test_the_mixed_sweep_by_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cases.MIXED.points, ("cpu", "quick"), (MIXED,))
    out, picture = tmp_path / "run.json", tmp_path / "run.png"
    arguments = ["kernels", "--quick", "--device", "cpu", "--sweep", "mixed", "--against", "sdpa"]
    assert runner.main([*arguments, "--json", str(out), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert MIXED.label in shown and "the sweep mixed, forward" in shown and picture.exists()
    rows = saved.load(out)["results"]
    assert [(row["case"], row["provider"]) for row in rows] == [
        (f"{MIXED.label} {kind}", name) for kind in ("pages", "pages fp8") for name in ("my_triton", "sdpa")
    ]
    assert all(row["details"]["sweep"] == "mixed" and row["samples"] for row in rows)
