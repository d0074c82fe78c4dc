# SPDX-License-Identifier: Apache-2.0
"""Every shipped configuration compiles ahead of time, for each GPU, within its limits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch

from attention_kernels.config_tables import (
    BACKWARD_CONFIGS,
    BACKWARD_FASTER_CONFIGS,
    CONFIGS,
    DECODE_CONFIGS,
    MOST_ROWS,
    SERVES,
    SHARED_MEMORY,
    Work,
)
from attention_kernels.configs import assuming, backward_config, forward_config
from attention_kernels.paths import interpreting

pytest.importorskip("triton")

import triton

from attention_kernels import backward, backward_kernels
from attention_kernels.ahead_of_time import Case, Compiled, compile_ahead, shipped_cases
from attention_kernels.ahead_of_time.shipped import QUERY_LEN, extras_of, tensors
from attention_kernels.backward import Call
from attention_kernels.forward import forward_kernel, kernel_arguments
from attention_kernels.launch import COMPILER_OPTIONS, score_operand, span_operand
from attention_kernels.spans import Spans
from attention_kernels.write import write_arguments, write_kernel

compiles = pytest.mark.skipif(interpreting(), reason="the interpreter does not compile")

CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def is_quick(case: Case) -> bool:
    """`make test` compiles all 16-bit rows for the chip whose limits are strictest, where nothing may spill.

    Of the other chips it compiles a row of the forward and one of the backward pass.
    """
    if case.architecture == "sm_90":
        return case.element_size == 2
    return case.element_size == 2 and case.dim == 128 and case.work in ("spans", "query")


def cases() -> Iterator:
    """All rows; of those on a chip that share a kernel and a tile shape only the last, which needs the most."""
    for architecture in SHARED_MEMORY:
        last = {}
        for case in shipped_cases(architecture):
            # Rows of the forward pass share their tile shapes in float32.
            alone = case.part in ("backward", "decode") or (case.element_size == 2 and "(" in case.work)
            apart = case.work if alone else ""
            shape = None if case.config is None else case.config._replace(reason="")
            last[case.part, case.element_size, case.dim, shape, apart] = case
        for case in last.values():
            yield pytest.param(case, id=case.name, marks=() if is_quick(case) else pytest.mark.exhaustive)


SPILLS_ELSEWHERE = {
    ("3.6", "sm_90-forward-16bit-128-spans-(softcap)"): 2,
    ("3.6", "sm_90-forward-16bit-256-tiles"): 2,  # with a bias in float32 alone
    ("3.6", "sm_90-backward-16bit-64-key_value-(spans)"): 2,
    ("3.6", "sm_90-backward-16bit-64-key_value-(hidden-keys)"): 6,
    ("3.6", "sm_90-backward-16bit-256-key_value-(spans)"): 2,
    ("3.6", "sm_90-backward-16bit-256-key_value-(hidden-keys)"): 5,
    ("3.6", "sm_90-decode-16bit-128-many-pages-(float8)"): 30,
    ("3.8", "sm_90-forward-16bit-128-spans-(softcap)"): 2,
    ("3.8", "sm_90-forward-16bit-256-spans"): 12,
    ("3.8", "sm_90-forward-16bit-256-spans-(softcap)"): 10,
    ("3.8", "sm_90-forward-16bit-256-tiles"): 32,
    ("3.8", "sm_90-backward-16bit-128-key_value"): 6,
    ("3.8", "sm_90-backward-16bit-128-query-(all-but-dropout)"): 4,
    ("3.8", "sm_90-backward-16bit-256-query-(all-but-dropout)"): 32,
    ("3.8", "sm_90-backward-16bit-256-key_value-(hidden-keys)"): 3,
    ("3.9", "sm_90-backward-16bit-128-query"): 15,
    ("3.9", "sm_90-backward-16bit-256-query-(all-but-dropout)"): 25,
    ("3.9", "sm_90-backward-16bit-256-key_value-(spans)"): 126,
    ("3.9", "sm_90-backward-16bit-256-key_value-(hidden-keys)"): 134,
}
"""Instructions that other Tritons than the pinned one spill, as docs/compile-report.md says."""


IS_PINNED = triton.__version__.startswith("3.7.")
"""Whether the installed Triton is the one whose spills are looked at everywhere."""


def spills_allowed(case: Case) -> int:
    """How many instructions the installed Triton may spill where the pinned one spills none."""
    return SPILLS_ELSEWHERE.get((triton.__version__.rpartition(".")[0], case.name), 0)


def assert_within_limits(compiled, case: Case) -> None:
    assert compiled.shared_memory <= SHARED_MEMORY[case.architecture]
    if case.architecture == "sm_90" and (case.dim <= 256 or case.part == "backward"):
        assert compiled.spills <= spills_allowed(case)


@compiles
@pytest.mark.parametrize("case", list(cases()))
def test_configuration_compiles_within_limits(case):
    kernel, arguments = case.kernel()
    assert_within_limits(compile_ahead(kernel, case.architecture, arguments), case)


@compiles
@pytest.mark.parametrize("dims", [(576, 512), (40, 512), (192, 128)])
@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=() if name == "sm_90" else pytest.mark.exhaustive) for name in CHIPS]
)
def test_heads_of_two_widths_fit(architecture, dims):
    """Heads beyond 512 columns are multiplied in pieces also where a row has them whole."""
    (query, key, _, _), (_, _, value, output) = (tensors(torch.bfloat16, dim) for dim in dims)
    config = forward_config(architecture, query.dtype, *dims, QUERY_LEN, has_tiles=True, has_dropout=False)
    arguments = kernel_arguments(
        query, key, value, output, output, torch.empty(2, 4, QUERY_LEN), sinks=torch.zeros(4), scale=0.1, config=config,
        **extras_of(SERVES["all but dropout"]),
    )  # fmt: skip
    compiled = compile_ahead(forward_kernel, architecture, arguments)
    assert compiled.shared_memory <= SHARED_MEMORY[architecture]


@compiles
@pytest.mark.parametrize("descriptors", [False, True])
def test_products_run_beside_exponentials(descriptors):
    """In Hopper's machine code a matrix instruction is unfinished while a turn's weights are computed."""
    wanted = ("forward", 2, 128, "spans")
    (case,) = (c for c in shipped_cases("sm_90") if (c.part, c.element_size, c.dim, c.work) == wanted)
    assert case.config.overlap
    for overlap in (True, False):
        config = case.config._replace(overlap=overlap, descriptors=descriptors)
        kernel, arguments = replace(case, config=config).kernel()
        compiled = compile_ahead(kernel, "sm_90", arguments)
        loop = compiled.code.loop
        assert loop.counts["special"] >= 32
        assert loop.in_flight == (loop.counts["special"] if overlap else 0)
        assert loop.waits == 1
        assert compiled.spills == 0
        assert bool(compiled.code.bulk_copies) == (descriptors and overlap)


@compiles
@pytest.mark.parametrize("dim", [64, 128])
def test_overlapping_costs_no_exponentials(dim):
    """Where weights are wanted in two layouts the compiler computes them twice."""
    loops = []
    for overlap in (False, True):
        (case,) = (case for case in shipped_cases("sm_90") if (case.dim, case.work) == (dim, "dropout (overlap)"))
        kernel, arguments = replace(case, config=case.config._replace(overlap=overlap)).kernel()
        loops.append(compile_ahead(kernel, "sm_90", arguments).code.loop)
    plain, overlapped = loops
    assert overlapped.counts["special"] == plain.counts["special"]
    assert overlapped.instructions < 1.05 * plain.instructions
    assert overlapped.in_flight >= 16 > plain.in_flight


@compiles
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_matrix_instructions_are_waited_for_together_where_there_is_a_bias(dim, stored):
    """The assembler waits for each by itself where anything is read between them and the softmax."""
    wanted = ("forward", 2, dim, "tiles")
    (case,) = (c for c in shipped_cases("sm_90") if (c.part, c.element_size, c.dim, c.work) == wanted)
    kernel, arguments = case.kernel()
    scores = (2, 4, arguments["query_len"], arguments["key_len"])
    bias = score_operand(torch.empty(2, 1, *scores[2:], dtype=stored), scores)
    compiled = compile_ahead(kernel, "sm_90", arguments | {"bias": bias, "mask": None, "softcap": None})
    assert compiled.spills <= spills_allowed(case)
    assert compiled.code.loop.waits == 1 < sum(compiled.code.loop.matrix.values())


@compiles
@pytest.mark.parametrize("work", ["query", "key_value"])
@pytest.mark.parametrize("dim", [64, 128])
def test_gradients_use_the_matrix_instructions_of_warp_groups(dim, work):
    """With every extra there is: masks, a bias, a softcap and dropout take registers."""
    wanted = ("backward", 2, dim, work)
    (case,) = (c for c in shipped_cases("sm_90") if (c.part, c.element_size, c.dim, c.work) == wanted)
    kernel, arguments = case.kernel()
    matrix = compile_ahead(kernel, "sm_90", arguments).code.matrix
    assert matrix and all(name.startswith("HGMMA.64x") for name in matrix)


@compiles
def test_products_and_sums_are_fused_whatever_triton_does_by_itself(monkeypatch):
    """By default Triton 3.10 fuses none."""
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    case = next(case for case in shipped_cases("sm_90") if (case.part, case.dim) == ("merge", 64))
    kernel, arguments = case.kernel()
    assert "fma.rn.f32" in compile_ahead(kernel, "sm_90", arguments).binary["ptx"]
    monkeypatch.setitem(COMPILER_OPTIONS, "enable_fp_fusion", False)
    assert "fma.rn.f32" not in compile_ahead(kernel, "sm_90", arguments).binary["ptx"]


@compiles
def test_limits_are_noticed():
    """A tile too large for the registers spills, and one too large for the chip is over its shared memory."""
    case = next(
        case for case in shipped_cases("sm_90") if (case.part, case.dim, case.work) == ("forward", 256, "spans")
    )
    kernel, arguments = case.kernel()
    spilling = compile_ahead(kernel, "sm_90", arguments | {"BLOCK_M": 128, "BLOCK_N": 128, "num_stages": 1})
    assert spilling.spills > 0
    with pytest.raises(AssertionError):
        assert_within_limits(spilling, case)
    large = compile_ahead(kernel, "sm_90", arguments | {"num_stages": 8})
    assert large.shared_memory > SHARED_MEMORY["sm_90"]
    with pytest.raises(AssertionError):
        assert_within_limits(large, case)


@compiles
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
def test_quantising_keeps_nan_and_rounds_as_torch_does(stored):
    """Hopper's min and max pass over a NaN unless they are told not to, and its quick quotient is not the nearest."""
    new, pages = torch.empty(8, 2, 64, dtype=torch.bfloat16), torch.empty(4, 16, 2, 64, dtype=stored)
    slots, scale = torch.empty(8, dtype=torch.int64), torch.empty(1)
    code = compile_ahead(write_kernel, "sm_90", write_arguments(new, pages, scale, slots)).binary["ptx"]
    bounds = re.findall(r"\b(?:min|max)\.[\w.]*f32", code)  # Triton 3.9 has one instruction for both
    assert bounds and all(".NaN." in instruction for instruction in bounds)
    assert "div.rn.f32" in code and "div.full.f32" not in code


