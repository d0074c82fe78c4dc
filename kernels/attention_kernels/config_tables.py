# SPDX-License-Identifier: Apache-2.0
"""Tile shapes of the kernels, as data: a table per architecture, each row with its reason; and the room of chips.

None has been timed on a GPU yet: reasons are what the compiler says and what limits allow. `my-triton compile-report`
shows what the compiler makes of each row, and a test holds them to their limits: no spills on sm_90 up to head dim 256
(at lengths that 16 divides; docs/compile-report.md has others), none over a chip's shared memory.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

MOST_ROWS = 128
"""The most rows, and the most keys, of a tile; `launch.within_reach` counts on it."""

Work = Literal["spans", "tiles", "dropout", "short"]
"""What a call needs: spans, and perhaps hidden keys between or a softcap; a mask or a bias besides, or both of these;
dropout, with any of these; or few query rows, with anything."""


class ForwardConfig(NamedTuple):
    """Tile shape of the forward kernel.

    `chunk_d` is how many columns of a head are multiplied at a time; 0 means all. With `overlap` a turn of the loop
    multiplies the weights of the turn before by their values while it computes its own, unless the call has a mask or a
    bias. With `descriptors`, which need `overlap`, the hardware copies tiles of keys and values by itself (TMA) where
    their strides allow.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    chunk_d: int = 0
    reason: str = ""
    overlap: bool = False
    descriptors: bool = False


Rows = Literal["few", "many", "few pages", "many pages"]
"""Query rows of a group against a cache: up to `SHORT`, or more; and whether the cache lies in pages."""

CONTIGUOUS: tuple[Rows, ...] = ("few", "many")
"""Of these, those of caches that do not lie in pages."""

Pass = Literal["query", "key_value", "bias", "statistics"]
"""The kernels of the backward pass that have tile shapes of their own."""


class BackwardConfig(NamedTuple):
    """Tile shape of a backward kernel.

    `chunk_d` is as in `ForwardConfig`. `piece_d` is how many columns of a gradient one program computes; 0 means all.
    A wide gradient would fill the registers, so its columns are shared between programs, each of which recomputes the
    weights.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    chunk_d: int = 0
    piece_d: int = 0
    reason: str = ""


Extra = Literal["mask", "bias", "softcap", "hidden keys", "dropout"]
"""What a call can have besides spans; hidden keys are those between the first and the last that a row sees."""

SERVES: dict[str, frozenset[Extra]] = {
    "spans": frozenset(),
    "hidden keys": frozenset({"hidden keys"}),
    "softcap": frozenset({"hidden keys", "softcap"}),
    "all but bias": frozenset({"hidden keys", "softcap", "mask"}),
    "all but dropout": frozenset({"hidden keys", "softcap", "mask", "bias"}),
}
"""The most that a row serves which does not serve everything, by name."""


class FasterRow(NamedTuple):
    """A tile shape that has no room for everything, or spills; and the most that it serves: a name in `SERVES`."""

    config: BackwardConfig
    serves: str


SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
"""Bytes of shared memory that one program may use (CUDA C++ Programming Guide, compute capabilities; CDNA3 ISA)."""

WITHOUT_E4M3 = ("sm_80", "sm_86")
"""Architectures for which Triton knows no float8_e4m3fn."""


class DecodeConfig(NamedTuple):
    """Tile shape of the kernel for caches; as `ForwardConfig`, of rows that are queries of all heads of a group."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    chunk_d: int = 0
    reason: str = ""


