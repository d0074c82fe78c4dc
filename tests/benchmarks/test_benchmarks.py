# SPDX-License-Identifier: Apache-2.0
"""The benchmark runner: right answers at small sizes, wrong ones never timed, and what it leaves behind."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from attention_kernels import Spans, attention, paths
from benchmarks import __main__ as runner
from benchmarks import (
    cases,
    host,
    kernels,
    measure,
    memory,
    models,
    problem,
    providers,
    summary,
    tables,
    training,
)

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = cases.Sizes(tokens=96, num_heads=4, num_kv_heads=2, head_dim=16, window=24, decode_batch=3)
TWICE = measure.Effort(seconds=1e3, most=2)
INTERPRETED = [provider for provider in providers.PROVIDERS if not provider.compiles]


@pytest.fixture(autouse=True)
def one_thread():
    """Small products on several threads spend their time waiting for each other where other tests run beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=measure.dtype_name)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_provider_that_runs_is_right(case: cases.Case, dtype: torch.dtype) -> None:
    results = {result.provider: result for result in kernels.run_case(case, SMALL, dtype, CPU, INTERPRETED, TWICE)}
    assert set(results) == {provider.name for provider in INTERPRETED}
    assert {name: r.reason for name, r in results.items() if r.status == "failed"} == {}
    for name in ("my_triton", "eager"):
        assert results[name].status == "ok", results[name].reason
        assert len(results[name].samples) == 2
    assert (results["sdpa"].status == "ok") == (case.softcap is None and not case.sinks)
    for result in results.values():
        assert result.status == "ok" or (result.reason and not result.samples)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_the_stated_mask_is_what_transformers_builds(case: cases.Case) -> None:
    posed = problem.build_problem(case, SMALL, torch.float32, CPU)
    rows = torch.arange(posed.query.shape[2])
    visible, compared = posed.visible(rows)[:, 0], posed.compared(rows)
    spans = posed.mask_builder("my_triton")().spans
    if case.packed:
        assert posed.position_ids[0].tolist().count(0) == 8
    assert torch.equal(spans.to_dense().expand_as(visible)[compared], visible[compared])
    assert compared.any()


def test_flex_attention_has_figures_or_a_reason() -> None:
    flex = next(provider for provider in providers.PROVIDERS if provider.compiles)
    (result,) = kernels.run_case(cases.case_named("causal"), SMALL, torch.float32, CPU, [flex], TWICE)
    assert result.status != "failed", result.reason
    assert result.measured or result.reason


def test_a_wrong_result_fails_and_is_not_timed() -> None:
    runs = 0

    def forgets_padding(module, query, key, value, mask, **keywords):
        nonlocal runs
        runs += 1
        everything = replace(mask, spans=Spans.causal(query.shape[2], key.shape[2]), attended=None)
        return providers.PROVIDERS[0].forward(module, query, key, value, everything, **keywords)

    wrong = replace(providers.PROVIDERS[0], name="wrong", forward=forgets_padding)
    results = kernels.run_case(
        cases.case_named("left_padded"), SMALL, torch.bfloat16, CPU, [providers.PROVIDERS[0], wrong], TWICE
    )
    right, failed = results
    assert right.measured
    assert failed.status == "failed" and failed.samples == [] and runs == 1
    assert "wrong result" in failed.reason
    assert "FAILED" in tables.kernel_cell(failed, right).plain
    assert any("bold red" in str(line.style) and "wrong" in line.plain for line in summary.absences(results))


def test_the_load_before_a_run_is_said_as_what_it_is() -> None:
    """It may be larger than the number of cores, so it counts no busy cores."""
    machine = {"device": "a processor", "threads": 2, "cores": 2, "load_before": 7.1}
    texts = [each.plain for each in summary.closing_panel([], machine, {}).renderable.renderables]
    assert any(text.startswith("The load average was 7.1 before this began") for text in texts)
    quiet = summary.closing_panel([], machine | {"load_before": 0.4}, {}).renderable.renderables
    assert not any("load average" in each.plain for each in quiet)


