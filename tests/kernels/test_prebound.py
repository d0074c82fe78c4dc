# SPDX-License-Identifier: Apache-2.0
"""Calls that are remembered: kernels get what their launchers give them; nothing that differs is reused."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attention_kernels import (
    PagedCache,
    Spans,
    attention,
    hopper,
    paged_attention,
    paths,
    prebound,
    tuned,
    write_cache,
)
from attention_kernels.arguments import Returned, Wanted, arguments_of
from attention_kernels.launch import INTERPRETED, operand
from attention_kernels.paths import interpreting

from helpers import DEVICE

pytest.importorskip("triton")

from attention_kernels import backward, configs, decode, forward, write

recorded = pytest.mark.skipif(interpreting() or torch.cuda.is_available(), reason="kernels that record run on CPUs")


def computed(test):
    """A test that computes what the others only look at: in the interpreter, and by compiled kernels on a GPU."""
    no_kernels = pytest.mark.skipif(DEVICE == "cpu" and not interpreting(), reason="the torch path launches nothing")
    return pytest.mark.interpreter(no_kernels(test))


EXTRAS = [(None, None, False), (0.3, None, True), (None, 20.0, False), (None, 5, True)]
"""Scale, softcap, and whether there are sinks."""


class Recorder:
    """In place of a kernel and of what it compiles to: notes each call with its grid, and may run it."""

    def __init__(self, kernel, runs):
        self.kernel, self.runs, self.calls, self.options = kernel, runs, [], {}
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def call(*arguments, **named):
            again = len(arguments) == len(self.arg_names) and isinstance(arguments[-1], int | str)
            if not again:
                self.options = {name: value for name, value in named.items() if name not in self.arg_names}
            if self.runs:
                self.kernel[grid](*arguments, **named, **(self.options if again else {}))
            arguments += tuple(named[name] for name in self.arg_names[len(arguments) :])
            self.calls.append(((*grid, 1, 1)[:3], arguments, again))
            return self

        return call


@pytest.fixture
def kernels(monkeypatch):
    """What stands in place of the kernels; on a GPU there is nothing of the kind."""
    prebound.forget()
    if DEVICE != "cpu":
        yield []
        prebound.forget()
        return
    places = [(decode, "decode_kernel"), (decode, "merge_kernel"), (forward, "forward_kernel")]
    places += [(module, name) for module in (backward, write) for name in vars(module) if name.endswith("_kernel")]
    recorders = [Recorder(getattr(*place), interpreting()) for place in places]
    for place, recorder in zip(places, recorders, strict=True):
        monkeypatch.setattr(*place, recorder)
    monkeypatch.setattr(configs, "processors", lambda device: 64)
    monkeypatch.setattr(paths, "interpreting", lambda: True)  # which is what sends CPU tensors to kernels
    yield recorders
    prebound.forget()


@pytest.fixture
def repeats(monkeypatch):
    """A growing list, of a number for each call that is launched again."""
    found, launch_again = [], prebound.Tape.__call__

    def counted(tape, *given):
        results = launch_again(tape, *given)
        found.append(len(tape.steps)) if results is not None else None
        return results

    monkeypatch.setattr(prebound.Tape, "__call__", counted)
    return found


def tensors(dtype=torch.float16, key_len=512, heads_first=True, dim=32):
    def draw(heads, tokens):
        if heads_first:
            return torch.randn(2, heads, tokens, dim, device=DEVICE).to(dtype)
        return torch.randn(2, tokens, heads, dim, device=DEVICE).to(dtype).transpose(1, 2)

    return draw(4, 1), draw(2, key_len), draw(2, key_len)


def prompts(dtype=torch.float16, tokens=40, dim=32):
    return tuple(torch.randn(2, tokens, heads, dim, device=DEVICE).to(dtype).transpose(1, 2) for heads in (4, 2, 2))


def padded(key_len=512, query_len=1):
    """As on a GPU, where padding always keeps its mask."""
    shown = torch.arange(key_len, device=DEVICE) >= torch.tensor([[3], [90]], device=DEVICE)
    shown[0, 100:110] = False
    return Spans.causal(query_len, key_len, offset=key_len - 20, device=DEVICE) & Spans.padded(shown, query_len)


def remembered():
    return len(prebound._tapes)


def comparable(argument, addresses=None):
    """An argument with each tensor as what a kernel sees of it: its address, or its number among `addresses`."""
    if isinstance(argument, tuple):
        return tuple(comparable(each, addresses) for each in argument)
    if not isinstance(argument, torch.Tensor):
        return argument
    address = argument.data_ptr()
    return address if addresses is None else addresses.setdefault(address, len(addresses))


@recorded
@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize("spans", [Spans.full(1, 512), Spans.causal(1, 512, offset=300), padded()])
@pytest.mark.parametrize(("scale", "softcap", "has_sinks"), EXTRAS)
def test_kernels_get_what_they_get_without_memory(kernels, num_splits, spans, scale, softcap, has_sinks):
    sinks, other = (torch.randn(4) if has_sinks else None for _ in range(2))
    attention(*tensors(), spans, scale=scale, softcap=softcap, sinks=other, num_splits=num_splits)
    assert remembered() == 1
    query, key, value = tensors()
    outcomes = []
    for direct in (False, True):
        for kernel in kernels:
            kernel.calls.clear()
        if direct:
            operands = (query, key, value, spans.start, spans.end, spans.key_mask, spans.gap_count)
            given = {"scale": scale or 32**-0.5, "softcap": softcap, "num_splits": num_splits}
            result = decode.decode(*operands, None, None, sinks, **given)
        else:
            given = {"scale": scale, "softcap": softcap, "num_splits": num_splits}
            result = attention(query, key, value, spans, sinks=sinks, return_lse=True, **given)
        calls = [(grid, list(arguments)) for kernel in kernels for grid, arguments, _ in kernel.calls]
        for place, index in [(6, 0), (7, 1)]:  # memory for results: its kind, not its address
            arguments = calls[0][1]
            ours = arguments[place] if index == 0 else arguments[place].ptr
            assert ours.is_contiguous() or ours.transpose(1, 2).is_contiguous()
            rest = () if index == 0 else arguments[place][1:]
            arguments[place] = (ours.numel(), ours.dtype, rest)
        if len(calls) == 2:
            merged = calls[1][1]
            assert merged[2].data_ptr() == result[0].data_ptr() and merged[3].ptr.data_ptr() == result[1].data_ptr()
            merged[:4] = [each.numel() for each in merged[:3]] + [merged[3][1:]]
        seen = [(grid, [comparable(each) for each in arguments]) for grid, arguments in calls]
        outcomes.append((seen, [(each.shape, each.stride(), each.dtype) for each in result]))
    assert outcomes[0] == outcomes[1]


@recorded
@pytest.mark.parametrize("spans", [Spans.full(40, 40), Spans.sliding(40, left=9), padded(40, 40)])
@pytest.mark.parametrize(("scale", "softcap", "has_sinks"), EXTRAS)
def test_a_prompts_kernel_gets_what_it_gets_without_memory(kernels, spans, scale, softcap, has_sinks):
    sinks, other = (torch.randn(4) if has_sinks else None for _ in range(2))
    attention(*prompts(), spans, scale=scale, softcap=softcap, sinks=other)
    assert remembered() == 1
    query, key, value = prompts()
    result = attention(query, key, value, spans, scale=scale, softcap=softcap, sinks=sinks, return_lse=True)
    given = arguments_of(query, key, value, spans, sinks=sinks, scale=scale, softcap=softcap)
    direct = forward.forward(given, wants_rounding=False)[:2]
    (_, _, first), (grid, again, relaunched), (other_grid, without, _) = kernels[2].calls
    assert (first, relaunched) == (False, True)
    assert grid == other_grid
    for arguments, (output, lse) in ((again, result), (without, direct)):
        assert arguments[3].ptr.data_ptr() == output.data_ptr() and arguments[3][1:] == operand(output)[1:]
        assert arguments[5].data_ptr() == lse.data_ptr()
    ours, theirs = (
        [comparable(each) for place, each in enumerate(arguments) if place not in (3, 5)]
        for arguments in (again, without)
    )
    assert ours == theirs
    kinds = [[(each.shape, each.stride(), each.dtype) for each in results] for results in (result, direct)]
    assert kinds[0] == kinds[1]


@recorded
def test_prompts_are_remembered_by_their_kind(kernels):
    for _ in range(2):
        attention(*prompts(), Spans.causal(40))
    attention(*prompts(tokens=41), Spans.causal(41))
    attention(*prompts(), padded(40, 40))
    attention(*prompts(torch.bfloat16), Spans.causal(40))
    assert remembered() == 4
    assert [again for *_, again in kernels[2].calls] == [False, True, False, False, False]
    for again in (False, True):
        query, key, value = prompts()
        attention(query.requires_grad_(), key, value, Spans.causal(40))
        assert remembered() == 5
        assert kernels[2].calls[-1][2] == again


@recorded
def test_calls_without_spans_are_repeated_too(kernels):
    for tokens in (40, 41):
        attention(*prompts(tokens=tokens))
    assert remembered() == 2
    query, key, value = prompts()
    assert attention(query, key, value).shape == query.shape
    assert remembered() == 2 and kernels[2].calls[-1][2]
    with pytest.raises(ValueError, match="must be \\[batch, heads, tokens, dim\\]"):
        attention(query, key[0, 0], value)


@recorded
def test_a_change_of_kernels_is_noticed(kernels):
    """A tile shape that is being measured, and the Gluon kernel, take the place of what is remembered."""
    attention(*prompts(), Spans.causal(40))
    key = ("forward", 2, 64, "spans")
    config = forward.forward_config("interpreter", torch.float16, 32, 32, 40, has_tiles=False, has_dropout=False)
    with tuned.overriding(torch.device("cpu"), key, config._replace(block_m=2 * config.block_m)):
        attention(*prompts(), Spans.causal(40))
        attention(*prompts(), Spans.causal(40))
    attention(*prompts(), Spans.causal(40))
    place = forward.forward_kernel.arg_names.index("BLOCK_M")
    rows = [arguments[place] // config.block_m for _, arguments, _ in kernels[2].calls]
    assert rows == [1, 2, 2, 1]
    count = remembered()
    hopper.enable()
    try:
        attention(*prompts(), Spans.causal(40))
        assert not kernels[2].calls[-1][2]
    finally:
        hopper.enable(None)
    assert remembered() == count + 1
    attention(*prompts(), Spans.causal(40))
    assert kernels[2].calls[-1][2]


@recorded
def test_calls_of_a_kind_share_a_launch_and_others_do_not(kernels):
    spans = padded()
    for _ in range(3):
        attention(*tensors(), spans)
        attention(*tensors(), replace(spans))
    assert remembered() == 1
    attention(*tensors(), spans, scale=0.5)
    attention(*tensors(), spans, num_splits=2)
    attention(*tensors(heads_first=False), spans)
    attention(*tensors(torch.bfloat16), spans)
    attention(*tensors(dim=64), spans)
    attention(*tensors(), Spans.full(1, 512))
    attention(*tensors(key_len=1), Spans.full(1, 1))
    assert remembered() == 8
    for _ in range(2):
        attention(*tensors(), spans, softcap=20.0)
        attention(*tensors(), spans, softcap=30.0)
        attention(*tensors(), spans, sinks=torch.zeros(4))
        attention(*tensors(), spans, sinks=torch.nn.Parameter(torch.zeros(4), requires_grad=False))
        attention(*tensors(), spans, sinks=torch.zeros(4, dtype=torch.bfloat16))
    assert remembered() == 12


@recorded
def test_what_is_not_plain_is_neither_remembered_nor_served_from_memory(kernels):
    query, key, value = tensors()
    spans = Spans.full(1, 512)
    attention(query, key, value, spans)

    def launched_anew(*arguments, **named):
        kernels[0].calls.clear()
        attention(*arguments, **named)
        assert remembered() == 1
        return [again for *_, again in kernels[0].calls] == [False]

    assert not launched_anew(query, key, value, spans)
    for sinks in (torch.zeros(5)[1:], torch.zeros(4, 2)[:, 0]):  # at no multiple of 16 bytes, and with gaps
        assert launched_anew(query, key, value, spans, sinks=sinks)
    shifted = torch.empty(key.numel() + 1, dtype=key.dtype)[1:].view(key.shape).copy_(key)
    assert shifted.data_ptr() % 16
    assert launched_anew(query, shifted, value, spans)
    start = torch.zeros(3, dtype=torch.int32)[1:2].view(1, 1)
    assert launched_anew(query, key, value, replace(spans, start=start))
    with torch.autocast("cpu", torch.float16):
        assert not launched_anew(query, key, value, spans)
    with torch.autocast("cpu", torch.bfloat16):
        kernels[0].calls.clear()
        assert attention(query, key, value, spans).dtype == torch.bfloat16


@recorded
def test_wrong_arguments_are_found_after_right_ones(kernels):
    query, key, value = tensors()
    spans = Spans.full(1, 512)
    attention(query, key, value, spans)
    with pytest.raises(ValueError, match="share heads and length"):
        attention(query, key, value[:, :, 1:], spans)
    with pytest.raises(TypeError, match="one dtype"):
        attention(query, key, value.float(), spans)
    with pytest.raises(ValueError, match="`spans` is for"):
        attention(query, key, value, Spans.full(1, 256))
    with pytest.raises(ValueError, match="num_splits"):
        attention(query, key, value, spans, num_splits=0)
    attention(query, key, value, spans, sinks=torch.zeros(4), softcap=2.0)
    with pytest.raises(ValueError, match="`sinks` must be floating point of shape"):
        attention(query, key, value, spans, sinks=torch.zeros(8), softcap=2.0)
    with pytest.raises(ValueError, match="`sinks` must be floating point of shape"):
        attention(query, key, value, spans, sinks=torch.zeros(4, dtype=torch.int32), softcap=2.0)
    with pytest.raises(ValueError, match="`softcap` must be a positive number"):
        attention(query, key, value, spans, sinks=torch.zeros(4), softcap=0.0)


TRAINED = [
    {},
    {"softcap": 20.0, "sinks": True},
    {"dropout_p": 0.25},
    {"wants": "q"},
    {"wants": "kv", "scale": 0.3},
    {"wants_lse": True, "sinks": True},
    {"dtype": torch.float32, "sinks": True},
    {"mask": (2, 1, 40, 40), "softcap": 20.0},
    {"bias": (1, 4, 40, 40)},
    {"bias": (1, 4, 1, 40), "dtype": torch.float32},
    {"bias": (2, 1, 40, 40), "mask": (1, 4, 1, 40), "wants": "qk"},
]
"""Calls with gradients: arguments of `trained`."""


def trained(spans, operands, *, dtype=torch.float16, wants="qkv", wants_lse=False, sinks=False, **given):
    """Output, log-sum-exp and gradients of a call; `operands` are as `trained_operands` draws them."""
    *tensors, drawn, seed, scores, grad_output, grad_lse = (
        each.to(dtype) if each.ndim == 4 else each for each in operands
    )
    leaves = [each.detach().requires_grad_(name in wants) for name, each in zip("qkv", tensors, strict=True)]
    if sinks:
        given["sinks"] = drawn.requires_grad_()
    if "mask" in given:
        given["mask"] = scores[tuple(map(slice, given["mask"]))].contiguous() > -1
    if "bias" in given:
        given["bias"] = scores[tuple(map(slice, given["bias"]))].contiguous().requires_grad_()
    leaves += [given[name] for name in ("sinks", "bias") if name in given]
    seed = seed if "dropout_p" in given else None
    output, lse = attention(*leaves[:3], spans, dropout_seed=seed, return_lse=True, **given)
    results, gradients = ((output, lse), (grad_output, grad_lse)) if wants_lse else ((output,), (grad_output,))
    return output, lse, *torch.autograd.grad(results, [each for each in leaves if each.requires_grad], gradients)


def trained_operands(tokens=40):
    seed, sinks = torch.randint(1 << 40, (1,), device=DEVICE), torch.randn(4, device=DEVICE)
    scores, grad_lse = (torch.randn(2, 4, tokens, each, device=DEVICE) for each in (tokens, 1))
    return *prompts(tokens=tokens), sinks, seed, scores, prompts(tokens=tokens)[0], grad_lse[..., 0].contiguous()


@recorded
@pytest.mark.parametrize("spans", [Spans.sliding(40, left=9), padded(40, 40)])
@pytest.mark.parametrize("given", TRAINED)
def test_kernels_of_gradients_get_what_they_get_without_memory(kernels, spans, given):
    trained(spans, trained_operands(), **given)
    assert remembered() == 2  # forward and backward
    operands = trained_operands()
    outcomes = []
    for direct in (False, True):
        for kernel in kernels:
            kernel.calls.clear()
        if direct:
            prebound.forget()
        results = trained(spans, operands, **given)
        assert {again for kernel in kernels for _, _, again in kernel.calls} == {not direct}
        addresses = {}  # of what is written: by the order in which kernels are given them
        seen = [
            (number, grid, [comparable(each, addresses) for each in arguments])
            for number, kernel in enumerate(kernels)
            for grid, arguments, _ in kernel.calls
        ]
        outcomes.append((seen, [(each.shape, each.stride(), each.dtype) for each in results]))
    assert len(outcomes[0][0]) >= 3
    assert outcomes[0] == outcomes[1]


PAGED = [
    {},
    {"num_splits": 3, "out": "tokens"},
    {"out": "heads"},
    {"offsets": True, "softcap": 20.0, "out": "tokens"},
    {"kind": torch.int8, "num_splits": 1, "scale": 0.3},
]
"""Calls over pages: arguments of `paged`."""


def paged_operands(kind, offsets):
    """Query, new keys and values, pages of both, their scale, a table, slots, and where an output may go."""
    tokens, rows = (5, 1) if offsets else (1, 2)

    def drawn(*shape):
        return torch.randn(shape, device=DEVICE).half()

    query, out = (drawn(rows, tokens, 4, 32).transpose(1, 2) for _ in range(2))
    new = [drawn(2 * tokens, 2, 32) for _ in range(2)]
    pages = [drawn(9, 16, 2, 32).mul(20).to(kind or torch.float16) for _ in range(2)]
    scale, slots = torch.rand(1, 1, 1, device=DEVICE), torch.arange(2 * tokens, device=DEVICE)
    return query, *new, *pages, scale, torch.randperm(8, device=DEVICE).int().view(2, 4), slots, out


def paged(operands, lengths, *, kind=None, offsets=False, out=None, **given):
    """Output, log-sum-exp and pages after new keys and values were written there."""
    query, new_key, new_value, key, value, scale, table, slots, memory = (each.clone() for each in operands)
    memory = memory.contiguous() if out == "heads" else memory
    scale = None if kind is None else scale
    pages = PagedCache(key, value, table, lengths, key_scale=scale, value_scale=scale)
    write_cache(new_key, new_value, pages, slots)
    given |= (
        {"query_offsets": torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE), "max_query_len": 3}
        if offsets
        else {}
    )
    results = paged_attention(query, pages, return_lse=True, out=None if out is None else memory, **given)
    assert out is None or results[0] is memory
    return *results, key, value


@recorded
@pytest.mark.parametrize("given", PAGED)
def test_kernels_over_pages_get_what_they_get_without_memory(kernels, given):
    kind, offsets = given.get("kind"), given.get("offsets", False)
    lengths = torch.tensor([20, 33], dtype=torch.int32, device=DEVICE)
    paged(paged_operands(kind, offsets), lengths, **given)
    operands, outcomes = paged_operands(kind, offsets), []
    for direct in (False, True):
        for kernel in kernels:
            kernel.calls.clear()
        if direct:
            prebound.forget()
        paged(operands, lengths, **given)
        if not direct:  # values are written like keys
            assert all(again for kernel in kernels for _, _, again in kernel.calls)
        addresses = {}
        outcomes.append([
            (number, grid, [comparable(each, addresses) for each in arguments])
            for number, kernel in enumerate(kernels)
            for grid, arguments, _ in kernel.calls
        ])  # fmt: skip
    assert len(outcomes[0]) >= 3
    assert outcomes[0] == outcomes[1]


@recorded
def test_gradients_of_other_calls_are_other_kinds(kernels):
    spans = Spans.causal(40)
    for _ in range(2):
        for given in (*TRAINED, {"dropout_p": 0.5}):
            trained(spans, trained_operands(), **given)
    assert remembered() == 11 + 12  # which gradients are wanted is the backward pass's concern alone


@recorded
def test_gradients_go_the_long_way_where_more_than_autograd_looks(kernels):
    """What is differentiated twice is refused, and what a mode looks at is an operator."""
    spans, operands = Spans.causal(40), trained_operands()
    for _ in range(2):
        query, key, value = (each.requires_grad_() for each in operands[:3])
        output = attention(query, key, value, spans)
        (gradient,) = torch.autograd.grad(output, query, operands[6], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.sum().backward()
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    with Names():
        output = attention(query, key, value, spans)
        torch.autograd.grad(output, query, operands[6])
    assert {"attention_kernels::forward", "attention_kernels::backward"} <= set(names)


@recorded
def test_an_output_is_a_tensor_of_its_own(kernels):
    """So a change in place is told of in the backward pass, which needs it, whether the call is the first or not."""
    for _ in range(2):
        query, key, value = prompts()
        output = attention(query.requires_grad_(), key, value)
        output.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@recorded
@pytest.mark.parametrize(("query_len", "key_len"), [(40, 0), (0, 40)])
def test_empty_gradients_have_their_shapes_again(kernels, query_len, key_len):
    for _ in range(3):
        query, key = torch.zeros(2, 4, query_len, 32).half(), torch.zeros(2, 2, key_len, 32).half()
        leaves = [each.requires_grad_() for each in (query, key, key.clone(), torch.zeros(4))]
        output = attention(*leaves[:3], sinks=leaves[3])
        gradients = torch.autograd.grad(output, leaves, torch.zeros_like(output))
        assert [each.shape for each in gradients] == [each.shape for each in leaves]


@recorded
def test_a_number_that_changes_is_another(kernels):
    """A tensor of one number is as good as the number, and is no part of what is remembered."""
    operands, longest, splits = paged_operands(None, True), torch.tensor(3), torch.tensor(1)
    query, _, _, key, value, _, table, _, _ = operands
    pages, offsets = PagedCache(key, value, table, torch.tensor([20, 33]).int()), torch.tensor([0, 2, 5]).int()
    for rows, parts in ((3, 2), (3, 4), (200, 2)) * 2:
        longest.fill_(rows)
        splits.fill_(parts)
        paged_attention(query, pages, query_offsets=offsets, max_query_len=longest, num_splits=splits)
    assert [grid[1] for grid, _, _ in kernels[0].calls] == [2, 4, 2, 2, 4, 2]
    assert remembered() == 3


@recorded
def test_a_tensor_that_is_given_twice_is_not_taken_for_one(kernels):
    """Its kind is that of calls with two."""
    query, key, _ = prompts()
    spans = Spans.causal(40)
    nothing = [None] * 6  # up to the seed
    torch.ops.attention_kernels.forward(query, key, key, spans.start, spans.end, *nothing, 0.2, None, 0.0, False, None)
    assert remembered() == 0


@recorded
def test_spans_that_change_before_the_gradient_are_found(kernels):
    for _ in range(2):
        query, key, value = prompts()
        spans = Spans.causal(40)
        output = attention(query.requires_grad_(), key, value, spans)
        spans.end.sub_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@recorded
@pytest.mark.parametrize("query_len", [1, 16])
def test_grids_hold_as_many_heads_as_there_are(kernels, query_len):
    """CUDA takes 65,535 programs at most in the second and the third dimension of a grid."""
    query, key = torch.randn(8192, 8, query_len, 16).half(), torch.randn(8192, 8, 4, 16).half()
    spans = Spans.full(query_len, 4)
    for _ in range(2):
        attention(query, key, key, spans)
    grids = [grid for kernel in kernels for grid, _, _ in kernel.calls]
    assert max(grid[0] for grid in grids) >= 8192 * 8
    assert all(max(grid[1:]) <= 65535 for grid in grids)


@recorded
def test_grids_of_gradients_hold_as_many_heads_as_there_are(monkeypatch):
    names = [name for name in vars(backward) if name.endswith("_kernel")]
    recorders = {name: Recorder(getattr(backward, name), runs=False) for name in names}
    for name, recorder in recorders.items():
        monkeypatch.setattr(backward, name, recorder)
    query = torch.zeros(65536, 1, 2, 16, dtype=torch.float16)
    spans = Spans(torch.zeros(65536, 2, dtype=torch.int32), torch.full((65536, 1), 2, dtype=torch.int32), 2, 2)
    bias, lse = torch.zeros(65536, 1, 2, 2, dtype=torch.float16), torch.zeros(65536, 1, 2)
    wanted = Wanted(query=True, key_value=True, bias=True, sinks=False)
    returned = Returned(query, lse, torch.empty(0).half(), query, None)
    backward.backward(returned, wanted, arguments_of(query, query, query, spans, bias=bias))
    grids = {name: [grid for grid, _, _ in recorder.calls] for name, recorder in recorders.items()}
    assert {"row_bounds_kernel", "bias_kernel", "key_value_kernel", "query_kernel"} <= {n for n in grids if grids[n]}
    assert all(max(grid[1:]) <= 65535 for each in grids.values() for grid in each)


@recorded
def test_tensors_are_not_kept(kernels):
    operands = tensors()
    spans = padded()
    attention(*operands, spans)
    attention(*operands, spans)
    watched = [weakref.ref(each) for each in (*operands, spans, spans.start, spans.key_mask)]
    for kernel in kernels:
        kernel.calls.clear()
    del operands, spans
    gc.collect()
    assert [each() for each in watched] == [None] * len(watched)


@computed
@pytest.mark.parametrize("extra", [None, "mask", "bias"])
@pytest.mark.parametrize(("query_len", "num_splits"), [(1, 1), (1, 3), (40, None)])
def test_results_are_those_without_memory(kernels, repeats, query_len, num_splits, extra):
    key_len = 40 if query_len == 40 else 128
    spans = padded(key_len, query_len)

    def drawn():
        query, key, value = prompts() if query_len == 40 else tensors(key_len=key_len)
        scores = torch.randn(2, 1, query_len, key_len, device=DEVICE)
        extras = {} if extra is None else {extra: scores > -1 if extra == "mask" else scores.half()}
        extras |= {"sinks": torch.randn(4, device=DEVICE), "softcap": 3.0, "num_splits": num_splits}
        return (query, key, value, spans), extras

    operands, given = drawn()
    attention(*operands, **given)
    operands, given = drawn()
    output, lse = attention(*operands, return_lse=True, **given)
    assert repeats == [2 if num_splits == 3 else 1]
    prebound.forget()
    first, first_lse = attention(*operands, return_lse=True, **given)
    assert torch.equal(output, first) and torch.equal(lse, first_lse)


@computed
@pytest.mark.parametrize("given", TRAINED)
def test_gradients_are_those_without_memory(kernels, repeats, given):
    spans = padded(24, 24)
    trained(spans, trained_operands(24), **given)
    operands = trained_operands(24)
    results = trained(spans, operands, **given)
    assert len(repeats) == 2  # forward and backward
    prebound.forget()
    for again, first in zip(results, trained(spans, operands, **given), strict=True):
        assert torch.equal(again, first)


@computed
@pytest.mark.parametrize("given", PAGED)
def test_results_over_pages_are_those_without_memory(kernels, repeats, given):
    kind, offsets = given.get("kind"), given.get("offsets", False)
    lengths = torch.tensor([20, 33], dtype=torch.int32, device=DEVICE)
    paged(paged_operands(kind, offsets), lengths, **given)
    operands = paged_operands(kind, offsets)
    repeats.clear()  # values are written like keys
    results = paged(operands, lengths, **given)
    assert len(repeats) == (1 if kind and INTERPRETED else 3)  # there torch quantises what is written
    prebound.forget()
    for again, first in zip(results, paged(operands, lengths, **given), strict=True):
        assert torch.equal(again, first)


@computed
def test_gradients_read_the_spans_that_hooks_give_back(kernels):
    """Where what is saved is copied, torch does not look whether the original changes."""
    for _ in range(3):
        query, key, value, *_, gradient, _ = trained_operands(24)
        query.requires_grad_()
        (expected,) = torch.autograd.grad(
            attention(query, key, value, Spans.causal(24, device=DEVICE)), query, gradient
        )
        spans = Spans.causal(24, device=DEVICE)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
            output = attention(query, key, value, spans)
            spans.end.sub_(5).clamp_(0)
            (found,) = torch.autograd.grad(output, query, gradient)
        assert torch.equal(found, expected)