# Why rows are as they are. Rows with the same reason share its words.
FITS_ALL = "fits 64 KB, the smallest shared memory, with every extra; 4 warps of 16 rows each"
FEW_ROWS = "16 rows are all that a matrix instruction needs; wide key tiles and two stages hide the wait for memory"
WIDE_HEAD = "256 columns of queries, keys and values fill 64 KB in one stage; 8 warps share the accumulator's registers"
IN_PIECES = "512 columns of queries and keys would fill the shared memory: they are multiplied 64 columns at a time"
FEWER_READS = "as elsewhere, with 32 keys for 16: the pieces of the queries are read half as often"
WHOLE_HEAD = "227 KB hold queries, and keys and values twice; nearly all that spills is beside the loop"
EXACT = "exact float32 products run on the ordinary units with operands in registers: small tiles, in pieces"
EXACT_NVIDIA = "exact products wait for shared memory: pieces of 16 conflict least, large tiles reuse what they read"
OVERLAPPED = "8 warps for 128 rows; one program fits, so its products run beside its own exponentials, without spills"
TWO_PROGRAMS = "at 64 columns exponentials take as long as products: 127 registers let two programs take turns"
GROUPS_TILES = "128 rows for two warp groups; two stages leave room for tiles of a mask and of a bias in float32"
GROUPS_EXTRAS = "128 rows for two warp groups; 32 keys leave registers for dropout beside everything else"
GROUPS_WIDE = "128 rows read each key half as often as 64; the output is written in parts, for want of registers"
ONE_GROUP_WIDE = "128 rows of 256 columns would leave no registers for dropout"
BLACKWELL_WIDE = "128 rows spill here: their products' results pass through the registers"
THROUGH_REGISTERS = "operands pass through registers on their way to the matrix units: 64 keys; 163 KB hold 3 stages"
AMPERE_TILES = "as with spans alone; two stages leave room for tiles of a mask and of a bias in float32"
AMPERE_EXTRAS = "as with spans alone, with half the keys: dropout takes registers"
AMPERE_WIDE = "8 warps share the accumulator of 256 columns; 163 KB hold two stages"
SHALLOW = "as Ampere, with shallower pipelines for 99 KB of shared memory"
NO_PIPELINE = "Triton 3.6 cannot compile the pipelined loop over so small a tile for this target"
INTERPRETER = "the interpreter pays for each operation, whatever its size; pieces are kept where the chips have them"
BACK_ALL = "fits 64 KB with every extra: four operand tiles, and the gradients in registers"
BACK_PIECES = "whole gradients would fill the registers: programs share their columns and recompute the weights"
BACK_WIDE = "operands would fill the shared memory and gradients the registers: products and results in pieces"
BACK_ONCE = "one read of each tile: nothing to pipeline, so wide key tiles in one stage"
BACK_EXACT = "exact float32 products hold their operands in registers: small tiles, in pieces"
BACK_EXACT_NVIDIA = "as in the forward pass; the same pieces in all kernels, or scores had not the same bits in each"
BACK_HOPPER = "8 warps share two gradients without spills, with every extra"
BACK_HOPPER_ROWS = "128 rows for the matrix instructions of two warp groups; 32 keys leave registers for every extra"
BACK_HOPPER_KEYS = "64 keys fill a warp group's matrix instruction; two programs fit, and work while the other waits"
BACK_HOPPER_ONCE = "64 rows fill a warp group's matrix instruction; one read of each tile, so one stage"
BACK_GROUPS = "what it does not serve would take the registers of whole warp groups"
BACK_GROUPS_WIDE = "as above; with a second stage the assembler waits for every matrix instruction"
BACK_FEW_ROWS = "16 rows leave registers for dropout beside everything else"
ONE_WARP_BRINGS = "two groups of 64 rows share a warp that brings tiles; the most keys whose scores fit the registers"
MEMORY_BOUND = "few rows wait for memory: narrow tiles, and as many stages as fit 64 KB"
MEMORY_HOPPER = "few rows wait for memory: 227 KB hold one more stage than elsewhere"
MANY_ROWS = "rows of a whole group against each key; one stage leaves registers for scales, a mask and a bias"
TABLE_FIRST = "entries of the block table are read three stages before keys: five leave two tiles of keys on their way"
PAGES_GROUPS = "prompts over pages: 128 rows for two warp groups, which read each key half as often as 64"
PAGES_WIDE = "prompts over pages: 64 rows for a warp group; 128 rows of 256 columns spill"
PAGES_WARPS = "prompts over pages: 128 rows for 8 warps; a stage goes to the block table"
PAGES_IN_PIECES = (
    "three pieces for the 576 columns of latent attention: each is a wait for memory, so few and wide ones"
)