def test_nan_is_a_wrong_result() -> None:
    posed = problem.build_problem(cases.case_named("causal"), SMALL, torch.float32, CPU)
    reference = measure.build_reference(posed)
    result = measure.Result("kernels", "causal", "nan")
    assert not measure.check(torch.full((1, 96, 4, 16), torch.nan), reference, result)
    assert result.status == "failed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=measure.dtype_name)
@pytest.mark.parametrize("case", training.CASES, ids=lambda case: case.name)
def test_every_provider_that_trains_has_right_gradients(case: cases.Case, dtype: torch.dtype) -> None:
    results = {result.provider: result for result in training.run_case(case, SMALL, dtype, CPU, INTERPRETED, TWICE)}
    assert set(results) == {provider.name for provider in INTERPRETED}
    assert {name: r.reason for name, r in results.items() if r.status == "failed"} == {}
    wanted = {"query", "key", "value"} | ({"sinks"} if case.sinks else set()) | ({"bias"} if case.bias else set())
    for name in ("my_triton", "eager"):
        assert results[name].status == "ok", results[name].reason
        assert len(results[name].samples) == 2
        assert set(results[name].details["gradients"]) == wanted
    assert (results["sdpa"].status == "ok") == (case.softcap is None and not case.sinks)


def test_gradients_are_checked_on_fewer_tokens_and_alike_otherwise() -> None:
    sizes = cases.SIZES["cuda", "full"]
    assert training.shortened(sizes) == replace(sizes, tokens=512, window=32)
    assert training.shortened(SMALL) == SMALL


def test_the_reference_of_gradients_is_not_rounded() -> None:
    posed = training.wanting_gradients(problem.build_problem(cases.case_named("sinks"), SMALL, torch.bfloat16, CPU))
    for exact in training.build_gradient_reference(posed).truth.values():
        assert exact.dtype == torch.float64 and not torch.equal(exact, exact.bfloat16().double())


def test_a_wrong_gradient_fails_and_is_not_timed() -> None:
    runs = {"doubles": 0, "detaches": 0}

    def doubles(module, query, key, value, mask, **keywords):
        runs["doubles"] += 1
        same = 2 * value - value.detach()  # the value, with twice its gradient
        return providers.PROVIDERS[0].forward(module, query, key, same, mask, **keywords)

    def detaches(*arguments, **keywords):
        runs["detaches"] += 1
        output, weights = providers.PROVIDERS[0].forward(*arguments, **keywords)
        return output.detach(), weights

    ours = providers.PROVIDERS[0]
    peers = [replace(ours, name=forward.__name__, forward=forward) for forward in (doubles, detaches)]
    results = training.run_case(cases.case_named("sliding"), SMALL, torch.float32, CPU, [ours, *peers], TWICE)
    right, wrong, without = results
    assert right.measured
    assert wrong.status == "failed" and wrong.samples == []
    assert "wrong gradient of value" in wrong.reason and "query" not in wrong.reason
    assert without.status == "unavailable" and without.samples == [] and "does not require grad" in without.reason
    assert runs == {"doubles": 1, "detaches": 1}
    lines = [line.plain for line in summary.absences(results)]
    assert [line.partition(": ")[0] for line in lines] == ["failed in training", "unavailable in training"]


def test_what_is_missing_in_training_as_in_the_kernels_is_said_once() -> None:
    absent = [
        measure.Result(section, "causal", provider, status="unavailable", reason=reason)
        for section, provider, reason in (
            ("kernels", "flash", "no GPU"),
            ("training", "flash", "no GPU"),
            ("training", "flex", "no gradient"),
        )
    ]
    lines = [line.plain for line in summary.absences(absent)]
    assert lines == ["unavailable: flash: no GPU", "unavailable in training: flex: no gradient"]


