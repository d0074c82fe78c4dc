# SPDX-License-Identifier: Apache-2.0
"""Attention to pages, as engines keep their keys, plain and in float8: decoding, alone or beside a piece of a prompt.

A batch is one part, sequences with one new token each, or beside it a second one, the piece. Either is the same problem
as from contiguous memory, and is checked as that. No attention function of transformers takes pages, so here
implementations are called directly.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import import_utils

from attention_kernels import PagedCache, Spans, paged_attention
from attention_kernels.paged import causal_spans

from . import contest
from .cases import PIECE, Point
from .measure import Effort, Reference, Result, build_reference, check
from .problem import Problem, build_problem
from .providers import BASELINE, OURS, AttentionLayer
from .work import work_of

PAGE_SIZE = 16
FLASH_PAGE_SIZE = 256
"""FlashAttention 2 takes pages of a multiple of it."""

FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class PagedProblem:
    """A batch whose keys lie in shuffled pages.

    Attributes:
        parts: the same with keys and values in one piece; those are what the pages hold, once rounded.
        cache: the pages, of the sequences of all parts.
        query: `[batch, num_heads, 1, head_dim]`; of several parts `[1, num_heads, tokens, head_dim]`, the new tokens of
            all sequences one after the other.
        spans: which keys the queries see, found once as engines do for all layers of a step: small kernels that would
            take longer on a GPU than decoding over few keys. None on a CPU, which needs none.
        query_offsets: int32 `[sequences + 1]`, where the queries of each sequence begin; None for one part.
        max_query_len: the most queries of a sequence; None for one part.
    """

    parts: tuple[Problem, ...]
    cache: PagedCache
    query: Tensor
    spans: Spans | None
    query_offsets: Tensor | None
    max_query_len: int | None

    @property
    def description(self) -> str:
        """Those of the parts."""
        return " beside ".join(part.description for part in self.parts)

    @property
    def shape(self) -> dict[str, int]:
        """Sizes of the single tokens by name, and of the piece where there is one."""
        first, *pieces = (part.shape for part in self.parts)
        return first | {f"piece_{name}": piece[name] for piece in pieces for name in ("query_len", "key_len")}

    @cached_property
    def key_offsets(self) -> Tensor:
        """int32 `[sequences + 1]`, running sums of the sequences' lengths."""
        return pad(self.cache.seq_lens.cumsum(0), (1, 0)).to(torch.int32)

    @cached_property
    def layers(self) -> tuple[tuple[AttentionLayer, Tensor | None], ...]:
        """For each part what transformers' sdpa function takes beside its tensors, made once for all layers of a step.

        That is a layer and the mask of keys that were gathered from pages, where padding lies behind a sequence.
        """
        return tuple((AttentionLayer(part, BASELINE), mask_of_gathered(part)) for part in self.parts)

    def by_part(self, output: Tensor) -> list[Tensor]:
        """An output as each part's own `[batch, query_len, num_heads, value_dim]`.

        Of several parts it is `[1, tokens, num_heads, value_dim]`, of one its own already.
        """
        shapes = [(part.query.shape[0], part.query.shape[2]) for part in self.parts]
        split = output.flatten(0, 1).split([batch * query_len for batch, query_len in shapes])
        return [rows.unflatten(0, shape) for rows, shape in zip(split, shapes, strict=True)]


@dataclass(frozen=True)
class PagedProvider:
    """An implementation that reads pages; the attributes are those of `Provider`.

    `page_size` is a number of which pages must be multiples; where they are not, it is given others of that size.
    """

    name: str
    description: str
    run: Callable[[PagedProblem], Tensor]
    unavailable: Callable[[PagedProblem], str | None] = lambda problem: None
    page_size: int | None = None
    mask_name: None = None
    """None is built: lengths are in the cache."""

    def bind(self, problem: PagedProblem, mask: None) -> Callable[[], Tensor]:
        """A call without arguments; it returns an output as `PagedProblem.by_part` takes it."""
        if self.page_size is not None and problem.cache.page_size % self.page_size:
            problem = in_pages(problem.parts, self.page_size, problem.cache.key.dtype)
        return lambda: self.run(problem)