def _any_work(size: int, dim: int, config: ForwardConfig) -> dict[tuple[int, int, Work], ForwardConfig]:
    """One shape as the rows of all work but that of few query rows."""
    works: tuple[Work, ...] = ("spans", "tiles", "dropout")
    return dict.fromkeys([(size, dim, work) for work in works], config)


_ANYWHERE: dict[tuple[int, int, Work], ForwardConfig] = {
    # (bytes per element, widest head, work). These fit the smallest shared memory of all, 64 KB.
    **_any_work(2, 64, ForwardConfig(64, 32, 4, 2, reason=FITS_ALL)),
    (2, 64, "short"): ForwardConfig(16, 64, 4, 2, reason=FEW_ROWS),
    **_any_work(2, 128, ForwardConfig(64, 32, 4, 2, reason=FITS_ALL)),
    (2, 128, "short"): ForwardConfig(16, 64, 4, 2, reason=FEW_ROWS),
    **_any_work(2, 256, ForwardConfig(64, 32, 8, 1, reason=WIDE_HEAD)),
    (2, 256, "short"): ForwardConfig(16, 32, 4, 2, reason=FEW_ROWS),
    # 512 columns of queries and keys together would fill the shared memory: they are multiplied in pieces.
    **_any_work(2, 512, ForwardConfig(64, 16, 8, 2, 64, reason=IN_PIECES)),
    (2, 512, "short"): ForwardConfig(16, 16, 8, 1, 64, reason=IN_PIECES),
    # Exact float32 products run on the ordinary units, which hold their operands in registers: small tiles, in pieces.
    **_any_work(4, 64, ForwardConfig(32, 32, 4, 1, 32, reason=EXACT)),
    (4, 64, "short"): ForwardConfig(16, 32, 4, 1, 32, reason=EXACT),
    **_any_work(4, 128, ForwardConfig(32, 32, 8, 1, 32, reason=EXACT)),
    (4, 128, "short"): ForwardConfig(16, 32, 4, 1, 32, reason=EXACT),
    **_any_work(4, 256, ForwardConfig(32, 32, 8, 1, 32, reason=EXACT)),
    (4, 256, "short"): ForwardConfig(16, 32, 8, 1, 32, reason=EXACT),
    **_any_work(4, 512, ForwardConfig(16, 16, 8, 1, 64, reason=EXACT)),
    (4, 512, "short"): ForwardConfig(16, 16, 8, 1, 64, reason=EXACT),
}

_EXACT: dict[tuple[int, int, Work], ForwardConfig] = {
    # NVIDIA's chips, whose exact float32 products wait for shared memory, and which have more than 64 KB of it.
    **_any_work(4, 64, ForwardConfig(64, 32, 4, 1, 16, reason=EXACT_NVIDIA)),
    (4, 64, "spans"): ForwardConfig(64, 64, 4, 1, 16, reason=EXACT_NVIDIA),
    (4, 64, "short"): ForwardConfig(16, 64, 4, 1, 16, reason=EXACT_NVIDIA),
    **_any_work(4, 128, ForwardConfig(32, 64, 4, 1, 16, reason=EXACT_NVIDIA)),
    (4, 128, "short"): ForwardConfig(16, 64, 4, 1, 16, reason=EXACT_NVIDIA),
    **_any_work(4, 256, ForwardConfig(32, 64, 8, 1, 16, reason=EXACT_NVIDIA)),
    (4, 256, "short"): ForwardConfig(16, 32, 8, 1, 16, reason=EXACT_NVIDIA),
    **_any_work(4, 512, ForwardConfig(16, 32, 8, 1, 16, reason=EXACT_NVIDIA)),
    (4, 512, "short"): ForwardConfig(16, 32, 8, 1, 16, reason=EXACT_NVIDIA),
}

