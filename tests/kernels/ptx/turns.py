# SPDX-License-Identifier: Apache-2.0
"""How often memory takes its turn for what a kernel asks of it: a GPU's counters of bank conflicts and of sectors."""

from __future__ import annotations

from collections import Counter

import numpy as np

BANKS, SECTOR = 32, 32


class Turns:
    """What accesses took and what they had to take, by "shared" and "global".

    Shared memory gives 32 words of 4 bytes a turn, one from each bank: 8 bytes for 16 threads, 16 bytes for 8. Global
    memory is read in sectors of 32 bytes.
    """

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()
        self.needed: Counter[str] = Counter()

    def count(self, space: str, addresses: np.ndarray, size: int, threads: np.ndarray) -> None:
        """An access of `size` bytes by each of these threads."""
        addresses = addresses.astype(np.int64)
        if space == "shared":
            part = threads * max(size, 4) // (4 * BANKS)
            words = (addresses // 4)[:, None] + np.arange(max(1, size // 4))
            pairs = np.unique(np.stack([np.repeat(part, words.shape[1]), words.reshape(-1)]), axis=1)
            pairs, turns = np.unique(np.stack([pairs[0], pairs[1] % BANKS]), axis=1, return_counts=True)
            parts, first = np.unique(pairs[0], return_index=True)
            self.taken[space] += int(np.maximum.reduceat(turns, first).sum())
            self.needed[space] += len(parts)
            return
        warp = threads // 32
        ends = np.concatenate([addresses // SECTOR, (addresses + size - 1) // SECTOR])
        self.taken[space] += np.unique(np.stack([np.tile(warp, 2), ends]), axis=1).shape[1]
        _, numbers = np.unique(warp, return_counts=True)
        self.needed[space] += int((-(-numbers * size // SECTOR)).sum())
