# SPDX-License-Identifier: Apache-2.0
"""Proving the Gluon kernel before it is used: the process that tries it, what comes of that, and what it finds."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import gluon_judges
import pytest
import torch

from attention_kernels import Spans, attention, hopper, prebound, tuned
from attention_kernels.config_tables import GLUON_CONFIGS
from attention_kernels.configs import assuming
from attention_kernels.paths import interpreting
from attention_plugin import tune as command
from attention_plugin.tune import ahead, gluon, tune
from attention_plugin.tune.gluon import TRIALS, GluonFails, GluonHangs, GluonUntried, first_wrong, measure_gluon
from attention_plugin.tune.problems import PASSES, Sizes, rows_to_measure
from attention_plugin.tune.store import Measured, rows_in, save

from helpers import DEVICE

pytest.importorskip("triton.experimental.gluon")

from on_ptx import running_on
from ptx import Device

from attention_kernels.hopper import launching

pytestmark = pytest.mark.usefixtures("user_cache")
on_the_machine = pytest.mark.skipif(
    interpreting() or DEVICE != "cpu", reason="the machine that runs compiled kernels takes CPU tensors, uninterpreted"
)
no_gpu = pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU, which a process can have")
CPU = torch.device("cpu")
KEY = ("gluon", 2, 64, "spans")


def problem(dim=64):
    with assuming("sm_90"):
        return rows_to_measure(CPU, ("forward",), (dim,), torch.bfloat16)[-1]


def test_it_is_measured_where_it_may_run():
    def keys(name, dtype=torch.bfloat16, passes=PASSES):
        with assuming(name):
            return [each.key for each in rows_to_measure(CPU, passes, (64, 256, 512), dtype) if each.key[0] == "gluon"]

    assert keys("sm_90") == [KEY, ("gluon", 2, 256, "spans")]
    assert keys("sm_90", torch.float16) == keys("sm_90")
    assert not keys("sm_90", torch.float32) and not keys("sm_100") and not keys("sm_90", passes=("backward", "decode"))
    assert problem().default[:4] == GLUON_CONFIGS["sm_90"][64][:4]


# ---------------------------------------------------------------------- the process of its own


def ask(judge, seconds=100.0, chip=None):
    return measure_gluon(problem(), CPU, torch.bfloat16, Sizes(), chip, time.monotonic() + seconds, judge)


def test_a_faster_kernel_gets_a_row():
    row, words = ask(gluon_judges.faster)
    assert row == Measured(KEY, problem().default, pytest.approx(90.0), pytest.approx(100.0))
    assert words == "90 us, the Triton kernel 100 us"


def test_one_that_is_as_fast_gets_none():
    assert ask(gluon_judges.as_fast) == (None, "98 us, the Triton kernel 100 us")


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (gluon_judges.wrong, "documents, bfloat16: error 1.00e+00, allowed 1.00e-03"),
        (gluon_judges.raises, "RuntimeError: an illegal memory access was encountered more of the same"),
        (gluon_judges.dies, "its process ended with exit status 7"),
    ],
)
def test_one_that_is_wrong_is_named(judge, words):
    with pytest.raises(GluonFails) as caught:
        ask(judge)
    assert str(caught.value) == words


def test_one_that_hangs_is_ended(monkeypatch):
    """Once it has begun, it has its time whatever is left; before that, the deadline holds."""
    monkeypatch.setattr(gluon, "MOST_SECONDS", 1.0)
    with pytest.raises(GluonHangs, match="it did not come back within 1 s"):
        ask(gluon_judges.hangs)
    for seconds in (0.5, 0.0):
        with pytest.raises(ahead.OutOfTime):
            ask(gluon_judges.hangs, seconds)
    assert not multiprocessing.active_children()


@no_gpu
def test_what_no_process_could_try_is_not_judged():
    with pytest.raises(GluonUntried, match=r"(?i)cuda|nvidia"):  # as on a GPU that is another process's alone
        measure_gluon(
            problem(),
            torch.device("cuda", 0),
            torch.bfloat16,
            Sizes(),
            None,
            time.monotonic() + 100,
            gluon_judges.faster,
        )


def test_the_process_ends_with_the_one_that_asks(tmp_path):
    """However that ends."""
    script = tmp_path / "asks.py"
    script.write_text(
        "import sys, time, gluon_judges, test_tune_gluon as tests\n"
        "if __name__ == '__main__':\n    tests.ask(gluon_judges.says_its_number)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True) as asks:
        number = int(asks.stdout.readline())
        os.kill(number, 0)
        asks.kill()
    for _ in range(100):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("it lives on")


# ---------------------------------------------------------------------- what comes of it


def tune_with(monkeypatch, found):
    """Tune the row for Gluon alone; `found` is what measuring returns or raises."""

    def measure(*given):
        if isinstance(found, Exception):
            raise found
        return found, "words"

    monkeypatch.setattr(command, "rows_to_measure", lambda *given: [problem()])
    monkeypatch.setattr(command, "measure_gluon", measure)
    outcome = tune(CPU, quiet=True)
    kept = [tuple(row["key"]) for row in rows_in(tuned.tuned_file("interpreter"))]
    return outcome, kept


def test_what_a_later_run_finds_takes_the_place_of_an_earlier_one(monkeypatch):
    other = Measured(("forward", 2, 64, "spans"), problem().default, 1.0, 2.0)
    save("interpreter", [other])
    row = Measured(KEY, problem().default, 90.0, 100.0)
    outcome, kept = tune_with(monkeypatch, row)
    assert outcome.measured == [row] and outcome.complete and not outcome.failed
    assert kept == [other.key, KEY]
    outcome, kept = tune_with(monkeypatch, ahead.OutOfTime())
    assert not outcome.complete and kept == [other.key, KEY]
    outcome, kept = tune_with(monkeypatch, GluonUntried("RuntimeError: all devices are busy"))
    assert outcome.complete and not outcome.failed and kept == [other.key, KEY]
    outcome, kept = tune_with(monkeypatch, None)
    assert outcome.complete and not outcome.failed and not outcome.measured and kept == [other.key]
    tune_with(monkeypatch, row)
    outcome, kept = tune_with(monkeypatch, GluonFails("two runs of one call differ"))
    assert outcome.failed == ["the Gluon kernel is not used for head dim 64: two runs of one call differ"]
    assert kept == [other.key]


def test_after_one_that_hangs_no_other_is_tried(monkeypatch):
    asked = []

    def measure(problem, *given):
        asked.append(problem.key)
        raise GluonHangs("it did not come back within 60 s")

    monkeypatch.setattr(command, "rows_to_measure", lambda *given: [problem(), problem(128)])
    monkeypatch.setattr(command, "measure_gluon", measure)
    outcome = tune(CPU, quiet=True)
    assert asked == [KEY]
    assert outcome.failed == ["the Gluon kernel is not used for head dim 64: it did not come back within 60 s"]


def test_one_that_does_not_compile_is_not_asked(monkeypatch):
    monkeypatch.setattr(ahead.Ahead, "why_not", lambda *given: "does not compile: CompilationError")
    monkeypatch.setattr(command, "rows_to_measure", lambda *given: [problem()])
    monkeypatch.setattr(command, "measure_gluon", lambda *given: pytest.fail("it was asked"))
    outcome = tune(CPU, quiet=True)
    assert outcome.failed == ["the Gluon kernel is not used for head dim 64: does not compile: CompilationError"]


@on_the_machine
def test_a_head_dim_with_a_row_runs_it_and_no_other_call_does(monkeypatch, caplog):
    """And what was launched once is launched again without a choice: descriptors are made of other tensors."""
    torch.manual_seed(0)
    calls = []
    real = launching.forward
    monkeypatch.setattr(launching, "forward", lambda *given, **options: calls.append(given) or real(*given, **options))
    save("interpreter", [Measured(KEY, problem().default, 90.0, 100.0)])
    first, second = torch.randn(2, 3, 1, 2, 100, 64, dtype=torch.bfloat16)
    with running_on(90), caplog.at_level(logging.WARNING, "attention_kernels"):
        assert hopper.is_proven(CPU, torch.bfloat16, 64) and hopper.is_proven(CPU, torch.float16, 64)
        assert not hopper.is_proven(CPU, torch.float32, 64) and not hopper.is_proven(CPU, torch.bfloat16, 128)
        spans = Spans.causal(100)
        outputs = [attention(*each, spans) for each in (first, second)]
        assert len(calls) == 1
        ((step,),) = (tape.steps for tape in prebound._tapes.values())
        assert [like.base for _, _, like in step.descriptors] == [None] * 4, "tensors are not kept"
        attention(*first, spans, softcap=30.0)
        attention(*first[..., :32].contiguous(), spans)
        assert len(calls) == 1
        prebound.forget()
        assert torch.equal(attention(*second, spans), outputs[1])
        assert len(calls) == 2
        hopper.enable(False)
        try:
            attention(*first, spans)
        finally:
            hopper.enable(None)
        assert len(calls) == 2
    assert not caplog.records, "it was not asked for"
    tuned.forget()
    with running_on(90), tuned.using(CPU, {}):
        for each, output in zip((first, second), outputs, strict=True):
            torch.testing.assert_close(attention(*each, spans), output, rtol=2e-2, atol=2e-2)
    assert len(calls) == 2


@on_the_machine
def test_what_is_compiled_ahead_is_what_is_run(monkeypatch):
    """All trials in both dtypes, and the calls that are timed."""
    run = []

    def forward(arguments, **options):
        run.append((arguments.query.dtype, arguments.query.device.type))
        return (arguments.query,)

    monkeypatch.setattr(launching, "forward", forward)
    assert (
        ahead.compile_shape(problem(), problem().default, ahead.Chip("sm_90", "sm_90", 132), torch.bfloat16, Sizes())
        is None
    )
    expected = [torch.bfloat16] * len(TRIALS) + [torch.float16] * len(TRIALS) + [torch.bfloat16] * 2
    assert run == [(dtype, "meta") for dtype in expected]


# ---------------------------------------------------------------------- what finds that it is wrong


def shown(*hidden, tokens=70):
    mask = torch.ones(1, tokens, dtype=torch.bool)
    mask[:, list(hidden)] = False
    return mask


SMALL = (
    replace(TRIALS[0], spans=lambda device: Spans.causal(140, device=device), heads=3, kv_heads=1),
    replace(TRIALS[3], spans=lambda device: Spans.sliding(129, left=40, device=device), heads=3, kv_heads=1),
    replace(TRIALS[4], spans=lambda device: gluon._masked(shown(0, 1, 2), None, device), batch=1, heads=1, kv_heads=1),
    replace(TRIALS[5], spans=lambda device: gluon._masked(shown(0, 9, 40), 50, device), batch=1, heads=3, kv_heads=1),
    replace(TRIALS[6], spans=lambda device: gluon._masked(shown(0, 9, 40), 50, device), batch=1, heads=3, kv_heads=1),
)


@on_the_machine
def test_the_kernel_is_right_on_the_machine():
    with running_on(90, late=True):
        assert first_wrong(CPU, torch.bfloat16, 64, SMALL, repeats=2) is None


@on_the_machine
def test_a_right_kernel_is_judged_by_its_time(monkeypatch):
    monkeypatch.setattr(gluon, "TRIALS", SMALL[:1])
    monkeypatch.setattr(gluon.first_wrong, "__defaults__", (SMALL[:1], 1))
    with running_on(90):
        verdict = gluon.judged(problem(), CPU, torch.bfloat16, Sizes(batch=1, heads=2, tokens=64))
    assert verdict.wrong is None and verdict.seconds > 0 and verdict.triton_seconds > 0


@on_the_machine
@pytest.mark.parametrize(
    ("old", "new", "trial", "words"),
    [
        ("ex2.approx", "lg2.approx", 0, "error"),
        ("0f3F317218", "0f3F400000", 0, "the log-sum-exp is wrong"),
        # Products are looked at before they are there, and a part of the output is not written.
        ("wgmma.wait_group.sync.aligned.* 1;", "", 0, "error"),
        ("cp.async.bulk.tensor.4d.global.shared::cta.*;", "", 0, "error nan"),
        # Keys that are hidden are seen, and others are not.
        ("setp.ne.b16", "setp.eq.b16", 3, "error"),
    ],
)
def test_a_wrong_kernel_is_found(old, new, trial, words, monkeypatch):
    def changed_text(device, kernel):
        text, times = re.subn(old, new, kernel.asm["ptx"])
        assert times, f"{old} is not in the text"
        return text

    monkeypatch.setattr(Device, "text_of", changed_text)
    with running_on(90, late=True):
        wrong = first_wrong(CPU, torch.bfloat16, 64, SMALL[trial : trial + 1], repeats=1)
    assert wrong is not None and wrong.startswith(f"{SMALL[trial].name}, bfloat16: ") and words in wrong


@on_the_machine
def test_bits_that_do_not_repeat_are_found(monkeypatch):
    real, runs = gluon.run_kernel, []

    def other_bits(trial, inputs):
        runs.append(trial)
        output, lse, rounding = real(trial, inputs)
        return output + (len(runs) == 2) * 1e-2, lse, rounding

    monkeypatch.setattr(gluon, "run_kernel", other_bits)
    with running_on(90):
        assert first_wrong(CPU, torch.bfloat16, 64, SMALL[:1], repeats=3) == (
            "a causal prompt, bfloat16: two runs of one call differ"
        )