def run_ours(problem: PagedProblem) -> Tensor:
    """This project's kernel, which reads pages in place."""
    several = {"query_offsets": problem.query_offsets, "max_query_len": problem.max_query_len}
    return paged_attention(problem.query, problem.cache, problem.spans, **several).transpose(1, 2)


def run_gathered(problem: PagedProblem) -> Tensor:
    """sdpa over keys gathered from their pages and widened, as `paged|sdpa` of transformers does; a call for each part.

    Sequences of one part are padded to the longest of them.
    """
    cache, outputs = problem.cache, []
    tables = cache.block_table.split([part.key.shape[0] for part in problem.parts])
    for part, table, (layer, mask) in zip(problem.parts, tables, problem.layers, strict=True):
        pages, query = table[:, : part.key.shape[2] // cache.page_size].long(), part.query
        key = gather(cache.key, cache.key_scale, pages, query.dtype)
        value = gather(cache.value, cache.value_scale, pages, query.dtype)
        outputs.append(sdpa_attention_forward(layer, query, key, value, mask)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat([output.flatten(0, 1) for output in outputs])[None]


def gather(tensor: Tensor, scale: Tensor | None, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values `[batch, num_kv_heads, tokens, dim]` of the pages numbered by `pages`, int64 `[batch, number]`."""
    taken = tensor[pages].flatten(1, 2).to(dtype).transpose(1, 2)
    return taken if scale is None else taken * scale.to(dtype)


def run_flash(problem: PagedProblem) -> Tensor:
    """flash-attn's decoding function over a block table; of several parts, that for sequences one after the other."""
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    cache, query = problem.cache, problem.query.transpose(1, 2)
    if problem.query_offsets is None:
        lengths = {"cache_seqlens": cache.seq_lens, "block_table": cache.block_table}
        return flash_attn_with_kvcache(query, cache.key, cache.value, **lengths, causal=True)
    offsets = {"cu_seqlens_q": problem.query_offsets, "cu_seqlens_k": problem.key_offsets}
    longest = {"max_seqlen_q": problem.max_query_len, "max_seqlen_k": cache.key_len}
    options = {**offsets, **longest, "block_table": cache.block_table, "causal": True}
    return flash_attn_varlen_func(query[0], cache.key, cache.value, **options)[None]


def _no_flash(problem: PagedProblem) -> str | None:
    if problem.query.device.type != "cuda":
        return "FlashAttention runs on GPUs only"
    if not import_utils.is_flash_attn_2_available():
        return "FlashAttention 2 is not installed here"
    return "FlashAttention 2 has no quantised cache" if problem.cache.quantised else None


PROVIDERS = (
    PagedProvider(OURS, "this project, reading pages in place", run_ours),
    PagedProvider(BASELINE, "sdpa over keys gathered from their pages", run_gathered),
    PagedProvider(
        "flash_attention_2", "flash-attn's functions that take a block table", run_flash, _no_flash, FLASH_PAGE_SIZE
    ),
)


def in_pages(parts: Sequence[Problem], page_size: int, dtype: torch.dtype) -> PagedProblem:
    """Problems as one batch, its keys in shuffled pages; in a quantised dtype they are of the rounded keys."""
    device, query_dtype = parts[0].key.device, parts[0].query.dtype
    for part in parts:
        if part.key.shape[2] % page_size:
            key_len = part.key.shape[2]
            raise ValueError(f"the keys of a sequence must fill pages of {page_size} tokens, got {key_len} keys")
    pages = [part.key.shape[2] // page_size for part in parts]
    counts = [part.key.shape[0] * own for part, own in zip(parts, pages, strict=True)]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(3)).to(device).split(counts)
    one = torch.ones((), device=device)
    scales = {} if dtype == query_dtype else {"key_scale": one, "value_scale": one}

    def paged(tensors: Sequence[Tensor]) -> Tensor:
        _, num_kv_heads, _, columns = tensors[0].shape
        shuffled = torch.empty(sum(counts), page_size, num_kv_heads, columns, dtype=dtype, device=device)
        for part, tensor, places in zip(parts, tensors, order, strict=True):
            split = from_the_front(tensor.transpose(1, 2), part).to(dtype).reshape(-1, *shuffled.shape[1:])
            # float8 cannot be indexed everywhere; its bytes can.
            shuffled.view(torch.uint8)[places] = split.contiguous().view(torch.uint8)
        return shuffled

    tables = [places.view(-1, own) for places, own in zip(order, pages, strict=True)]
    cache = PagedCache(
        paged([part.key for part in parts]),
        paged([part.value for part in parts]),
        torch.cat([pad(table, (0, max(pages) - table.shape[1])) for table in tables]).to(torch.int32),
        torch.cat([part.real.sum(1) for part in parts]).to(torch.int32),
        **scales,
    )
    rounded = tuple(
        replace(part, **{name: getattr(part, name).to(dtype).to(query_dtype) for name in ("key", "value")})
        for part in parts
    )
    query, query_offsets, max_query_len = one_after_the_other(parts)
    spans = None if device.type == "cpu" else causal_spans(cache, query.shape[2], query_offsets)
    return PagedProblem(rounded, cache, query, spans, query_offsets, max_query_len)


def one_after_the_other(parts: Sequence[Problem]) -> tuple[Tensor, Tensor | None, int | None]:
    """The query of all parts, its offsets and the most rows of a sequence, as `PagedProblem` has them."""
    if len(parts) == 1:
        return parts[0].query, None, None
    rows = [part.query.shape[2] for part in parts for _ in range(part.query.shape[0])]
    offsets = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32, device=parts[0].query.device)
    tokens = torch.cat([part.query.transpose(1, 2).flatten(0, 1) for part in parts])
    return tokens[None].transpose(1, 2), offsets, max(rows)


def from_the_front(rows: Tensor, part: Problem) -> Tensor:
    """Keys or values `[batch, key_len, num_kv_heads, dim]` of a part with padding behind each sequence, as in pages."""
    if part.attention_mask is None:
        return rows
    order = part.real.long().argsort(dim=1, descending=True, stable=True)
    return rows[torch.arange(rows.shape[0], device=rows.device)[:, None], order]


def mask_of_gathered(part: Problem) -> Tensor | None:
    """The mask that transformers would give sdpa for keys that lie as `from_the_front` has them."""
    if part.attention_mask is None:
        return part.mask_builder(BASELINE)()
    # Of single tokens, each of which sees its whole sequence: `[batch, 1, 1, key_len]`.
    return from_the_front(part.real[..., None, None], part).permute(0, 2, 3, 1)


@torch.no_grad()
def run_point(
    point: Point,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
    effort: Effort,
    say: Callable[[str], None] = lambda text: None,
    providers: Sequence[PagedProvider] = PROVIDERS,
) -> list[Result]:
    """Check every implementation on a point in pages of `cache_dtype`, then time those that are right."""
    parts = [build_problem(point.case, point.sizes, dtype, device)]
    if point.piece is not None:
        parts.append(build_problem(PIECE, point.piece, dtype, device, seed=1))
    problem = in_pages(parts, PAGE_SIZE, cache_dtype)
    references = [build_reference(part) for part in problem.parts]
    kind = "pages" if cache_dtype == dtype else "pages fp8"
    work = reduce(operator.add, (work_of(part, cache_bytes=cache_dtype.itemsize) for part in problem.parts))
    results = contest.enter("kernels", problem, providers, work, f"{point.label} {kind}")

    def judge(run: Callable[[], Any], result: Result) -> bool:
        return check_parts(problem.by_part(run()), references, result)

    runs = contest.admit(problem, providers, results, judge, say, PagedProvider.bind)
    contest.take_turns(runs, results, device, effort, say)
    return results


def check_parts(outputs: Sequence[Tensor], references: Sequence[Reference], result: Result) -> bool:
    """As `check`, each part by a bound of its own: a wrong one might be lost beside another of larger numbers.

    Noted is what was found of the first part, or of the first that is wrong; of several parts also of each.
    """
    checked = [replace(result, details={}) for _ in references]
    right = [check(*each) for each in zip(outputs, references, checked, strict=True)]
    told = checked[0 if all(right) else right.index(False)]
    result.status, result.reason = told.status, told.reason
    result.details |= told.details
    if len(checked) > 1:
        result.details["parts"] = [part.details for part in checked]
    return all(right)