_HOPPER: dict[tuple[int, int, Work], ForwardConfig] = {
    **_EXACT,
    # Matrix instructions of a warp group take 64 rows: 8 warps for 128. Room for deep pipelines.
    (2, 64, "spans"): ForwardConfig(128, 64, 8, 3, reason=TWO_PROGRAMS),
    (2, 64, "tiles"): ForwardConfig(128, 64, 8, 2, reason=GROUPS_TILES),
    (2, 64, "dropout"): ForwardConfig(128, 32, 8, 2, reason=GROUPS_EXTRAS, overlap=True),
    (2, 128, "spans"): ForwardConfig(128, 64, 8, 3, reason=OVERLAPPED, overlap=True),
    (2, 128, "tiles"): ForwardConfig(128, 64, 8, 2, reason=GROUPS_TILES),
    (2, 128, "dropout"): ForwardConfig(128, 32, 8, 2, reason=GROUPS_EXTRAS, overlap=True),
    (2, 256, "spans"): ForwardConfig(128, 64, 8, 2, reason=GROUPS_WIDE),
    (2, 256, "tiles"): ForwardConfig(128, 32, 8, 2, reason=GROUPS_TILES),
    (2, 256, "dropout"): ForwardConfig(64, 32, 8, 2, reason=ONE_GROUP_WIDE),
    (2, 256, "short"): ForwardConfig(16, 64, 4, 2, reason=FEW_ROWS),
    **_any_work(2, 512, ForwardConfig(64, 32, 8, 2, reason=WHOLE_HEAD)),
}

_BLACKWELL: dict[tuple[int, int, Work], ForwardConfig] = {
    **_HOPPER,
    (2, 256, "spans"): ForwardConfig(64, 64, 8, 2, reason=BLACKWELL_WIDE),
    (2, 256, "tiles"): ForwardConfig(64, 64, 8, 2, reason=BLACKWELL_WIDE),
    **_any_work(2, 512, ForwardConfig(64, 32, 8, 2, 128, reason=FEWER_READS)),
}

_AMPERE: dict[tuple[int, int, Work], ForwardConfig] = {
    **_EXACT,
    # Operands pass through registers on their way to the matrix units: tiles of wide heads are narrower than Hopper's.
    (2, 64, "spans"): ForwardConfig(128, 64, 8, 3, reason=THROUGH_REGISTERS),
    (2, 64, "tiles"): ForwardConfig(128, 64, 8, 2, reason=AMPERE_TILES),
    (2, 128, "spans"): ForwardConfig(128, 64, 8, 3, reason=THROUGH_REGISTERS),
    (2, 128, "tiles"): ForwardConfig(128, 64, 8, 2, reason=AMPERE_TILES),
    (2, 128, "dropout"): ForwardConfig(128, 32, 8, 3, reason=AMPERE_EXTRAS),
    (2, 256, "spans"): ForwardConfig(64, 32, 8, 2, reason=AMPERE_WIDE),
    (2, 256, "tiles"): ForwardConfig(64, 32, 8, 2, reason=AMPERE_WIDE),
    **_any_work(2, 512, ForwardConfig(64, 32, 8, 2, 128, reason=FEWER_READS)),
}

_CONSUMER: dict[tuple[int, int, Work], ForwardConfig] = {
    **_EXACT,
    # As Ampere, with shallower pipelines for 99 KB of shared memory.
    (2, 64, "spans"): ForwardConfig(128, 64, 8, 2, reason=SHALLOW),
    (2, 64, "tiles"): ForwardConfig(128, 64, 8, 2, reason=SHALLOW),
    (2, 128, "spans"): ForwardConfig(128, 32, 8, 2, reason=SHALLOW),
    (2, 128, "tiles"): ForwardConfig(128, 32, 8, 2, reason=SHALLOW),
    **_any_work(2, 256, ForwardConfig(64, 32, 8, 2, reason=SHALLOW)),
}

_CDNA: dict[tuple[int, int, Work], ForwardConfig] = {
    # Triton 3.6 cannot compile the pipelined loop over so small a tile for this target.
    (2, 64, "short"): ForwardConfig(16, 32, 4, 1, reason=NO_PIPELINE),
    (2, 128, "short"): ForwardConfig(16, 32, 4, 1, reason=NO_PIPELINE),
}

