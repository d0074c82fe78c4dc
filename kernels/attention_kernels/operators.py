# SPDX-License-Identifier: Apache-2.0
"""The public operator: validation, the choice of path, torch.library registration and autograd.

The way of a call, from top to bottom of this file:

    attention       looks for an earlier call like this one (`prebound`, `blockwise.remembered`), or checks its
                    arguments; then asks for one forward pass: by `Attention.apply` where autograd records it, by the
                    registered operator where a compiler or a mode looks on (both lead to `_forward`), or by `_forward`
    _forward        on the torch path `blockwise.forward`; else `launch_forward`, whose launches `prebound` remembers
    launch_forward  the kernel for few queries (`decode`), the Gluon kernel (`hopper`) or the Triton kernel (`forward`)
    _autograd       the way back: `_backward`, and so `blockwise.backward` or, by `_launch_backward`, `backward`
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import blockwise, hopper, prebound
from .blockwise import remembered
from .checks import check_dropout, check_no_transform, check_numbers, check_sinks, check_tensors, is_one_or, on_scores
from .configs import SHORT, unsupported_device
from .dropout import draw_seed
from .shared_spans import window_spans
from .spans import Spans, check_are_spans

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 576
MAX_VALUE_DIM = 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over spans, with gradients.

    CUDA and ROCm tensors run the Triton kernel, as do CPU tensors under TRITON_INTERPRET=1; other tensors, float64 and
    machines without Triton run the same loop in torch.

    Args:
        query: `[batch, num_heads, query_len, head_dim]`, float16, bfloat16, float32 or float64. Any strides.
        key: `[batch, num_kv_heads, key_len, head_dim]`; `num_kv_heads` divides `num_heads` (grouped heads).
        value: `[batch, num_kv_heads, key_len, value_dim]`. A batch of 1 beside a larger one is broadcast.
        spans: the keys that each row sees; None means all.
        mask: bool, broadcastable to `[batch, num_heads, query_len, key_len]`, True where visible, on top of `spans`.
        bias: floating point, broadcastable likewise, added to the scaled scores; -inf hides a key. Other numbers hide
            none: a row of nothing but the lowest is the mean of its values, whose gradient is that of their sum, as the
            log-sum-exp of such numbers does not tell how many there are. Use -inf, `mask` or `spans`.
        sinks: floating point `[num_heads]`, a score per head without a value, in every row's softmax.
        scale: factor of the scores; default `head_dim ** -0.5`.
        softcap: if given, scores become `softcap * tanh(scores / softcap)` before bias and mask.
        dropout_p: probability with which a weight of the softmax becomes 0; the others grow by `1 / (1 - dropout_p)`.
        dropout_seed: int64 `[1]`; which weights are dropped follows from it and their place alone, on every device.
            Default: drawn from torch's generator of the device, so that `torch.manual_seed` decides it.
        num_splits: in how many parts the keys of up to 16 queries (decoding) are computed at a time on a GPU. Default:
            as many as the device has room for, which depends on the batch; a fixed number makes a sequence's bits
            independent of its neighbours.
        return_lse: also return the log-sum-exp of each row.

    Returns:
        Output `[batch, num_heads, query_len, value_dim]`; its transpose to `[batch, query_len, num_heads, value_dim]`
        is contiguous. With `return_lse` also the natural log-sum-exp, float32 (float64 for float64)
        `[batch, num_heads, query_len]`, sinks included. A row that sees no key has output 0 and log-sum-exp -inf (its
        sink, where it has one). NaN and Inf in keys and values reach only the rows that see them.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the message says which, and what to do.
        RuntimeError: the GPU is one that the kernels do not support; a transform of `torch.func` is active, or forward
            differentiation (`torch.autograd.forward_ad`).
    """
    check_no_transform("attention", query, key, value, bias, sinks, scale)
    if spans is not None:
        check_are_spans("attention", "spans", spans, "pass a dense mask as `mask`")
    if not isinstance(query, Tensor):
        check_tensors("attention", {"query": query})
    if type(dropout_p) is not float:
        check_dropout("attention", dropout_p)
    trains = _wants_gradient(query, key, value, bias, sinks)
    seed = _checked_seed(dropout_seed, query.device) if dropout_p else None
    # First way, on GPUs: a call that differs from an earlier one in addresses alone needs neither checks nor choices.
    # Without gradients its kernels are launched again here; with them `known` lets the backward pass do the same.
    repeatable = _are_numbers(scale, softcap) and _are_at_hand(query, key, value, sinks, mask, bias)
    known = None
    if repeatable and spans is None and key.ndim == 4:
        spans = window_spans(query.shape[2], key.shape[2], device=query.device)
    if repeatable and spans is not None:
        factor = query.shape[3] ** -0.5 if scale is None else scale
        asked = _forward_asked(factor, softcap, dropout_p, trains, num_splits)
        inputs = query, key, value, sinks, seed, mask, bias
        if (found := prebound.find(spans, inputs, asked)) is not None:
            known, tape = found
            if not trains and (results := tape(known.operand, inputs)) is not None:
                return results[:2] if return_lse else results[0]
    if known is None:
        # Second way, on CPUs: the same for calls that have nothing but spans and sinks, and want no gradient.
        spans_alone = (
            repeatable and spans is not None and not trains and mask is bias is seed is softcap is num_splits is None
        )
        if spans_alone and (step := remembered.again(query, key, value, spans, sinks, scale, return_lse)) is not None:
            output, lse = step
            return (output, lse) if return_lse and lse is not None else output
        query, key, value, spans, mask, bias = _checked_call(
            query, key, value, spans, mask, bias, sinks, scale, softcap, dropout_p, num_splits
        )
        num_splits = None if num_splits is None else int(num_splits)
        if spans_alone and not runs_triton(query):
            first = remembered.first(query, key, value, spans, sinks, scale)
            if first is not None:
                return first if return_lse else first[0]
    # Third way, for everything else: one forward pass.
    assert spans is not None
    operands = (
        query, key, value, spans.start, spans.end, spans.key_mask, spans.gap_count, mask, bias, sinks, seed,
        query.shape[-1] ** -0.5 if scale is None else float(scale), None if softcap is None else float(softcap),
        float(dropout_p),
    )  # fmt: skip
    # Where nothing but autograd looks at the call, the operator's registration would add time only.
    looked_at = torch.compiler.is_compiling() or torch.jit.is_tracing() or (trains and is_in_torch_dispatch_mode())
    if looked_at or not _are_real(query, key, value, mask, bias, sinks):
        output, lse, _ = torch.ops.attention_kernels.forward(*operands, trains, num_splits)
    elif trains:
        output, lse, _ = Attention.apply(*operands, trains, num_splits, known)
    else:
        output, lse, _ = _forward(*operands, trains, num_splits)
    return (output, lse) if return_lse else output


