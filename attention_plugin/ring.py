# SPDX-License-Identifier: Apache-2.0
"""Attention over a sequence that is sharded over the ranks of a process group.

Ring Attention (Liu et al., 2023): every rank keeps its queries, while keys and values travel round the ring of ranks;
each rank attends to the block that it holds while the next one is on its way, and merges the results by the
log-sum-exp. In the backward pass the blocks travel again, and with each block the gradients of its keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from attention_kernels import Spans, attention, merge_states
from attention_kernels.call_checks import DTYPES, cast_for_autocast
from attention_kernels.checks import check_sinks, check_tensors
from attention_kernels.spans import check_are_spans


@torch.compiler.disable
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None = None,
    *,
    group: distributed.ProcessGroup | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    check_shapes: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a sequence of which each rank holds one stretch, all of the same length, in the order of ranks.

    Every rank of the group calls it with tensors of the same shapes and the same other arguments, and, where one rank
    does, every rank runs the backward pass: ranks wait for each other. Equal to `attention` over the whole sequence,
    to rounding; partial results and gradients of keys and values are float32, and merged in an order that is always
    the same. A rank keeps its own shard and at most two blocks of others' keys and values, never the whole sequence.
    The backward pass computes each block's attention again. Outside of what `torch.compile` compiles.

    Args:
        query: `[batch, num_heads, shard_len, head_dim]`, this rank's rows: those of rank `r` are at positions
            `r * shard_len` to `(r + 1) * shard_len - 1`.
        key, value: `[batch, num_kv_heads, shard_len, dim]`, of the same positions.
        spans: the mask of the whole sequence, `shard_len * ranks` rows and keys, the same on every rank (memory
            O(tokens)): packed documents, padding, or any other; it takes the place of `causal`. Blocks of keys that a
            rank's rows do not see are not computed, and do not travel further than to the last rank that sees them.
            Spans on a GPU are read once for that, which is a synchronisation; they may also stay on the CPU.
        group: the ranks, default all. A group of one does not communicate.
        causal: without `spans`, whether rows see keys up to their own position, or all keys.
        sliding_window: without `spans`, the number of keys that a causal row sees, its own included.
        sinks: floating point `[num_heads]`, the same on every rank. Its gradient is that of this rank's rows: add it
            up over the ranks, as those of all parameters.
        scale, softcap: as for `attention`. Bias and dropout are not served.
        return_lse: also return the log-sum-exp of each row.
        check_shapes: compare the ranks' shapes first, so that a difference is an error on all ranks where it could
            otherwise be an endless wait. This is one more message, and on a GPU a synchronisation.

    Returns:
        Output `[batch, num_heads, shard_len, value_dim]` of this rank's rows and, with `return_lse`, their log-sum-exp
        over the keys of all ranks (sinks included), float32 (float64 for float64) `[batch, num_heads, shard_len]`.

    Raises:
        RuntimeError: torch.distributed is not initialised, or this process is not of the group.
        TypeError, ValueError: shards differ, the mask is for another length, or a rule of `attention` is broken.
    """
    ring = _ring(group)
    check_tensors("ring_attention", {"query": query, "key": key, "value": value})
    if spans is not None:
        check_are_spans("ring_attention", "spans", spans, "see Spans.from_dense")
    query, key, value = cast_for_autocast(query, key, value)
    if check_shapes and ring.world > 1:
        _compare_ranks(ring, query, key, value, spans, sinks)
    _check(ring, query, key, value, spans, sliding_window, causal, sinks)
    shard = query.shape[2]
    if spans is None:
        course = _sliding_course(ring.rank, ring.world, shard, causal, sliding_window, query.device)
    else:
        course = _course(spans, ring.rank, ring.world, shard, query.device)
    if ring.world == 1:
        output, lse = attention(
            query, key, value, course.blocks[0], sinks=sinks, scale=scale, softcap=softcap, return_lse=True
        )
    else:
        output, lse = _Ring.apply(query, key, value, sinks, ring, course, scale, softcap)
    return (output, lse) if return_lse else output


