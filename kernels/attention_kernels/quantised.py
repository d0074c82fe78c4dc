# SPDX-License-Identifier: Apache-2.0
"""Eight-bit keys and values: numbers that a scale turns back into keys and values."""

import torch
from torch import Tensor

QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
"""Dtypes of quantised keys and values."""


def largest(dtype: torch.dtype) -> float:
    """The largest number of a dtype that is used: of int8 only what has a negative counterpart."""
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def quantise(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers that have been divided by their scale, in a quantised dtype: the nearest, or the largest there is."""
    numbers = numbers.clamp(-largest(dtype), largest(dtype))
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype)