def _checked_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    num_splits: int | None,
) -> tuple[Tensor, Tensor, Tensor, Spans, Tensor | None, Tensor | None]:
    """Query, key, value, spans, mask and bias of a call that breaks no rule of `attention`.

    Query, key and value are in autocast's dtype and have one batch; spans are there, and masks and biases are
    four-dimensional.

    Raises:
        TypeError, ValueError: as `attention` says.
    """
    check_tensors("attention", {"query": query, "key": key, "value": value})
    query, key, value = _validated(*cast_for_autocast(query, key, value))
    spans = _checked_spans(spans, query, key)
    mask = on_scores("attention", "mask", mask, query, key)
    bias = on_scores("attention", "bias", bias, query, key)
    check_sinks("attention", sinks, query)
    check_numbers("attention", scale, softcap, num_splits)
    check_dropout("attention", dropout_p)
    return query, key, value, spans, mask, bias


def _forward_asked(
    scale: float, softcap: float | None, dropout_p: float, trains: bool, num_splits: int | None
) -> tuple:
    """What decides, beside its tensors, which kernels a forward pass launches: its kind, for `prebound`."""
    return "forward", scale, softcap, dropout_p, trains, num_splits, hopper.wanted()


def _checked_seed(seed: Tensor | None, device: torch.device) -> Tensor:
    """The seed of dropout, int64 `[1]` on `device`: the one that was given, or a new one."""
    if seed is None:
        return draw_seed(device)
    if not isinstance(seed, Tensor):
        raise TypeError(
            f"attention: `dropout_seed` must be an int64 tensor of shape [1], got {type(seed).__name__}; leave it out "
            "to have one drawn"
        )
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"attention: `dropout_seed` must be int64 of shape [1] on {device}, got {seed.dtype} {list(seed.shape)} on "
            f"{seed.device}; leave it out to have one drawn"
        )
    return seed