# ---------------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Transfer:
    """A block's keys and values, or their gradients, on the way to another rank, and those that come instead."""

    works: Sequence[distributed.Work]
    sent: tuple[Tensor, Tensor]
    """Kept until they have left."""
    received: tuple[Tensor, Tensor]

    def wait(self) -> tuple[Tensor, Tensor]:
        """What has come. On a GPU the stream waits, and not this process."""
        for work in self.works:
            work.wait()
        return self.received


class Ring(NamedTuple):
    """A process group and this process's place in it."""

    group: distributed.ProcessGroup | None
    rank: int
    world: int

    def owner(self, step: int) -> int:
        """The rank whose keys and values this one holds after so many steps."""
        return (self.rank - step) % self.world

    def start(self, pair: tuple[Tensor, Tensor], hops: int = 1) -> Transfer:
        """Begin to send two tensors to the rank so many places on, and to receive two from as many places back."""
        sent = pair[0].contiguous(), pair[1].contiguous()
        received = torch.empty_like(sent[0]), torch.empty_like(sent[1])
        to, source = (self.rank + hops) % self.world, (self.rank - hops) % self.world
        operations = [distributed.P2POp(distributed.isend, each, group=self.group, group_peer=to) for each in sent]
        operations += [
            distributed.P2POp(distributed.irecv, each, group=self.group, group_peer=source) for each in received
        ]
        return Transfer(distributed.batch_isend_irecv(operations), sent, received)


def _ring(group: distributed.ProcessGroup | None) -> Ring:
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "ring_attention: torch.distributed is not initialised; call torch.distributed.init_process_group first, as "
            "torchrun's processes do, or attention_kernels.attention in a single process"
        )
    rank = distributed.get_rank(group)
    if rank < 0:
        raise RuntimeError("ring_attention: this process is not a rank of `group`; call it on the group's ranks only")
    return Ring(group, rank, distributed.get_world_size(group))


def _compare_ranks(
    ring: Ring, query: Tensor, key: Tensor, value: Tensor, spans: Spans | None, sinks: Tensor | None
) -> None:
    """Raise on all ranks if they were not called alike. Nothing may raise before, or the other ranks would wait."""
    named = {"query": query, "key": key, "value": value}
    mine = [DTYPES.index(query.dtype) if query.dtype in DTYPES else -1, sinks is not None]
    mine += [-1, -1] if spans is None else [spans.query_len, spans.key_len]
    for tensor in named.values():
        mine += [tensor.requires_grad, *(list(tensor.shape) + [-1] * 4)[:4]]
    numbers = torch.tensor(mine, dtype=torch.int64, device=query.device)
    everyone = [torch.empty_like(numbers) for _ in range(ring.world)]
    distributed.all_gather(everyone, numbers, group=ring.group)
    ranks = torch.stack(everyone).tolist()
    differing = [rank for rank, theirs in enumerate(ranks) if theirs != ranks[0]]
    if differing:
        shapes = {name: [theirs[5 + 5 * index : 9 + 5 * index] for theirs in ranks] for index, name in enumerate(named)}
        raise ValueError(
            "ring_attention: all ranks must be given tensors of the same shapes, dtype and `requires_grad`, and spans "
            f"of one length, or none; ranks {differing} differ from rank 0. Shapes by rank: {shapes}. Pad the sequence "
            "to a multiple of the number of ranks, and hide the padding by `spans`"
        )


