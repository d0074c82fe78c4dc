# SPDX-License-Identifier: Apache-2.0
"""Fused attention over spans. Imports torch and NumPy, and triton once a kernel runs."""

from .cache import PagedCache, write_cache
from .dropout import draw_seed
from .merge import cascade_attention, merge_states
from .operators import attention
from .paged import paged_attention
from .reference import attention_reference
from .spans import Spans, TileBounds
from .weights import attention_weights

__all__ = [
    "PagedCache",
    "Spans",
    "TileBounds",
    "attention",
    "attention_reference",
    "attention_weights",
    "cascade_attention",
    "draw_seed",
    "merge_states",
    "paged_attention",
    "write_cache",
]