def test_a_gradient_that_is_not_finite_where_it_is_timed_fails() -> None:
    result = measure.Result("training", "causal", "nan")
    assert not training.check_finite({"query": torch.ones(2), "key": torch.tensor([1.0, torch.nan])}, result)
    assert result.status == "failed" and result.reason.endswith("the gradient of key")


@pytest.mark.parametrize("last", [2, 4])
def test_what_raises_while_it_is_timed_leaves_the_others_their_turns(last: int) -> None:
    """In the warm-up, after one call that was checked, or in a later round."""
    ours = providers.PROVIDERS[0]
    runs = {"peer": 0}

    def tires(*arguments, **keywords):
        runs["peer"] += 1
        if runs["peer"] == last:
            raise RuntimeError("out of memory\nand a long trace")
        return ours.forward(*arguments, **keywords)

    contestants = [ours, replace(ours, name="peer", forward=tires)]
    effort = measure.Effort(seconds=1e3, most=5)
    right, tired = kernels.run_case(cases.case_named("causal"), SMALL, torch.float32, CPU, contestants, effort)
    assert len(right.samples) == 5 and runs["peer"] == last
    assert (tired.status, tired.samples) == ("unavailable", [])
    assert tired.reason == "while it was timed: RuntimeError: out of memory"
    contestants[1] = replace(contestants[1], name=providers.GLUON)
    runs["peer"] = 0
    _, own = kernels.run_case(cases.case_named("causal"), SMALL, torch.float32, CPU, contestants, effort)
    assert own.status == "failed", "what this project raises is no reason, but a failure"


def test_slow_calls_get_fewer_turns() -> None:
    order: list[str] = []
    calls = {
        "fast": measure.Call(lambda prepared: order.append(prepared), lambda: "prepared"),
        "slow": measure.Call(lambda _: time.sleep(0.02)),
        "slowest": measure.Call(lambda _: time.sleep(0.1)),
    }
    samples = measure.interleaved(calls, CPU, measure.Effort(seconds=0.09, least=3, most=20))
    assert order == ["prepared"] * 21  # and one to warm up
    assert {name: len(taken) for name, taken in samples.items()} == {"fast": 20, "slow": 3, "slowest": 1}


def test_a_sample_of_microseconds_is_the_mean_of_many_runs() -> None:
    counts = {"short": 0, "once": 0, "long": 0}

    def count(name: str, seconds: float | None = None) -> None:
        counts[name] += 1
        if seconds is not None:  # even a sleep of no seconds takes as long as the system likes
            time.sleep(seconds)

    calls = {
        "short": measure.Call(lambda _: count("short"), repeatable=True),
        "once": measure.Call(lambda _: count("once")),
        "long": measure.Call(lambda _: count("long", 0.01), repeatable=True),
    }
    samples = measure.interleaved(calls, CPU, measure.Effort(seconds=0.3, most=3))
    assert {name: len(taken) for name, taken in samples.items()} == {"short": 3, "once": 3, "long": 3}
    assert counts["short"] > 30
    assert (counts["once"], counts["long"]) == (4, 4)  # and one to warm up
    assert max(samples["short"]) < measure.SAMPLE_SECONDS / 10


def test_masks_as_spans_are_smaller_than_dense_ones() -> None:
    ours, dense = kernels.run_masks(cases.case_named("left_padded"), SMALL, CPU, ["my_triton", "sdpa"], TWICE)
    assert ours.details["bytes"] == 4 * (96 + 1)
    assert dense.details["bytes"] == 96 * 96
    assert len(ours.samples) == len(dense.samples) == 2


def test_peak_memory_is_measured_in_a_process_of_its_own() -> None:
    result = memory.measure_peak("sdpa", 2048, torch.float32, CPU)
    assert result.status == "ok", result.reason
    assert result.samples[0] > 2048 * 2048  # the dense mask alone


