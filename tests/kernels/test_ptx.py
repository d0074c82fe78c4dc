# SPDX-License-Identifier: Apache-2.0
"""Kernels as compiled for GPUs, on the machine in `ptx`; and that the machine notices what would go wrong on a GPU.

Here is a part of what `make test-ptx` runs: there all tests of kernels run so.
"""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attention_kernels import PagedCache, Spans, attention, attention_reference, paged_attention, write_cache
from attention_kernels.arguments import arguments_of
from attention_kernels.paths import interpreting

from helpers import DEVICE, Problem, assert_gradients_within_bound, assert_within_bound, random_problem, tensor

pytest.importorskip("triton")

from on_ptx import running_on
from ptx import Deadlock, MemoryFault, Unfinished
from ptx.arithmetic import truncated_half, with_sign_of_product
from ptx.driver import Device
from ptx.machine import Group
from ptx.program import parse
from ptx.turns import Turns

pytestmark = pytest.mark.skipif(
    interpreting() or DEVICE != "cpu", reason="the machine runs compiled kernels, on CPU tensors"
)

AMPERE, HOPPER, BLACKWELL = 80, 90, 100
"""Compute capabilities whose kernels differ most: by their matrix instructions, and by how operands get there."""

capabilities = pytest.mark.parametrize("capability", [AMPERE, HOPPER, BLACKWELL])


@capabilities
@pytest.mark.parametrize("seed", range(100, 106))
def test_random_problems(capability, seed):
    problem = random_problem(seed)
    with running_on(capability):
        problem.check()


@capabilities
@pytest.mark.parametrize("seed", [200, 202])
def test_gradients(capability, seed):
    problem = random_problem(seed)
    with running_on(capability):
        assert_gradients_within_bound(problem)


@capabilities
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_prompts_whatever_waits_for_what(capability, dim, dtype):
    """Several tiles of keys, in flight while others are multiplied."""
    torch.manual_seed(dim)
    query, key, value = (tensor(1, heads, 200, dim, dtype=dtype, layout="tokens") for heads in (4, 2, 2))
    problem = Problem(query, key, value, Spans.causal(200))
    with running_on(capability, late=True, seed=dim):
        problem.check()