def _wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a function of these."""
    return torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


def _are_numbers(scale: float | None, softcap: float | None) -> bool:
    """Whether each is None or one of Python's own numbers, and not a symbol that torch.compile traces."""
    return (scale is None or type(scale) is float) and (softcap is None or type(softcap) in (float, int))


def _are_at_hand(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, mask: Tensor | None, bias: Tensor | None
) -> bool:
    """Whether the call can be looked up among earlier ones: nothing traces it, and all are ordinary tensors.

    The query must have four dimensions and columns, since its shape is used before anything is checked.
    """
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and type(query) is type(key) is type(value) is Tensor
        and (sinks is mask is bias is None or _are_real(sinks, mask, bias))
        and not (query.is_nested or key.is_nested or value.is_nested)
        and query.ndim == 4
        and query.shape[3] > 0
        and not (query.is_neg() or key.is_neg() or value.is_neg() or query.is_meta)
    )


def _are_real(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary tensors: none is fake, of a subclass, without storage, or a lazy negation (`is_neg`)."""
    return all(
        tensor is None or (type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta and not tensor.is_neg())
        for tensor in tensors
    )


def cast_for_autocast(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors in the dtype that an active `torch.autocast` asks for, as torch's own attention takes them."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return iter(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return (tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def _validated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value that fit each other, expanded to one batch."""
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if tensor.ndim != 4:
            raise ValueError(
                f"attention: `{name}` must be [batch, heads, tokens, dim], got {list(tensor.shape)}; unsqueeze what is "
                "missing"
            )
        if tensor.dtype != query.dtype or tensor.dtype not in DTYPES:
            raise TypeError(
                f"attention: query, key and value must share one dtype of {[str(dtype) for dtype in DTYPES]}, got "
                f"{[str(each.dtype) for each in named.values()]}; cast them to one"
            )
        if tensor.device != query.device:
            raise ValueError(
                "attention: query, key and value must be on one device, got "
                f"{[str(each.device) for each in named.values()]}; move them to one"
            )
    batch = max(tensor.shape[0] for tensor in named.values())
    if not all(is_one_or(tensor.shape[0], batch) for tensor in named.values()):
        raise ValueError(
            f"attention: batch sizes of {', '.join(named)} must be equal or 1, got "
            f"{[tensor.shape[0] for tensor in named.values()]}; expand or slice the others"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"attention: `query` and `key` must share the head dim, got {query.shape[-1]} and {key.shape[-1]}; pad the "
            "narrower one with zeros, and pass the `scale` of the dim before"
        )
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(
            f"attention: `key` and `value` must share heads and length, got {list(key.shape)} and "
            f"{list(value.shape)}; only their last dimension may differ"
        )
    if key.shape[1] == 0 or query.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            "attention: the number of query heads must be a multiple of the number of key heads, and neither 0, got "
            f"{query.shape[1]} and {key.shape[1]}; shard or repeat the heads so that each group is whole"
        )
    for name, dim, most in (
        ("query", query.shape[-1], MAX_HEAD_DIM),
        ("value", value.shape[-1], MAX_VALUE_DIM),
    ):
        if not 1 <= dim <= most:
            instead = 'wider heads need attn_implementation="eager"' if dim else "a head has a column at least"
            raise ValueError(f"attention: the head dim of `{name}` must be 1 to {most}, got {dim}; {instead}")
    whole = (batch, -1, -1, -1)
    return query.expand(whole), key.expand(whole), value.expand(whole)