def test_the_prompt_s_own_token_is_among_those_compared(checkpoint_dir: Path) -> None:
    model = models.load_reference(checkpoint_dir, "eager", torch.float32, CPU)
    inputs = models.padded_prompts(PreTrainedTokenizerFast.from_pretrained(checkpoint_dir), 24)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(**inputs, position_ids=positions).logits[:, -1].sort(-1, descending=True)
        tokens, margins = models.decode(model, models.prefill(model, inputs), 2)
        none, _ = models.decode(model, models.prefill(model, inputs), 0)
    assert tokens.shape == margins.shape == (len(models.PROMPT_SHARES), 3)
    assert torch.equal(tokens[:, :1], logits.indices[:, :1]) and torch.equal(tokens[:, :1], none)
    torch.testing.assert_close(margins[:, 0], logits.values[:, 0] - logits.values[:, 1])


def test_greedy_tokens_may_differ_only_at_a_near_tie() -> None:
    truth, margins = torch.tensor([[1, 2, 3]]), torch.tensor([[1.0, 1e-5, 1.0]])
    assert models.tokens_agree(torch.tensor([[1, 9, 9]]), truth, margins)
    assert not models.tokens_agree(torch.tensor([[9, 2, 3]]), truth, margins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=measure.dtype_name)
def test_models_agree_with_eager(checkpoint_dir: Path, dtype: torch.dtype) -> None:
    sizes = models.ModelSizes(prompt_tokens=48, new_tokens=4, sentences=4, train_seconds=1)
    results = models.run_reference_model(checkpoint_dir, sizes, dtype, CPU, TWICE, lambda text: None)
    results += models.run_embeddings(sizes, dtype, CPU, TWICE, lambda text: None)
    assert {(r.case, r.provider): r.reason for r in results if not r.measured} == {}
    assert {r.case for r in results} == {"prefill", "decode", "embeddings"}
    assert {r.provider for r in results} == {"my_triton", "sdpa", "eager"}


@pytest.mark.parametrize("launches", [True, False])
def test_host_cost_is_measured_without_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, launches: bool
) -> None:
    monkeypatch.setattr(host, "triton_installed", lambda: launches and paths.triton_installed())
    out = tmp_path / "run.json"
    arguments = ["host", "--quick", "--device", "cpu", "--json", str(out)]
    assert runner.main([*arguments, "--plot", str(tmp_path / "run.png")]) == 0
    assert "microseconds of Python" in capsys.readouterr().out
    rows = {(row["case"], row["provider"]): row for row in json.loads(out.read_text(encoding="utf-8"))["results"]}
    cases, names = ("decode", "causal", "causal, with gradients"), ("attention", "my_triton", "sdpa")
    assert list(rows) == [(case, name) for case in cases for name in names]
    assert {row["section"] for row in rows.values()} == {"host"}
    available = launches and paths.triton_installed() and not paths.interpreting()
    for (case, name), row in rows.items():
        timed = available if name != "sdpa" else case != "causal, with gradients"
        assert bool(row["samples"]) == timed and bool(row["reason"]) != timed
    # What launched nothing is forgotten: the next call of the kind computes.
    query, key, value = (torch.ones(8, heads, 512, 128, dtype=torch.bfloat16) for heads in (32, 8, 8))
    assert (attention(query[:, :, :1], key, value, Spans.full(1, 512)) == 1).all()


def test_host_leaves_out_what_the_first_call_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it takes seconds: more than a call's share, so that no other sample would be taken."""
    compiling = iter([0.2])
    monkeypatch.setattr(host, "can_launch_nothing", lambda: False)
    runs = {host.OPERATOR: None, providers.OURS: None, providers.BASELINE: lambda: time.sleep(next(compiling, 0.0))}
    monkeypatch.setattr(host, "calls", lambda problem: runs)
    small = problem.build_problem(cases.case_named("decode"), SMALL, torch.float32, CPU)
    *_, result = host.time_calls(small, measure.Effort(seconds=0.05), lambda text: None)
    assert len(result.samples) >= 3 and max(result.samples) < 0.2 / host.CALLS