_INTERPRETED: dict[tuple[int, int, Work], ForwardConfig] = {
    # Triton's interpreter pays for each operation, whatever its size. Pieces are kept where the chips have them.
    (size, dim, work): ForwardConfig(16 if work == "short" else 64, 64, 1, 1, 0 if dim <= 128 else 64, INTERPRETER)
    for size in (2, 4) for dim in (64, 128, 256, 512) for work in get_args(Work)
}  # fmt: skip

CONFIGS: dict[str, dict[tuple[int, int, Work], ForwardConfig]] = {
    "sm_80": _ANYWHERE | _AMPERE,
    "sm_86": _ANYWHERE | _CONSUMER,
    "sm_89": _ANYWHERE | _CONSUMER,  # as sm_86, and has the other float8, whose decoding is compiled for it
    "sm_90": _ANYWHERE | _HOPPER,
    "sm_100": _ANYWHERE | _BLACKWELL,
    "sm_120": _ANYWHERE | _CONSUMER,
    "gfx942": _ANYWHERE | _CDNA,
    "interpreter": _INTERPRETED,
}
"""Every configuration that ships, by architecture and by (bytes per element, widest head, work)."""

_BACKWARD_ANYWHERE: dict[tuple[int, int, Pass], BackwardConfig] = {
    # (bytes per element, widest head, kernel). These fit the smallest shared memory of all, and every extra there is.
    (2, 64, "query"): BackwardConfig(32, 32, 4, 2, reason=BACK_ALL),
    (2, 64, "key_value"): BackwardConfig(32, 32, 4, 2, reason=BACK_ALL),
    (2, 64, "bias"): BackwardConfig(32, 64, 4, 1, reason=BACK_ONCE),
    (2, 64, "statistics"): BackwardConfig(32, 64, 4, 1, reason=BACK_ONCE),
    (2, 128, "query"): BackwardConfig(32, 32, 4, 2, reason=BACK_ALL),
    (2, 128, "key_value"): BackwardConfig(32, 32, 4, 1, 0, 64, reason=BACK_PIECES),
    (2, 128, "bias"): BackwardConfig(32, 64, 4, 1, reason=BACK_ONCE),
    (2, 128, "statistics"): BackwardConfig(32, 64, 4, 1, reason=BACK_ONCE),
    # From here on operands would fill the shared memory and gradients the registers: products and results in pieces.
    (2, 256, "query"): BackwardConfig(32, 32, 8, 1, 64, 128, reason=BACK_WIDE),
    (2, 256, "key_value"): BackwardConfig(32, 32, 8, 1, 64, 128, reason=BACK_WIDE),
    (2, 256, "bias"): BackwardConfig(32, 32, 4, 1, 64, reason=BACK_WIDE),
    (2, 256, "statistics"): BackwardConfig(32, 32, 8, 1, 64, reason=BACK_WIDE),
    (2, 512, "query"): BackwardConfig(32, 32, 8, 1, 64, 128, reason=BACK_WIDE),
    (2, 512, "key_value"): BackwardConfig(32, 32, 8, 1, 64, 64, reason=BACK_WIDE),
    (2, 512, "bias"): BackwardConfig(32, 32, 4, 1, 64, reason=BACK_WIDE),
    (2, 512, "statistics"): BackwardConfig(32, 32, 8, 1, 64, reason=BACK_WIDE),
    # Exact float32 products hold their operands in registers.
    **{
        (4, dim, kernel): BackwardConfig(32, 32, 8, 1, 32, 64, BACK_EXACT)
        for dim in (64, 128, 256, 512) for kernel in get_args(Pass)
    },
}  # fmt: skip

_EXACT_PASSES: dict[Pass, BackwardConfig] = {
    "query": BackwardConfig(64, 32, 4, 1, 16, 64, BACK_EXACT_NVIDIA),
    "key_value": BackwardConfig(32, 64, 8, 1, 16, 64, BACK_EXACT_NVIDIA),
    "bias": BackwardConfig(64, 64, 4, 1, 16, 64, BACK_EXACT_NVIDIA),
    "statistics": BackwardConfig(64, 32, 4, 1, 16, 64, BACK_EXACT_NVIDIA),
}

