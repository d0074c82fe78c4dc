# SPDX-License-Identifier: Apache-2.0
"""Spans that follow from lengths alone, kept: the layers of a model share them, and what is known of their calls.

Building them anew takes a few small kernels a call on a GPU, and longer than all else that a repeated call does.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .spans import Spans

MOST_KEPT = 16
"""Spans that are kept."""

MOST_QUERIES = 4096
"""Queries of a call whose spans are: those of a long prompt take memory, and little of its time to build."""

_kept: dict[tuple, Spans] = {}


def window_spans(
    query_len: int, key_len: int, *, left: int | None = None, right: int | None = None, device: torch.device
) -> Spans:
    """`Spans.sliding` with the last row at the last key; without bounds `Spans.full`. Not to be changed in place.

    Raises:
        ValueError: a length or a bound is negative.
    """
    where = _where(query_len, device)
    kind = (query_len, key_len, left, right, where)
    if where is not None and (kept := _kept.get(kind)) is not None:
        return kept
    if left is right is None:
        spans = Spans.full(query_len, key_len, device=device)
    else:
        spans = Spans.sliding(query_len, key_len, left=left, right=right, device=device)
    if where is not None:
        for oldest in list(_kept)[: max(0, len(_kept) - MOST_KEPT + 1)]:
            _kept.pop(oldest, None)  # another thread may have been faster
        _kept[kind] = spans
    return spans


def _where(query_len: int, device: torch.device) -> tuple | None:
    """What has to be the same for tensors to be shared, besides what is in them; None where they must not be."""
    # A compiler, a tracer and a mode (of fake tensors, say) have tensors of their own.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
        return None
    if query_len > MOST_QUERIES:
        return None
    inference = torch.is_inference_mode_enabled()
    if device.type == "cpu":
        return device, inference
    # A graph that is being captured fills memory of its own, when it is replayed; and it would outlive what is kept.
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    # Another stream might read before this one has written.
    return device, inference, torch.cuda.current_stream(device).cuda_stream
