# SPDX-License-Identifier: Apache-2.0
"""A few real calls of attention on a device, through what is registered with transformers, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from attention_kernels.reference import attention_reference, error_bound

from .. import NAME

BATCH, HEADS, KV_HEADS, TOKENS, HEAD_DIM = 2, 4, 2, 48, 64
PADDING = 17
"""Left padding of the second sequence."""


@dataclass(frozen=True)
class Outcome:
    """How far off a result was.

    Attributes:
        what: what was computed.
        error: norm of the difference from float64, relative to the result's.
        bound: the most that is allowed: twice the error of eager attention in the same dtype.
    """

    what: str
    error: float
    bound: float

    @property
    def right(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.error <= self.bound


def check_attention(device: torch.device, dtype: torch.dtype) -> list[Outcome]:
    """Attention over a left-padded causal batch with grouped heads: a prompt, its gradient, and one more token.

    The reference states its mask on its own, as a comparison of positions.

    Raises:
        Exception: whatever a broken installation raises.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, heads, TOKENS, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    name = str(dtype).removeprefix("torch.")
    with torch.no_grad():
        outcomes = [_outcome(f"prompt, {name}", inputs, TOKENS)]
        outcomes.append(_outcome(f"next token, {name}", [inputs[0][:, :, -1:], *inputs[1:]], 1))
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    return [*outcomes, _outcome(f"gradients, {name}", leaves, TOKENS)]


def _outcome(what: str, inputs: list[Tensor], query_len: int) -> Outcome:
    results = [_served(inputs, query_len), _reference(inputs, inputs[0].dtype), _reference(inputs, torch.float64)]
    if inputs[0].requires_grad:
        results = [_gradients(result, inputs) for result in results]
    ours, eager, exact = (result.detach().double() for result in results)
    size = float(exact.norm())
    bound = error_bound(float((eager - exact).norm()), size, inputs[0].dtype)
    return Outcome(what, float((ours - exact).norm()) / size, bound / size)


def _served(inputs: list[Tensor], query_len: int) -> Tensor:
    """Output `[batch, query_len, heads, head_dim]` of the registered functions."""
    device = inputs[0].device
    mask = AttentionMaskInterface()[NAME](
        batch_size=BATCH, q_length=query_len, kv_length=TOKENS, q_offset=TOKENS - query_len,
        mask_function=masking_utils.causal_mask_function, attention_mask=_attended(device).long(), device=device,
    )  # fmt: skip
    module: Any = torch.nn.Module()
    module.is_causal = True
    return AttentionInterface()[NAME](module, *inputs, mask)[0]


def _reference(inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    query, key, value = inputs
    index = torch.arange(TOKENS, device=query.device)
    rows = index[TOKENS - query.shape[2] :, None]
    mask = (index <= rows) & _attended(query.device)[:, None, None]
    return attention_reference(query, key, value, mask=mask, dtype=dtype)[0].transpose(1, 2)


def _attended(device: torch.device) -> Tensor:
    first = torch.tensor([[0], [PADDING]], device=device)
    return torch.arange(TOKENS, device=device) >= first


def _gradients(output: Tensor, leaves: list[Tensor]) -> Tensor:
    """Gradients of a fixed weighting of the output, in one row."""
    weight = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
    return torch.cat([gradient.double().flatten() for gradient in torch.autograd.grad(output, leaves, weight)])