_BACKWARD_EXACT: dict[tuple[int, int, Pass], BackwardConfig] = {
    (4, dim, kernel): config for dim in (64, 128, 256, 512) for kernel, config in _EXACT_PASSES.items()
}

_BACKWARD_HOPPER: dict[tuple[int, int, Pass], BackwardConfig] = {
    **_BACKWARD_EXACT,
    (2, 64, "query"): BackwardConfig(128, 32, 8, 2, reason=BACK_HOPPER_ROWS),
    (2, 64, "key_value"): BackwardConfig(16, 64, 4, 1, reason=BACK_FEW_ROWS),
    (2, 64, "bias"): BackwardConfig(64, 64, 8, 1, reason=BACK_HOPPER_ONCE),
    (2, 128, "query"): BackwardConfig(128, 32, 8, 2, reason=BACK_HOPPER_ROWS),
    (2, 128, "key_value"): BackwardConfig(16, 64, 4, 1, reason=BACK_HOPPER_KEYS),
    (2, 128, "bias"): BackwardConfig(64, 64, 8, 1, reason=BACK_HOPPER_ONCE),
    (2, 256, "query"): BackwardConfig(32, 32, 8, 2, reason=BACK_HOPPER),
    (2, 256, "key_value"): BackwardConfig(32, 32, 8, 2, reason=BACK_HOPPER),
    (2, 128, "statistics"): BackwardConfig(64, 64, 8, 1, reason=BACK_HOPPER_ONCE),
    (2, 256, "statistics"): BackwardConfig(64, 32, 8, 1, 64, reason=BACK_HOPPER_ONCE),
    (2, 512, "key_value"): BackwardConfig(32, 64, 8, 1, 64, 64, reason=BACK_WIDE),
    (2, 512, "statistics"): BackwardConfig(64, 32, 8, 1, 64, reason=BACK_HOPPER_ONCE),
}

_BACKWARD_BLACKWELL: dict[tuple[int, int, Pass], BackwardConfig] = {
    **_BACKWARD_HOPPER,
    (2, 128, "query"): BackwardConfig(32, 64, 8, 2, reason=BACK_HOPPER),  # 128 rows spill here
}

BACKWARD_CONFIGS: dict[str, dict[tuple[int, int, Pass], BackwardConfig]] = {
    "sm_80": _BACKWARD_ANYWHERE | _BACKWARD_EXACT,
    "sm_86": _BACKWARD_ANYWHERE | _BACKWARD_EXACT,
    "sm_89": _BACKWARD_ANYWHERE | _BACKWARD_EXACT,
    "sm_90": _BACKWARD_ANYWHERE | _BACKWARD_HOPPER,
    "sm_100": _BACKWARD_ANYWHERE | _BACKWARD_BLACKWELL,
    "sm_120": _BACKWARD_ANYWHERE | _BACKWARD_EXACT,
    "gfx942": _BACKWARD_ANYWHERE,
    "interpreter": {
        (size, dim, kernel): BackwardConfig(64, 64, 1, 1, *((0, 0) if dim <= 128 else (64, 128)), reason=INTERPRETER)
        for size in (2, 4)
        for dim in (64, 128, 256, 512)
        for kernel in get_args(Pass)
    },
}
"""Every backward configuration that serves any call, by architecture."""

_BACKWARD_HOPPER_FASTER: dict[tuple[int, int, Pass], tuple[FasterRow, ...]] = {
    # Without some of what a call can have there is room for whole warp groups.
    (2, 64, "query"): (FasterRow(BackwardConfig(128, 64, 8, 2, reason=BACK_GROUPS), "all but dropout"),),
    (2, 64, "key_value"): (
        FasterRow(BackwardConfig(64, 128, 8, 2, reason=BACK_GROUPS), "hidden keys"),
        FasterRow(BackwardConfig(32, 64, 4, 1, reason=BACK_HOPPER_KEYS), "all but dropout"),
    ),
    (2, 128, "query"): (FasterRow(BackwardConfig(128, 64, 8, 2, reason=BACK_GROUPS), "all but dropout"),),
    (2, 128, "key_value"): (FasterRow(BackwardConfig(32, 128, 8, 2, reason=BACK_GROUPS), "softcap"),),
    (2, 256, "query"): (FasterRow(BackwardConfig(128, 32, 8, 2, reason=BACK_GROUPS), "all but dropout"),),
    (2, 256, "key_value"): (FasterRow(BackwardConfig(32, 64, 8, 1, reason=BACK_GROUPS_WIDE), "hidden keys"),),
}

