# SPDX-License-Identifier: Apache-2.0
"""`attention`, the public operator, and the ways that a call can take.

attention    looks for an earlier call like this one (`prebound`, `blockwise.remembered`), or checks its arguments
             (`call_checks`), and asks for one forward pass: by `library.Attention` where autograd records it, by
             the registered operator where a compiler or a mode looks on, or directly
library      leads both to `passes.forward` and, on the way back, to `passes.backward`
passes       choose what computes a pass: the torch path, or one of the kernels
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import prebound
from .arguments import arguments_of
from .blockwise import remembered
from .call_checks import checked_call, checked_seed
from .checks import check_dropout, check_no_transform, check_tensors
from .library import Attention, are_real
from .passes import forward, forward_asked
from .paths import runs_triton
from .shared_spans import window_spans
from .spans import Spans, check_are_spans


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
        sink, where it has one). NaN and Inf in keys and values reach only the rows that see them; where a value is Inf,
        all columns of such a row may be NaN.

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
    seed = checked_seed(dropout_seed, query.device) if dropout_p else None
    # First way, on GPUs: a call that differs from an earlier one in addresses alone needs neither checks nor choices.
    # Without gradients its kernels are launched again here; with them `known` lets the backward pass do the same.
    repeatable = _are_numbers(scale, softcap) and _are_at_hand(query, key, value, sinks, mask, bias)
    known = None
    if repeatable and spans is None and key.ndim == 4:
        spans = window_spans(query.shape[2], key.shape[2], device=query.device)
    if repeatable and spans is not None:
        factor = query.shape[3] ** -0.5 if scale is None else scale
        asked = forward_asked(factor, softcap, dropout_p, trains, num_splits)
        inputs = query, key, value, sinks, seed, mask, bias  # as `Arguments.beside_spans`
        if (found := prebound.find(spans, inputs, asked)) is not None:
            known, tape = found
            if not trains and (results := tape(known.operand, inputs)) is not None:
                return results[:2] if return_lse else results[0]
    # Second way, on CPUs: the same for calls that have nothing but spans and sinks, and want no gradient.
    spans_alone = (
        repeatable and spans is not None and not trains and mask is bias is seed is softcap is num_splits is None
    )
    step = remembered.again(query, key, value, spans, sinks, scale, return_lse) if spans_alone else None
    if step is not None:
        output, lse = step
        return (output, lse) if return_lse and lse is not None else output
    # Third way, for everything else: one forward pass.
    others: dict[str, Any] = {
        "mask": mask, "bias": bias, "sinks": sinks, "dropout_seed": seed, "scale": scale, "softcap": softcap,
        "dropout_p": dropout_p,
    }  # fmt: skip
    if known is not None:
        assert spans is not None
        arguments = arguments_of(query, key, value, spans, **others)
    else:
        arguments = checked_call(query, key, value, spans, num_splits=num_splits, **others)
        num_splits = None if num_splits is None else int(num_splits)
        if spans_alone and not runs_triton(query):
            assert spans is not None
            first = remembered.first(*arguments[:3], spans, sinks, scale)
            if first is not None:
                return first if return_lse else first[0]
    # Where nothing but autograd looks at the call, the operator's registration would add time only.
    looked_at = torch.compiler.is_compiling() or torch.jit.is_tracing() or (trains and is_in_torch_dispatch_mode())
    if looked_at or not are_real(*arguments.beside_spans):
        output, lse, _ = torch.ops.attention_kernels.forward(*arguments, trains, num_splits)
    elif trains:
        output, lse, _ = Attention.apply(*arguments, trains, num_splits, known)
    else:
        output, lse, _ = forward(arguments, trains, num_splits)
    return (output, lse) if return_lse else output


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
        and (sinks is mask is bias is None or are_real(sinks, mask, bias))
        and not (query.is_nested or key.is_nested or value.is_nested)
        and query.ndim == 4
        and query.shape[3] > 0
        and not (query.is_neg() or key.is_neg() or value.is_neg() or query.is_meta)
    )