def _check(
    ring: Ring,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans | None,
    sliding_window: int | None,
    causal: bool,
    sinks: Tensor | None,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4 or tensor.shape[2] != query.shape[2]:
            raise ValueError(
                f"ring_attention: `{name}` must be [batch, heads, shard_len, dim] with the query's shard_len, got "
                f"{list(tensor.shape)} beside a query of {list(query.shape)}; queries that stand elsewhere than the "
                "keys (cross attention, a cache) need attention_kernels.attention"
            )
    length = query.shape[2] * ring.world
    if spans is not None and (spans.query_len, spans.key_len) != (length, length):
        raise ValueError(
            f"ring_attention: `spans` must be the mask of the whole sequence, {ring.world} shards of {query.shape[2]} "
            f"= {length} rows and keys, got {spans.query_len} rows and {spans.key_len} keys; build it for all ranks"
        )
    if sliding_window is not None and (spans is not None or not causal or sliding_window < 1):
        raise ValueError(
            f"ring_attention: `sliding_window` must be at least 1, and goes with causal=True and no `spans`, got "
            f"{sliding_window}; build other windows with Spans.sliding"
        )
    check_sinks("ring_attention", sinks, query)


# ---------------------------------------------------------------------- which blocks


class Course(NamedTuple):
    """What a rank does with each block of keys.

    Attributes:
        blocks: by the rank that owns the keys, how this rank's rows see them; None if they see none of them.
        steps: how many times blocks move on; all ranks agree on it.
    """

    blocks: tuple[Spans | None, ...]
    steps: int


@lru_cache(maxsize=8)
def _sliding_course(
    rank: int, world: int, shard: int, causal: bool, window: int | None, device: torch.device
) -> Course:
    """The course without spans, remembered since all layers of a model share one or two. Nothing is read from a GPU."""
    left = None if window is None else window - 1
    with torch.inference_mode(False):  # what is remembered there could not be saved for a backward pass later
        spans = Spans.sliding(world * shard, left=left, right=0 if causal else None)
        return _course(spans, rank, world, shard, device)


def _course(spans: Spans, rank: int, world: int, shard: int, device: torch.device) -> Course:
    """The course of a rank under the mask of the whole sequence, `[batch or 1, world * shard]` rows and keys."""
    if world == 1:
        return Course((spans.to(device),), 0)
    if shard == 0:
        return Course((None,) * world, 0)
    bounds = spans.tile_bounds(shard)  # keys that a rank's rows see lie between first and last, `[batch, world]`
    first_key = torch.arange(world, device=spans.device)[:, None, None] * shard
    sees = ((bounds.first < first_key + shard) & (bounds.last > first_key) & (bounds.last > bounds.first)).any(1)
    by_owner = sees.tolist()  # [owner][rank]
    steps = max(((r - o) % world for o in range(world) for r in range(world) if by_owner[o][r]), default=0)
    rows = slice(rank * shard, (rank + 1) * shard)
    blocks = (
        spans.cut(rows, slice(owner * shard, (owner + 1) * shard)).to(device) if by_owner[owner][rank] else None
        for owner in range(world)
    )
    return Course(tuple(blocks), steps)


# ---------------------------------------------------------------------- the two passes


class _Ring(torch.autograd.Function):
    """Two or more ranks. What is saved for the backward pass does not grow with their number."""

    @staticmethod
    def forward(ctx: Any, query, key, value, sinks, ring: Ring, course: Course, scale, softcap):
        output, lse = _initial_state(query, key, value, sinks)
        held = (key, value)
        for step in range(course.steps + 1):
            transfer = ring.start(held) if step < course.steps else None
            spans = course.blocks[ring.owner(step)]
            if spans is not None:
                part, part_lse = attention(query, *held, spans, scale=scale, softcap=softcap, return_lse=True)
                output, lse = merge_states((output, part.to(output.dtype)), (lse, part_lse))
            held = held if transfer is None else transfer.wait()
        # The output as it was before it is rounded to 16 bits: gradients of scores are differences of its products.
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.ring, ctx.course, ctx.scale, ctx.softcap = ring, course, scale, softcap
        return output.to(query.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor):
        query, key, value, sinks, output, lse = ctx.saved_tensors
        needs, dtypes = ctx.needs_input_grad, (query.dtype, key.dtype, value.dtype)
        whole = Whole(query, output, lse, grad_output.to(output.dtype), grad_lse, ctx.scale, ctx.softcap)
        gradients = _second_ring(ctx.ring, ctx.course, whole, key, value, needs[1] or needs[2])
        return (
            *(each.to(dtype) if need else None for each, dtype, need in zip(gradients, dtypes, needs[:3], strict=True)),
            whole.sink_gradient(sinks) if needs[3] else None,
            *[None] * 4,  # of the arguments that are no tensors
        )


def _second_ring(
    ring: Ring, course: Course, whole: Whole, key: Tensor, value: Tensor, wants_blocks: bool
) -> tuple[Tensor, ...]:
    """Gradients of this rank's query, key and value, those of key and value only where they are wanted."""
    grad_query = torch.zeros_like(whole.query, dtype=whole.output.dtype)
    held = (key, value)
    coming: Transfer | None = None  # gradients of the next block, from the ranks that have held it
    for step in range(course.steps + 1):
        last = step == course.steps
        transfer = None if last else ring.start(held)
        spans = course.blocks[ring.owner(step)]
        if spans is None:
            grad_key, grad_value = (torch.zeros_like(each, dtype=whole.output.dtype) for each in held)
        else:
            grad_part, grad_key, grad_value = whole.share(*held, spans)
            grad_query += grad_part
        if coming is not None:
            for total, others in zip((grad_key, grad_value), coming.wait(), strict=True):
                total += others
        if wants_blocks and course.steps:
            # On with the block, or home to its owner.
            coming = ring.start((grad_key, grad_value), -course.steps if last else 1)
        held = held if transfer is None else transfer.wait()
    return grad_query, *((grad_key, grad_value) if coming is None else coming.wait())


def _initial_state(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp before any key is seen. A sink is a score without a value, and so a state by itself."""
    batch, (num_heads, shard) = max(query.shape[0], key.shape[0], value.shape[0]), query.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    output = query.new_zeros(batch, shard, num_heads, value.shape[-1], dtype=wide).transpose(1, 2)
    lse = query.new_full((batch, num_heads, shard), -math.inf, dtype=wide)
    return output, lse if sinks is None else lse.copy_(sinks[:, None])


@dataclass(frozen=True)
class Whole:
    """This rank's rows and what they came to over the keys of all ranks; tensors but `query` are float32 or wider."""

    query: Tensor
    output: Tensor
    lse: Tensor
    grad_output: Tensor
    grad_lse: Tensor
    scale: float | None
    softcap: float | None

    def share(self, key: Tensor, value: Tensor, spans: Spans) -> tuple[Tensor, ...]:
        """A block's share of the gradients of query, key and value, in the dtype of `output`.

        The whole is a mean of the blocks' outputs with weights `exp(block's lse - lse)`. So a block's output has as its
        gradient the weight's part of that of the whole and, since the weights depend on it, so has its log-sum-exp.
        """
        # In the dtype of the forward pass, whatever autocast the backward pass is called under.
        with torch.enable_grad(), torch.autocast(self.query.device.type, enabled=False):
            query, key, value = (each.detach().requires_grad_() for each in (self.query, key, value))
            part, part_lse = attention(
                query, key, value, spans, scale=self.scale, softcap=self.softcap, return_lse=True
            )
        weight = self.weight(part_lse.detach())
        # The difference first: where one block has all the weight it is exactly 0.
        difference = (self.grad_output * (part.detach() - self.output)).sum(-1)
        grad_part = (weight[..., None] * self.grad_output).to(part.dtype)
        # What comes back for a row that sees nothing may be NaN, which 0 would not stop.
        grad_part_lse = (weight * (difference + self.grad_lse)).masked_fill(weight == 0, 0.0)
        gradients = torch.autograd.grad((part, part_lse), (query, key, value), (grad_part, grad_part_lse))
        return tuple(gradient.to(self.output.dtype) for gradient in gradients)

    def sink_gradient(self, sinks: Tensor) -> Tensor:
        """The sinks' gradient from this rank's rows: the share of a state whose output is 0."""
        weight = self.weight(sinks.to(self.lse.dtype)[:, None].expand(self.lse.shape))
        return (weight * (self.grad_lse - (self.grad_output * self.output).sum(-1))).sum((0, 2)).to(sinks.dtype)

    def weight(self, lse: Tensor) -> Tensor:
        """The weight of a state with the given log-sum-exp; 0 in rows that see nothing."""
        return torch.exp(lse - self.lse.masked_fill(self.lse == -math.inf, 0.0))