_BACKWARD_BLACKWELL_FASTER: dict[tuple[int, int, Pass], tuple[FasterRow, ...]] = {
    **_BACKWARD_HOPPER_FASTER,
    (2, 256, "query"): (FasterRow(BackwardConfig(128, 32, 8, 2, reason=BACK_GROUPS), "all but bias"),),  # 1 KB too much
    # Results lie in memory of their own.
    (2, 256, "key_value"): (FasterRow(BackwardConfig(32, 64, 8, 2, reason=BACK_GROUPS), "hidden keys"),),
}

GLUON_CONFIGS: dict[str, dict[int, ForwardConfig]] = {
    # By head dim. The warps are those that compute; there is one more. Stages are the tiles of keys and of values that
    # lie in shared memory at once: with the queries they take 145, 161 and 193 KB of Hopper's 227.
    "sm_90": {
        64: ForwardConfig(128, 128, 8, 4, reason=ONE_WARP_BRINGS),
        128: ForwardConfig(128, 128, 8, 2, reason=ONE_WARP_BRINGS),
        256: ForwardConfig(128, 64, 8, 2, reason=ONE_WARP_BRINGS),
    },
}
"""The forward pass in Gluon (`hopper`), which runs only where it has been asked for, or proven by `my-triton tune`."""

BACKWARD_FASTER_CONFIGS: dict[str, dict[tuple[int, int, Pass], tuple[FasterRow, ...]]] = {
    "sm_90": _BACKWARD_HOPPER_FASTER,
    "sm_100": _BACKWARD_BLACKWELL_FASTER,
}
"""Faster ones for calls that have not everything, where there are such; the first that serves a call is taken."""

_DECODE_ANYWHERE: dict[tuple[int, int, Rows], DecodeConfig] = {
    # (bytes per element of the queries, widest head, rows). Few rows wait for memory: deep pipelines, narrow tiles.
    (2, 64, "few"): DecodeConfig(16, 64, 4, 2, reason=MEMORY_BOUND),
    (2, 128, "few"): DecodeConfig(16, 32, 4, 2, reason=MEMORY_BOUND),
    (2, 256, "few"): DecodeConfig(16, 32, 4, 1, reason=MEMORY_BOUND),
    (2, 512, "few"): DecodeConfig(16, 16, 8, 1, 64, reason=IN_PIECES),
    (2, 64, "many"): DecodeConfig(64, 32, 4, 1, reason=MANY_ROWS),
    (2, 128, "many"): DecodeConfig(64, 32, 8, 1, reason=MANY_ROWS),
    (2, 256, "many"): DecodeConfig(32, 32, 8, 1, reason=MANY_ROWS),
    (2, 512, "many"): DecodeConfig(32, 16, 8, 1, 64, reason=IN_PIECES),
    **{
        (4, dim, rows): DecodeConfig(16, 32 if dim == 64 else 16, 8, 1, 32, EXACT)
        for dim in (64, 128, 256, 512)
        for rows in CONTIGUOUS
    },
}

_DECODE_EXACT: dict[tuple[int, int, Rows], DecodeConfig] = {
    (4, dim, rows): DecodeConfig(16, block_n, 8, 1, 16, EXACT_NVIDIA)
    for dim, block_n in ((64, 32), (128, 32), (256, 32), (512, 16))
    for rows in CONTIGUOUS
}