def _checked_spans(spans: Spans | None, query: Tensor, key: Tensor) -> Spans:
    """The spans of a call, which fit its tensors; all keys where none were given."""
    (batch, _, query_len, _), key_len = query.shape, key.shape[2]
    if spans is None:
        return Spans.full(query_len, key_len, device=query.device)
    if (spans.query_len, spans.key_len) != (query_len, key_len) or not is_one_or(spans.batch, batch):
        raise ValueError(
            f"attention: `spans` is for batch {spans.batch}, {spans.query_len} queries and {spans.key_len} keys, but "
            f"the tensors have batch {batch}, {query_len} queries and {key_len} keys; build it for their lengths"
        )
    if spans.device != query.device:
        raise ValueError(f"attention: `spans` is on {spans.device}, `query` on {query.device}; use spans.to(...)")
    return spans


# ---------------------------------------------------------------------- paths


@lru_cache
def log_once(message: str) -> None:
    """Say which path runs, once per process: nothing falls back in silence."""
    logger.warning(message)


@lru_cache
def triton_installed() -> bool:
    """Whether Triton can be imported; it has no wheels for macOS and Windows."""
    return find_spec("triton") is not None


@lru_cache
def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, and so on CPU tensors."""
    if not triton_installed():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def runs_triton(tensor: Tensor) -> bool:
    """Whether a call on this tensor runs the Triton kernel; where that may surprise, the log says why not."""
    if tensor.device.type == "cpu" and not interpreting():
        return False
    if tensor.dtype == torch.float64:
        log_once("float64 runs attention in torch: the Triton kernels are for float16, bfloat16 and float32")
        return False
    if tensor.device.type == "cpu":
        return True
    if tensor.device.type != "cuda":
        log_once(f"{tensor.device.type} tensors run attention in torch: the Triton kernels are for CUDA and ROCm")
        return False
    if not triton_installed():
        log_once("Triton is not installed, so attention runs in torch; `pip install triton` brings the kernels")
        return False
    if (reason := unsupported_device(tensor.device)) is not None:
        raise RuntimeError(reason)
    return True


# ---------------------------------------------------------------------- torch.library

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor start, Tensor end, Tensor? key_mask, Tensor? gap_count, "
    "Tensor? mask, Tensor? bias, Tensor? sinks, Tensor? dropout_seed, float scale, float? softcap, float dropout_p"
)
_library = torch.library.Library("attention_kernels", "DEF")
_library.define(f"forward({_ARGUMENTS}, bool wants_gradient, int? num_splits) -> (Tensor, Tensor, Tensor)")
_library.define(
    "backward(Tensor output, Tensor lse, Tensor rounding, Tensor grad_output, Tensor? grad_lse, bool wants_query, "
    f"bool wants_key_value, bool wants_bias, bool wants_sinks, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_BIAS, _SINKS = 8, 9
"""Where bias and sinks stand among `_ARGUMENTS`."""

_FLAGS = 4
"""How many flags `backward` has before `_ARGUMENTS`: wants_query, wants_key_value, wants_bias and wants_sinks."""


def _problem(
    query, key, value, start, end, key_mask, gap_count, mask, bias, sinks, dropout_seed, scale, softcap, dropout_p,
    *, trains, fixed_splits=False,
) -> blockwise.Problem:  # fmt: skip
    """`_ARGUMENTS`, as the torch path takes them: the count of gaps is for kernels alone."""
    return blockwise.Problem(
        query, key, value, start, end, key_mask, mask, bias, sinks, dropout_seed, scale, softcap, dropout_p, trains,
        fixed_splits,
    )  # fmt: skip


def _forward(*inputs: Any, known_spans: prebound.KnownSpans | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and, for 16-bit gradients, what the output lost when it was rounded (else empty).

    Args:
        inputs: `_ARGUMENTS`, then wants_gradient and num_splits.
        known_spans: what `prebound` knows of the spans, if it knows them; else they are described here.
    """
    *arguments, wants_gradient, num_splits = inputs
    query, key, value, *spans, mask, bias, sinks, seed, scale, softcap, dropout_p = arguments
    if not runs_triton(query):
        return blockwise.forward(_problem(*arguments, trains=wants_gradient, fixed_splits=num_splits is not None))

    def launch() -> tuple[Tensor, Tensor, Tensor]:
        return launch_forward(*inputs)

    asked = _forward_asked(scale, softcap, dropout_p, wants_gradient, num_splits)
    known_spans = known_spans or prebound.describe_spans(*spans)
    output, lse, rounding = prebound.launched(launch, known_spans, (query, key, value, sinks, seed, mask, bias), asked)
    assert output is not None and lse is not None
    return output, lse, query.new_empty(0) if rounding is None else rounding