@compiles
def test_caches_are_written_16_bytes_at_a_time():
    new, pages = torch.empty(8, 8, 128, dtype=torch.bfloat16), torch.empty(4, 16, 8, 128, dtype=torch.bfloat16)
    arguments = write_arguments(new, pages, None, torch.empty(8, dtype=torch.int64))
    code = compile_ahead(write_kernel, "sm_90", arguments).binary["ptx"]
    assert re.findall(r"(?:ld|st)\.global\S*", code) == ["ld.global.b64", "ld.global.v4.b32", "st.global.v4.b32"]


def training_kernels(dim: int, tokens: int) -> Iterator[Compiled]:
    """All kernels of a training step with 8 heads and 2 key heads, causal, as compiled for sm_90."""
    query, key, value, output = (
        torch.empty(1, tokens, heads, dim, dtype=torch.bfloat16).transpose(1, 2) for heads in (8, 2, 2, 8)
    )
    row, causal = torch.empty(1, 8, tokens), Spans.causal(tokens)
    spans = span_operand(causal.start, causal.end, None, None)
    config = forward_config("sm_90", query.dtype, dim, dim, tokens, has_tiles=False, has_dropout=False)
    given = kernel_arguments(
        query, key, value, output, output, row, spans=spans, mask=None, bias=None, sinks=None, dropout=None, scale=0.1,
        softcap=None, config=config,
    )  # fmt: skip
    yield compile_ahead(forward_kernel, "sm_90", given)
    call = Call(query, key, value, output, row, row, spans, None, None, None, 0.1, None)
    with assuming("sm_90"):
        given = backward.query_arguments(call, query, call.config("query"))
        yield compile_ahead(backward_kernels.query_kernel, "sm_90", given)
        config = call.config("key_value")
        bounds = torch.empty(1, -(-tokens // config.block_n), 4, dtype=torch.int32)
        given = backward.key_value_arguments(call, key, value, bounds, config)
        yield compile_ahead(backward_kernels.key_value_kernel, "sm_90", given)


@compiles
@pytest.mark.parametrize("dim", [40, 72])
def test_heads_of_a_multiple_of_8_are_read_16_bytes_at_a_time(dim):
    """Of vision towers, for example. 16 does not divide the distance of their heads, of which Triton makes much."""
    for compiled in training_kernels(dim, 512):
        code = compiled.binary["ptx"]
        assert "cp.async.cg.shared.global" in code
        assert "ld.global.b16" not in code and "st.global.b16" not in code
        assert compiled.spills == 0 or not IS_PINNED


@compiles
@pytest.mark.parametrize(("dim", "most"), [(64, 0), (128, 0), (256, 12)])
def test_lengths_that_16_does_not_divide(dim, most):
    """Each row of a tile takes a register more to be told whether it exists, which at 256 columns is not to be had."""
    for compiled in training_kernels(dim, 511):
        assert compiled.spills <= most or not IS_PINNED


@compiles
@pytest.mark.parametrize(
    "wanted",
    [("forward", 2, 128, "tiles"), ("decode", 2, 128, "few"), ("backward", 2, 128, "query")],
    ids=lambda wanted: wanted[0],
)
def test_a_nan_in_a_bias_stays_one(wanted):
    """As above. The interpreter cannot tell: its maximum is NumPy's, which never passes over a NaN."""
    (case,) = (c for c in shipped_cases("sm_90") if (c.part, c.element_size, c.dim, c.work) == wanted)
    kernel, arguments = case.kernel()
    code = compile_ahead(kernel, "sm_90", arguments).binary["ptx"]
    lowest = [line for line in code.splitlines() if re.search(r"0fFF2D0864\b", line)]
    raised = [line for line in lowest if re.search(r"\bmax\.[\w.]*f32", line)]
    assert raised and all("max.NaN." in line for line in raised)


@compiles
def test_nan_in_a_float8_cache_stays_one():
    """Triton turns e5m2 into bfloat16 by shifting bits, and NaN with them; into float16 the hardware turns it."""
    (case,) = (
        c for c in shipped_cases("sm_90") if (c.part, c.dim, c.work) == ("decode", 128, "few") and c.dtype.itemsize == 2
    )
    kernel, arguments = case.kernel()
    key, value = (
        arguments[name]._replace(ptr=arguments[name].ptr.view(torch.float8_e5m2)) for name in ("key", "value")
    )
    code = compile_ahead(kernel, "sm_90", arguments | {"key": key, "value": value}).binary["ptx"]
    assert "cvt.rn.f16x2.e5m2x2" in code and "0x77807780" not in code


@compiles
def test_keys_of_compiled_kernels_do_not_depend_on_what_a_process_launches_first():
    """Or what was compiled ahead, by another process, would not be found."""
    keys, environment = [], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for first in ("decode.decode_kernel", "forward.forward_kernel"):
        code = (
            f"from attention_kernels import decode, forward; {first}.cache_key; print(decode.decode_kernel.cache_key)"
        )
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        keys.append(run.stdout)
    assert keys[0] == keys[1] and len(keys[0]) > 32


def test_every_architecture_has_every_row_and_every_row_its_reason():
    assert tuple(SHARED_MEMORY) == CHIPS
    tables: tuple[dict, ...] = (CONFIGS, BACKWARD_CONFIGS, DECODE_CONFIGS)
    for table in tables:
        assert table.keys() == {*SHARED_MEMORY, "interpreter"}
        assert all(configs.keys() == table["sm_90"].keys() for configs in table.values())
    faster = {
        architecture: {(*key, row.serves): row.config for key, rows in configs.items() for row in rows}
        for architecture, configs in BACKWARD_FASTER_CONFIGS.items()
    }
    for table in (*tables, faster):
        shipped = [config for configs in table.values() for config in configs.values()]
        assert all(len(config.reason) > 20 and max(config.block_m, config.block_n) <= MOST_ROWS for config in shipped)


def test_unknown_chips_have_no_cases():
    with pytest.raises(ValueError, match=r"architecture must be one of sm_80, .*gfx942, got 'sm_70'"):
        next(shipped_cases("sm_70"))


@pytest.mark.parametrize("dim", [1, 16, 17, 64, 65, 80, 129, 256, 300, 512])
def test_a_configuration_for_every_head_dim(dim):
    for architecture in CONFIGS:
        config = forward_config(architecture, torch.float32, dim, dim, 100, has_tiles=False, has_dropout=False)
        assert config.chunk_d == 0 or config.chunk_d < max(dim, 32)


def test_a_row_for_what_a_call_has():
    def chosen(query_len=100, has_tiles=False, has_dropout=False):
        config = forward_config(
            "sm_90", torch.bfloat16, 80, 128, query_len, has_tiles=has_tiles, has_dropout=has_dropout
        )
        return next(work for work in get_args(Work) if CONFIGS["sm_90"][2, 128, work] is config)

    assert chosen() == "spans" and chosen(has_tiles=True) == "tiles"
    assert chosen(has_dropout=True) == chosen(has_dropout=True, has_tiles=True) == "dropout"
    assert chosen(query_len=16, has_dropout=True, has_tiles=True) == chosen(query_len=1) == "short"


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("serves", SERVES)
def test_a_backward_call_knows_what_it_has(serves, dropout):
    names = SERVES[serves] | ({"dropout"} if dropout else set())
    query, key, value, output = tensors(torch.bfloat16, 64)
    row = torch.empty(2, 4, QUERY_LEN)
    assert Call(query, key, value, output, row, row, scale=0.1, **extras_of(names)).extras == names


def test_the_first_faster_row_that_serves_a_call_is_taken():
    def chosen(dim, kernel, *extras):
        config = backward_config("sm_90", torch.bfloat16, dim, dim, kernel, frozenset(extras))
        every = config is BACKWARD_CONFIGS["sm_90"][2, dim, kernel]
        rows = BACKWARD_FASTER_CONFIGS["sm_90"][2, dim, kernel]
        return "everything" if every else next(row.serves for row in rows if row.config is config)

    assert chosen(64, "key_value") == chosen(64, "key_value", "hidden keys") == "hidden keys"
    assert chosen(64, "key_value", "bias") == chosen(64, "key_value", "softcap", "mask") == "all but dropout"
    assert chosen(128, "key_value", "softcap") == "softcap"
    assert chosen(256, "query", "mask", "bias", "softcap", "hidden keys") == "all but dropout"
    for dim, kernel, extra in ((64, "query", "dropout"), (128, "key_value", "bias"), (256, "key_value", "softcap")):
        assert chosen(dim, kernel, extra) == "everything"
