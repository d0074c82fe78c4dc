# SPDX-License-Identifier: Apache-2.0
"""From recorded calls to what is shown: equal layers together, their path, their mask, and the work that it saves."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attention_kernels import Spans
from attention_kernels.blockwise.pieces import Piece
from attention_kernels.blockwise.plan import plan_batch
from attention_kernels.configs import CONFIGS, architecture, forward_config, needs_tiles, unsupported_device
from attention_kernels.paths import interpreting, triton_installed

from ..command import UsageError
from .probe import Probe
from .record import Call

TORCH = "torch"
ARCHITECTURES = (TORCH, *CONFIGS)
"""Names that `Target.chosen` takes."""


@dataclass(frozen=True)
class Target:
    """What would compute attention: the Triton kernels of an architecture, or torch where that is None."""

    architecture: str | None
    dtype: torch.dtype

    @classmethod
    def chosen(cls, config: Any, name: str | None = None) -> Target:
        """This machine's path, or that of an architecture by name or of "torch", in the dtype of a configuration.

        Raises:
            UsageError: no name is given, and the kernels do not run on this machine's GPU.
        """
        dtype = getattr(config, "dtype", None)
        if name is None and torch.cuda.is_available() and triton_installed():
            device = torch.device("cuda", torch.cuda.current_device())
            if (reason := unsupported_device(device)) is not None:
                raise UsageError(f"{reason}; --architecture NAME shows what another would get")
            name = architecture(device)
        if name is None and interpreting():
            name = "interpreter"
        name = None if name == TORCH else name
        if not isinstance(dtype, torch.dtype) or dtype.itemsize not in (2, 4):
            dtype = torch.float32 if name in (None, "interpreter") else torch.bfloat16
        return cls(name, dtype)

    @property
    def words(self) -> str:
        """Where and in which dtype."""
        where = "torch path" if self.architecture is None else f"Triton kernels, {self.architecture}"
        return f"{where}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Work:
    """Scores of a head over the whole batch: how many there are, how many rows see, how many are computed."""

    dense: int
    visible: int
    computed: int


@dataclass(frozen=True)
class Mask:
    """A mask that some layers share; `label` is "A", "B", ..., `call` one of the calls that have it."""

    label: str
    name: str
    call: Call


@dataclass(frozen=True)
class Row:
    """Equal layers.

    Attributes:
        layers: their name, with the numbers that differ between them in braces, of many runs the first and last.
        names: the name of each, in full.
        calls: how often each is called in one run.
        path: what computes their attention; "refused" where nothing does.
        mask: their mask, None where refused.
        work: scores of one head.
        call: one of their calls.
    """

    layers: str
    names: tuple[str, ...]
    calls: int
    path: str
    mask: Mask | None
    work: Work | None
    call: Call

    @property
    def count(self) -> int:
        """How many layers there are."""
        return len(self.names)


def rows_of(probe: Probe, target: Target) -> list[Row]:
    """The calls of a run, equal layers together, in the order in which they run."""
    masks: list[Mask] = []
    groups: dict[tuple, list[Call]] = {}
    for call in probe.calls:
        mask = None if call.spans is None else _shared_mask(call, masks)
        name = _numbered(probe.names.get(call.module, type(call.module).__name__))[0]
        key = (name, mask and mask.label, call.scores, call.num_kv_heads, call.head_dim, call.value_dim, call.bias)
        groups.setdefault((*key, call.has_sinks, call.softcap, call.refused), []).append(call)
    known = {mask.label: mask for mask in masks}
    work = {mask.label: work_of(mask.call, target) for mask in masks}
    rows = []
    for (name, label, *_), calls in groups.items():
        modules = list(dict.fromkeys(call.module for call in calls))
        names = tuple(probe.names.get(module, type(module).__name__) for module in modules)
        numbers = [_numbered(each)[1] for each in names]
        layers = name.replace("*", _ranges([number for number in numbers if number is not None]), 1)
        path = path_of(calls[0], target)
        own = None if label is None else _work_on_path(calls[0], known[label], work[label], target)
        rows.append(Row(layers, names, len(calls) // len(modules), path, known.get(label), own, calls[0]))
    return rows


def path_of(call: Call, target: Target) -> str:
    """What computes a call, in words."""
    if call.refused is not None:
        return "refused"
    if target.architecture is None:
        words = "torch, fused" if call.softcap is None else "torch, written out"
    else:
        tile = tile_of(call, target)
        words = f"Triton {tile[0]} x {tile[1]}"
    return words + (", dense mask" if call.dense is not None else "") + (", bias" if call.bias is not None else "")


def tile_of(call: Call, target: Target) -> tuple[int, int]:
    """Rows and keys of a tile of the forward kernel."""
    assert target.architecture is not None
    has_tiles = needs_tiles(
        mask=call.dense is not None, bias=call.bias is not None, softcap=call.softcap is not None,
        hidden_keys=call.spans is not None and call.spans.key_mask is not None,
    )  # fmt: skip
    config = forward_config(
        target.architecture, target.dtype, call.head_dim, call.value_dim, call.scores[2],
        has_tiles=has_tiles, has_dropout=False,
    )  # fmt: skip
    return config.block_m, config.block_n


# ---------------------------------------------------------------------- work


def work_of(call: Call, target: Target) -> Work:
    """Scores of one head of a call that is not refused."""
    assert call.spans is not None
    batch, _, query_len, key_len = call.scores
    repeats = batch // call.spans.batch
    dense = batch * query_len * key_len
    visible = _visible(call.spans) * repeats
    if call.dense is not None and not call.dense.is_meta:
        seen = call.dense & call.spans.to_dense()[:, None]
        visible = int(seen.sum()) * dense // seen.numel()
    computed = sum(_computed(call, element, target) for element in range(call.spans.batch)) * repeats
    return Work(dense, visible, computed)


def _work_on_path(call: Call, mask: Mask, work: Work, target: Target) -> Work:
    """`work` is that of the first call with the mask; another head dim or a bias may be computed in other tiles."""
    same = path_of(call, target) == path_of(mask.call, target) and call.scores == mask.call.scores
    return work if same else work_of(call, target)


def _visible(spans: Spans) -> int:
    if spans.key_mask is None:
        return spans.visible_pairs()
    shape = (spans.batch, spans.query_len)
    counts = torch.nn.functional.pad(spans.key_mask.expand(spans.batch, -1).cumsum(1), (1, 0))
    start, end = spans.start.expand(shape).long(), spans.end.expand(shape).long()
    return int((counts.gather(1, torch.maximum(start, end)) - counts.gather(1, start)).sum())


def _computed(call: Call, element: int, target: Target) -> int:
    """Scores that are computed for one head of one element of the batch."""
    spans = element_of(call, element)
    if target.architecture is None:
        return sum(_area(piece) for piece in pieces_of(call, element))
    block_m, block_n = tile_of(call, target)
    first, last = tile_columns(spans, block_m, block_n)
    rows = torch.full_like(first, block_m)
    rows[-1:] = spans.query_len - block_m * (len(rows) - 1)
    # Of tiles that reach beyond the last row or key, what lies within: dense attention has no more.
    return int((rows * ((last * block_n).clamp(max=spans.key_len) - first * block_n)).sum())


def tile_columns(spans: Spans, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """For each tile of rows the first tile of keys that is computed, and one past the last."""
    bounds = spans.tile_bounds(block_m)
    first, last = bounds.first[0].long() // block_n, -(-bounds.last[0].long() // block_n)
    return first, torch.where(bounds.last[0] > bounds.first[0], last, first)


def pieces_of(call: Call, element: int) -> list[Piece]:
    """The pieces into which the torch path cuts one element of the batch."""
    spans = element_of(call, element)
    tiles_only = call.softcap is not None or call.dense is not None or call.bias is not None
    tiles_only = tiles_only or spans.key_mask is not None
    groups = plan_batch(spans.start, spans.end, 1, spans.query_len, tiles_only=tiles_only).in_tiles
    return [each for group in groups for piece in group.pieces for each in piece.each()]


def _area(piece: Piece) -> int:
    rows, keys = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
    return rows * (rows + 1) // 2 if piece.kind == "causal" else rows * keys


def element_of(call: Call, element: int) -> Spans:
    """The spans of one element of the batch."""
    spans = call.spans
    assert spans is not None
    start, end = (bound[element : element + 1] if len(bound) > 1 else bound for bound in (spans.start, spans.end))
    key_mask, gap_count = (
        part if part is None or len(part) == 1 else part[element : element + 1]
        for part in (spans.key_mask, spans.gap_count)
    )
    return replace(spans, start=start, end=end, key_mask=key_mask, gap_count=gap_count)


# ---------------------------------------------------------------------- equal layers, equal masks


def _shared_mask(call: Call, masks: list[Mask]) -> Mask:
    """The mask among `masks` that is that of a call; a new one is added."""
    for mask in masks:
        if mask.name == call.mask_name and _same_mask(mask.call, call):
            return mask
    number, letters = len(masks), ""
    while number >= 0:
        number, letters = number // 26 - 1, chr(ord("A") + number % 26) + letters
    masks.append(Mask(letters, call.mask_name, call))
    return masks[-1]


def _same_mask(one: Call, other: Call) -> bool:
    if one.scores[0] != other.scores[0] or one.scores[2:] != other.scores[2:]:
        return False
    if (one.dense is None) != (other.dense is None):
        return False
    assert one.spans is not None and other.spans is not None
    pairs = [(getattr(one.spans, name), getattr(other.spans, name)) for name in ("start", "end", "key_mask")]
    pairs += [] if one.dense is None or one.dense.is_meta else [(one.dense, other.dense)]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _numbered(name: str) -> tuple[str, int | None]:
    """A module's name with a star in place of its first number, and that number."""
    match = re.search(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", name)
    if match is None:
        return name, None
    return f"{name[: match.start()]}*{name[match.end() :]}", int(match.group())


def _ranges(numbers: list[int]) -> str:
    """Numbers in braces, neighbours as a range, and every n-th as such: `{0-4,6-10}`, `{5,11,...,23}`."""
    numbers = sorted(set(numbers))
    if len(numbers) == 1:
        return str(numbers[0])
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{{{numbers[0]},{numbers[1]},...,{numbers[-1]}}}"
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    ranges = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    return "{" + ",".join(ranges if len(ranges) <= 5 else [*ranges[:2], "...", ranges[-1]]) + "}"