def launch_forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and rounding, by whichever of the kernels serves a call; `inputs` are those of `_forward`."""
    *arguments, wants_gradient, num_splits = inputs
    # The kernels are not imported before they are needed: importing Triton takes time.
    *tensors, dropout_seed, scale, softcap, _ = arguments
    query = tensors[0]
    if query.shape[2] <= SHORT and not wants_gradient and dropout_seed is None:
        from .decode import decode

        return *decode(*tensors, scale=scale, softcap=softcap, num_splits=num_splits), query.new_empty(0)
    wants_rounding = _has_rounding(query, wants_gradient)
    gluon_wanted = hopper.wanted()
    if gluon_wanted or (gluon_wanted is None and hopper.is_proven(query.device, query.dtype, query.shape[3])):
        from .hopper import launching as gluon

        _, key, value, start, end, key_mask, gap_count, mask, bias, sinks = tensors
        reason = gluon.unserved(query, key, value, mask=mask, bias=bias, dropout_seed=dropout_seed, softcap=softcap)
        if reason is None:
            return gluon.forward(
                query, key, value, start, end, key_mask, gap_count, sinks, scale, wants_rounding=wants_rounding
            )
        if gluon_wanted:
            log_once(f"the Gluon kernel leaves calls to the Triton kernel: {reason}")
    from .forward import forward

    return forward(*arguments, wants_rounding=wants_rounding)


def _has_rounding(query: Tensor, wants_gradient: bool) -> bool:
    """Whether the forward pass keeps what rounding took from its output: the backward pass adds it again."""
    return wants_gradient and query.dtype.itemsize == 2


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors in the shapes, dtypes and strides of what `_forward` returns."""
    batch, num_heads, query_len, _ = query.shape
    output = query.new_empty(batch, query_len, num_heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch, num_heads, query_len, dtype=blockwise.accumulator(query.dtype))
    return output, lse, torch.empty_like(output) if _has_rounding(query, arguments[-2]) else query.new_empty(0)


