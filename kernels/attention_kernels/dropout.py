# SPDX-License-Identifier: Apache-2.0
"""Which attention weights dropout keeps, as a function of a seed and a weight's place.

The generator is counter-based: forward and backward, a checkpoint's second forward, tiles of any shape and every path
(torch here, `tiles.keep_tile` in the kernels) get the same answer for the same weight, and nothing is stored. It is
Squares with four rounds (Widynski, "Squares: A Fast Counter-Based RNG", 2020), whose key is the seed after the
finaliser of SplitMix64 (Steele, Lea and Flood, 2014), since Squares wants keys whose digits are irregular.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 24
"""Bits of a random number that are compared with the dropout probability: as many as float32 resolves below 1."""

CHUNK = 1 << 15
"""Random numbers computed at once: so few that they stay in a core's cache through some twenty passes over them."""


def draw_seed(device: torch.device) -> Tensor:
    """A seed, int64 `[1]`, from torch's default generator of the device: `torch.manual_seed` decides it."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device)


def threshold_and_scale(dropout_p: float) -> tuple[int, float]:
    """The random number from which on a weight is kept, and the factor of kept weights that keeps their mean."""
    threshold = round(dropout_p * (1 << BITS))
    kept = 1.0 - threshold / (1 << BITS)
    return threshold, 1.0 / kept if kept else 0.0


def keep_mask(
    seed: Tensor, dropout_p: float, heads: Tensor, rows: Tensor, keys: Tensor, query_len: int, key_len: int
) -> Tensor:
    """Which weights are kept.

    Args:
        seed: int64 `[1]`.
        dropout_p: probability of dropping a weight, 0 to 1.
        heads: number of the head counted over the whole batch, `batch_index * num_heads + head`; integer.
        rows: position of the query in its sequence; integer. `heads` and `rows` broadcast to `[..., rows, 1]`.
        keys: position of the key in its sequence; integer `[keys]`.
        query_len, key_len: lengths of the whole sequences.

    Returns:
        bool `[..., rows, keys]`.
    """
    threshold, _ = threshold_and_scale(dropout_p)
    first = (heads.long() * query_len + rows) * key_len  # the counter of the row's key 0
    keep = torch.zeros(*first.shape[:-1], keys.shape[0], dtype=torch.bool, device=keys.device)
    if threshold == 1 << BITS or not keep.numel():
        return keep
    # The greatest bits of a 64-bit number, compared as torch compares: as if they had a sign.
    bound = (threshold << (64 - BITS)) - (1 << 63)
    multiplier = _irregular(seed)
    first, keys = first.reshape(-1, 1) * multiplier, keys.long() * multiplier
    step = max(1, CHUNK // keys.shape[0])
    for some, answer in zip(first.split(step), keep.view(-1, keys.shape[0]).split(step), strict=True):
        torch.ge(_rounds(some + keys, multiplier) ^ -(1 << 63), bound, out=answer)
    return keep


def squares(counter: Tensor, seed: Tensor) -> Tensor:
    """The 32-bit random number of each counter, as int64 of the counter's shape."""
    multiplier = _irregular(seed)
    return _shift(_rounds(counter * multiplier, multiplier), 32)


def _rounds(y: Tensor, multiplier: Tensor) -> Tensor:
    """Four rounds of squaring, whose upper 32 bits are the random number, for `y = counter * multiplier`."""
    z = y + multiplier
    x, spare = (y * y).add_(y), torch.empty_like(y)
    for added in (z, y):
        _swap_halves_(x, spare)
        x.mul_(x).add_(added)
    _swap_halves_(x, spare)
    return x.mul_(x).add_(z)


def _swap_halves_(x: Tensor, spare: Tensor) -> None:
    """Exchange the two 32-bit halves of 64-bit numbers, in place; `spare` is memory of the same shape."""
    torch.bitwise_left_shift(x, 32, out=spare)
    x.bitwise_right_shift_(32).bitwise_and_((1 << 32) - 1).bitwise_or_(spare)


def _irregular(seed: Tensor) -> Tensor:
    """The key of Squares: the seed after SplitMix64's finaliser, made odd.

    The constants are those of `tiles.SPLITMIX_STEP`, `SPLITMIX_FIRST` and `SPLITMIX_SECOND`, as signed numbers.
    """
    x = seed + -0x61C8864680B583EB
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return (x ^ _shift(x, 31)) | 1


def _shift(x: Tensor, bits: int) -> Tensor:
    """Right shift that fills with zeros: torch's fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