_DECODE_HOPPER: dict[tuple[int, int, Rows], DecodeConfig] = {
    **_DECODE_EXACT,
    (2, 64, "few"): DecodeConfig(16, 64, 4, 3, reason=MEMORY_HOPPER),
    (2, 128, "few"): DecodeConfig(16, 32, 4, 3, reason=MEMORY_HOPPER),
    # Eight warps spill here with a softcap over pages of 16 bits.
    (2, 256, "few"): DecodeConfig(16, 32, 4, 2, reason=MEMORY_HOPPER),
}

_DECODE_INTERPRETED: dict[tuple[int, int, Rows], DecodeConfig] = {
    (size, dim, rows): DecodeConfig(16 if rows == "few" else 64, 32, 1, 1, 0 if dim <= 128 else 64, INTERPRETER)
    for size in (2, 4)
    for dim in (64, 128, 256, 512)
    for rows in CONTIGUOUS
}

_PAGES_CONSUMER: dict[tuple[int, int, Rows], DecodeConfig] = {
    # A tile of keys waits for its entries of the block table, which Triton reads some stages ahead.
    (2, 64, "few pages"): DecodeConfig(16, 32, 4, 5, reason=TABLE_FIRST),
    (2, 128, "few pages"): DecodeConfig(16, 32, 4, 5, reason=TABLE_FIRST),
    (2, 64, "many pages"): DecodeConfig(128, 64, 8, 3, reason=PAGES_WARPS),
    (2, 128, "many pages"): DecodeConfig(128, 32, 8, 3, reason=PAGES_WARPS),
}

_PAGES_AMPERE: dict[tuple[int, int, Rows], DecodeConfig] = {
    **_PAGES_CONSUMER,
    (2, 64, "few pages"): DecodeConfig(16, 64, 4, 5, reason=TABLE_FIRST),
}

_PAGES_HOPPER: dict[tuple[int, int, Rows], DecodeConfig] = {
    **_PAGES_AMPERE,
    (2, 256, "few pages"): DecodeConfig(16, 32, 4, 5, reason=TABLE_FIRST),
    (2, 512, "few pages"): DecodeConfig(16, 64, 8, 1, 256, reason=PAGES_IN_PIECES),
    (2, 64, "many pages"): DecodeConfig(128, 64, 8, 3, reason=PAGES_GROUPS),
    (2, 128, "many pages"): DecodeConfig(128, 64, 8, 3, reason=PAGES_GROUPS),
    (2, 256, "many pages"): DecodeConfig(64, 32, 8, 3, reason=PAGES_WIDE),
    (2, 512, "many pages"): DecodeConfig(32, 32, 8, 1, 256, reason=PAGES_IN_PIECES),
}


def _and_pages(
    table: dict[tuple[int, int, Rows], DecodeConfig], own: dict[tuple[int, int, Rows], DecodeConfig] | None = None
) -> dict[tuple[int, int, Rows], DecodeConfig]:
    """A table of rows for contiguous caches, and for pages the same but for those that have rows of their `own`."""
    pages: dict[Rows, Rows] = {"few": "few pages", "many": "many pages"}
    same = {(size, dim, pages[rows]): config for (size, dim, rows), config in table.items()}
    return table | same | (own or {})


DECODE_CONFIGS: dict[str, dict[tuple[int, int, Rows], DecodeConfig]] = {
    "sm_80": _and_pages(_DECODE_ANYWHERE | _DECODE_EXACT, _PAGES_AMPERE),
    "sm_86": _and_pages(_DECODE_ANYWHERE | _DECODE_EXACT, _PAGES_CONSUMER),
    "sm_89": _and_pages(_DECODE_ANYWHERE | _DECODE_EXACT, _PAGES_CONSUMER),
    "sm_90": _and_pages(_DECODE_ANYWHERE | _DECODE_HOPPER, _PAGES_HOPPER),
    "sm_100": _and_pages(_DECODE_ANYWHERE | _DECODE_HOPPER, _PAGES_HOPPER),
    "sm_120": _and_pages(_DECODE_ANYWHERE | _DECODE_EXACT, _PAGES_CONSUMER),
    "gfx942": _and_pages(_DECODE_ANYWHERE),
    "interpreter": _and_pages(_DECODE_INTERPRETED),
}
"""Configurations of the kernel for caches, by architecture."""
