# SPDX-License-Identifier: Apache-2.0
"""Fused attention over spans. Imports torch, and triton once a kernel runs."""

from .dropout import draw_seed
from .operators import attention
from .reference import attention_reference
from .spans import Spans, TileBounds
from .weights import attention_weights

__all__ = [
    "Spans",
    "TileBounds",
    "attention",
    "attention_reference",
    "attention_weights",
    "draw_seed",
]
