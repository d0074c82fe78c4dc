# SPDX-License-Identifier: Apache-2.0
"""Fused attention over spans. Imports torch, and triton once a kernel runs."""

from .operators import attention
from .reference import attention_reference
from .spans import Spans, TileBounds

__all__ = ["Spans", "TileBounds", "attention", "attention_reference"]