def _backward(
    output: Tensor,
    lse: Tensor,
    rounding: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    *arguments: Any,
    known_spans: prebound.KnownSpans | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, bias and sinks; empty where not wanted.

    Args:
        output, lse, rounding: what `_forward` returned.
        grad_output, grad_lse: gradients of output and log-sum-exp; None where nothing depends on the latter.
        arguments: four flags, then `_ARGUMENTS`.
        known_spans: as for `_forward`.
    """
    operands = arguments[_FLAGS:]
    if runs_triton(operands[0]):
        gradients = _launch_backward(output, lse, rounding, grad_output, grad_lse, *arguments, known_spans=known_spans)
    else:
        problem = _problem(*operands, trains=True)
        flags = arguments[:_FLAGS]
        gradients = blockwise.backward(problem, output, lse, rounding, grad_output, grad_lse, *flags)
    return tuple(output.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _launch_backward(
    output: Tensor,
    lse: Tensor,
    rounding: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    *arguments: Any,
    known_spans: prebound.KnownSpans | None,
) -> tuple[Tensor | None, ...]:
    """As `_backward`, by the kernels; None where not wanted."""
    # Not before they are needed: importing Triton takes time.
    from .backward import Gradients, backward, sink_gradient, whole_bias_gradient

    *flags, wants_sinks = arguments[:_FLAGS]
    query, key, value, *spans, mask, bias, sinks, seed, scale, softcap, dropout_p = arguments[_FLAGS:]

    if grad_output.stride(-1) != 1:  # a sum's gradient, for example, has strides of 0: slow to read column by column
        grad_output = grad_output.contiguous()

    def launch() -> Gradients:
        return backward(output, lse, rounding, grad_output, grad_lse, *flags, *arguments[_FLAGS:])

    inputs = query, key, value, sinks, seed, mask, bias, output, lse, rounding, grad_output, grad_lse
    asked = ("backward", *flags, scale, softcap, dropout_p)
    if known_spans is None or not known_spans.are(*spans):
        known_spans = prebound.describe_spans(*spans)
    found = Gradients(*prebound.launched(launch, known_spans, inputs, asked))
    return (
        *found[:3],
        None if found.bias is None else whole_bias_gradient(found.bias, bias),
        sink_gradient(sinks, found.lse2, found.delta) if wants_sinks else None,
    )


def _backward_fake(
    output: Tensor,
    lse: Tensor,
    rounding: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """Empty tensors in the shapes, dtypes and strides of what `_backward` returns."""
    wants_query, wants_key_value, wants_bias, wants_sinks = arguments[:_FLAGS]
    arguments = arguments[_FLAGS:]
    query, key, value = arguments[:3]
    bias, sinks = arguments[_BIAS], arguments[_SINKS]
    return (
        _empty_token_major(query) if wants_query else query.new_empty(0),
        *(_empty_token_major(each) if wants_key_value else query.new_empty(0) for each in (key, value)),
        torch.empty_like(bias, memory_format=torch.contiguous_format) if wants_bias else query.new_empty(0),
        torch.empty_like(sinks) if wants_sinks else query.new_empty(0),
    )


def _empty_token_major(tensor: Tensor) -> Tensor:
    """An empty tensor of the same shape that is stored token by token."""
    batch, heads, tokens, dim = tensor.shape
    return tensor.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep for the backward pass what `_autograd` reads; `inputs` are those of `_forward`."""
    ctx.set_materialize_grads(False)
    *tensors, ctx.scale, ctx.softcap, ctx.dropout_p, _, _ = inputs
    ctx.save_for_backward(*output, *tensors)


def _autograd(
    ctx: Any,
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    grad_rounding: Tensor | None,
    operator: Callable[..., tuple[Tensor, ...]] = torch.ops.attention_kernels.backward,
) -> tuple[Tensor | None, ...]:
    """A gradient for each of `_forward`'s inputs, None for most, by `operator`. Nothing depends on rounding."""
    output, lse, rounding, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wants = (needs[0], needs[1] or needs[2], needs[_BIAS], needs[_SINKS])
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    gradients = operator(
        output, lse, rounding, grad_output, grad_lse, *wants, *tensors, ctx.scale, ctx.softcap, ctx.dropout_p
    )
    result: list[Tensor | None] = [None] * len(needs)
    for place, gradient in zip((0, 1, 2, _BIAS, _SINKS), gradients, strict=True):
        result[place] = gradient if needs[place] else None
    return tuple(result)


class Attention(torch.autograd.Function):
    """The operator and its gradient, without what its registration does for compilers and modes at each call."""

    @staticmethod
    def forward(ctx: Any, *inputs_and_known_spans: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As `_forward`, whose `known_spans` come last."""
        *inputs, ctx.known_spans = inputs_and_known_spans
        results = _forward(*inputs, known_spans=ctx.known_spans)
        _setup_context(ctx, inputs, results)
        return results

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, grad_rounding: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """As `_autograd`.

        The registered operator computes it where a compiler, a mode or another backward pass looks on: it serves the
        first two and refuses the last.
        """
        gradients = grad_output, grad_lse, grad_rounding
        looked_at = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        if looked_at or not _are_real(*gradients) or any(map(_is_batched, gradients)):
            return _autograd(ctx, *gradients)
        return _autograd(ctx, *gradients, operator=partial(_backward, known_spans=ctx.known_spans))


def _is_batched(gradient: Tensor | None) -> bool:
    """Whether it is a batch of gradients: `torch.autograd.grad(..., is_grads_batched=True)`, or `torch.func`."""
    functorch = torch._C._functorch
    return gradient is not None and (
        functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)
    )


def _refuse_double_backward(ctx: Any, *gradients: Tensor | None) -> NoReturn:
    """Refuse gradients of gradients.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "attention: gradients of gradients (double backward) are not served; "
        'use attn_implementation="eager" where a loss needs them'
    )


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("attention_kernels::forward", _forward_fake, lib=_library)
torch.library.register_fake("attention_kernels::backward", _backward_fake, lib=_library)
torch.library.register_autograd("attention_kernels::forward", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("attention_kernels::backward", _refuse_double_backward, lib=_library)