@pytest.mark.parametrize(("keys", "dim", "size"), [(2048, 32, 0.3), (64, 512, 4.0)])
def test_float32_sums_of_many_terms(keys, dim, size):
    """One sum, term after term, has more than twice the error of eager's, which are of blocks."""
    torch.manual_seed(0)
    query, key, value = (tensor(1, 1, tokens, dim) for tokens in (32, keys, keys))
    with running_on(HOPPER):
        Problem(size * query, key, value, Spans.full(32, keys)).check()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("extras", [{}, {"sinks": True}, {"hidden": True}])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_gluon_kernel_whatever_waits_for_what(dim, extras, seed):
    from attention_kernels.hopper import launching

    draw = random.Random(f"{dim} {extras} {seed}")
    torch.manual_seed(draw.randrange(1 << 30))
    tokens, batch = draw.choice([40, 129] if extras else [129, 260]), draw.randint(1, 2)
    query, key, value = (tensor(batch, heads, tokens, dim, dtype=torch.bfloat16) for heads in (4, 2, 2))
    spans = Spans.sliding(tokens, left=draw.choice([None, 100]), right=0)
    if "hidden" in extras:
        shown = torch.rand(batch, tokens) > 0.3
        key.transpose(1, 2)[~shown] = value.transpose(1, 2)[~shown] = torch.nan
        spans &= Spans.padded(shown, tokens)
    sinks = torch.randn(4) if "sinks" in extras else None
    problem = Problem(query, key.nan_to_num(), value.nan_to_num(), spans, sinks=sinks)
    with running_on(HOPPER, late=draw.random() < 0.7, seed=seed):
        output, lse, _ = launching.forward(arguments_of(query, key, value, spans, sinks=sinks), wants_rounding=True)
    exact, exact_lse = problem.reference(torch.float64)
    assert_within_bound(output, problem.reference(torch.bfloat16)[0], exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "stored"),
    [
        (AMPERE, None),
        (AMPERE, torch.int8),
        (HOPPER, None),
        (HOPPER, torch.float8_e4m3fn),
        (HOPPER, torch.float8_e5m2),
    ],
)
def test_pages(capability, stored):
    """Written, and read by a prompt's end and by single tokens."""
    torch.manual_seed(0)
    lengths, page_size, dim = [70, 3, 129], 16, 64
    dtype = stored or torch.float16
    key, value = (torch.full((32, page_size, 2, dim), 127 if dtype == torch.int8 else torch.nan) for _ in range(2))
    table = torch.randperm(32)[:30].view(3, 10).int()
    scales = (None, None) if stored is None else (torch.full((1,), 0.05), torch.full((2,), 0.04))
    cache = PagedCache(key.to(dtype), value.to(dtype), table, torch.tensor(lengths, dtype=torch.int32), *scales)
    with running_on(capability):
        for sequence, length in enumerate(lengths):
            index = torch.arange(length)
            slots = table[sequence, index // page_size].long() * page_size + index % page_size
            write_cache(*(torch.randn(length, 2, dim).half() for _ in range(2)), cache, slots)
        for query_len in (1, 3):
            query = tensor(3, 6, query_len, dim, dtype=torch.float16, layout="tokens")
            output = paged_attention(query, cache)
            for sequence, length in enumerate(lengths):
                exact, eager = (
                    attention_reference(
                        query[sequence : sequence + 1],
                        *cache.gather(sequence, torch.float64),
                        mask=torch.ones(query_len, length, dtype=torch.bool).tril(length - query_len),
                        dtype=computed,
                    )[0]
                    for computed in (torch.float64, torch.float16)
                )
                assert_within_bound(output[sequence : sequence + 1], eager, exact)


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize("dim", [64, 72])
def test_memory_takes_no_more_turns_than_it_must(capability, dim):
    """No bank conflicts; and of global memory whole sectors, or what several threads share."""
    torch.manual_seed(0)
    operands = [tensor(1, 1, 128, dim, dtype=torch.bfloat16, layout="tokens").requires_grad_() for _ in range(3)]
    with running_on(capability, counts=True) as device:
        output = attention(*operands, Spans.causal(128))
        torch.autograd.grad(output, operands, torch.ones_like(output))
        attention(operands[0][:, :, :1].detach(), *(each.detach() for each in operands[1:]), Spans.full(1, 128))
    assert {"forward_kernel", "query_kernel", "key_value_kernel", "decode_kernel"} <= device.turns.keys()
    for name, turns in device.turns.items():
        assert turns.taken["shared"] == turns.needed["shared"], name
        if name != "row_bounds_kernel":  # reads starts and ends, which lie side by side, one after the other
            assert turns.taken["global"] <= 1.1 * turns.needed["global"], name


def test_bank_conflicts_are_counted():
    turns, threads = Turns(), np.arange(32)
    turns.count("shared", 4 * threads, 4, threads)
    turns.count("shared", 16 * threads, 16, threads)
    assert turns.taken["shared"] == turns.needed["shared"] == 1 + 4
    turns.count("shared", 128 * threads, 4, threads)
    assert turns.taken["shared"] == 5 + 32
    turns.count("shared", np.zeros(32), 4, threads)  # one word for all
    assert turns.taken["shared"] == 37 + 1
    turns.count("global", 2 * threads, 2, threads)
    assert (turns.taken["global"], turns.needed["global"]) == (2, 2)
    turns.count("global", 400 * threads, 2, threads)
    assert (turns.taken["global"], turns.needed["global"]) == (34, 4)


def small_call(**options):
    query, key, value = (tensor(1, 1, 100, 64, dtype=torch.bfloat16) for _ in range(3))
    return attention(query, key, value, Spans.causal(100), **options)


@pytest.fixture
def changed(monkeypatch):
    """Change the text of what runs from now on: a pattern, and what takes its place."""

    def change(old, new):
        def changed_text(device, kernel):
            text, times = re.subn(old, new, kernel.asm["ptx"])
            if not times:
                raise LookupError(f"{old} is not in the text")
            return text

        monkeypatch.setattr(Device, "text_of", changed_text)

    return change


def gluon_call():
    from attention_kernels.hopper import launching

    torch.manual_seed(0)
    query, key, value = (tensor(1, 1, 200, 64, dtype=torch.bfloat16) for _ in range(3))
    output, _, _ = launching.forward(arguments_of(query, key, value, Spans.full(200)), wants_rounding=False)
    return output.double(), attention_reference(query, key, value, mask=None, dtype=torch.float64)[0]


def test_what_is_read_beyond_a_tensor_is_noticed(changed):
    """Without the mask of a load, rows beyond the last are read."""
    with running_on(AMPERE):
        small_call()
        changed(", 0x10, %r[0-9]+;", ", 0x10;")
        with pytest.raises(MemoryFault, match="from a tensor of"):
            small_call()


def test_what_is_not_made_visible_is_noticed(changed):
    with running_on(HOPPER):
        gluon_call()
        changed("fence.proxy.async.shared::cta;", "")
        with pytest.raises(MemoryFault, match="fence"):
            gluon_call()


def test_bytes_that_never_come_are_noticed(changed):
    """More are expected than the tiles have."""
    with running_on(HOPPER):
        gluon_call()
        changed("(mbarrier.arrive.expect_tx.* )[0-9]+;", r"\g<1>65536;")
        with pytest.raises(Deadlock, match="try_wait"):
            gluon_call()


def test_products_that_nobody_waits_for_are_noticed(changed):
    with running_on(HOPPER, late=True):
        output, exact = gluon_call()
        torch.testing.assert_close(output, exact, rtol=0.02, atol=0.02)
        changed("wgmma.wait_group.sync.aligned.*;", "")
        with pytest.raises(Unfinished):
            gluon_call()


def test_products_that_are_waited_for_too_late_are_noticed(changed):
    """By wrong results: they are looked at before they are there."""
    with running_on(HOPPER, late=True):
        changed("wgmma.wait_group.sync.aligned.* 1;", "")
        output, exact = gluon_call()
    assert not (output - exact).abs().max() < 0.1


def test_an_unknown_instruction_is_named(changed):
    with running_on(AMPERE):
        changed("ex2.approx.ftz.f32", "tanh.approx.f32")
        with pytest.raises(NotImplementedError, match=r"tanh\.approx\.f32"):
            small_call()


def test_names_of_inner_scopes_are_their_own():
    text = """
    .visible .entry kernel(.param .u64 kernel_param_0) .reqntid 32 {
    .reg .b32 %r<3>;
    { .reg .pred done, other<2>; again: setp.eq.b32 done, %r1, 0; @!done bra again; bra beyond; beyond: }
    { .reg .pred done; again: setp.eq.b32 done, %r2, 0; @done bra again; }
    ret;
    }"""
    program = parse(text)
    first, _, _, second, jump, _ = program.instructions
    assert first.operands[0] != second.operands[0]
    assert jump.predicate == (second.operands[0], False) and program.labels[jump.operands[0]] == 3


def test_reductions_pass_over_nan():
    """As `redux.sync.max.f32` does: Triton gives it NaN for the threads whose numbers are not meant."""
    numbers = np.full(32, np.nan, np.float32)
    numbers[[3, 17]] = -5, -7
    threads = SimpleNamespace(whole_warps=lambda: 1)
    for how, expected in (("max", -5), ("min", -7)):
        assert (Group.reduced(threads, how, numbers) == expected).all()


def test_the_sign_of_a_product_goes_to_another_number():
    a, b = np.array([[1, -1, 1, -0.0, -2], [2, 2, -2, 3, -2]], np.float32)
    magnitude = np.array([1, 1, 1, 0, np.nan], np.float32)
    signed = with_sign_of_product(magnitude, a, b)
    assert (np.signbit(signed)[:4] == [False, True, True, True]).all() and np.isnan(signed[4])
    assert (np.abs(signed)[:4] == magnitude[:4]).all()


def test_float16_is_rounded_towards_0_where_asked():
    numbers = np.array([1 + 2**-11 + 2**-20, -1 - 2**-10 - 2**-12, 65519.9, 70000.0, 0.5], np.float32)
    truncated = np.array([1, -1 - 2**-10, 65504, 65504, 0.5], np.float16)
    with np.errstate(over="ignore"):
        assert (truncated_half(numbers) == truncated).all()
        assert (numbers.astype(np.float16) != truncated).sum() == 2  # by default the nearest
