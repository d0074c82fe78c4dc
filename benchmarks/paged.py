# SPDX-License-Identifier: Apache-2.0
"""Decoding from pages, as engines keep their keys: the same problems as from contiguous memory, plain and in float8.

No attention function of transformers takes pages, so here implementations are called directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import import_utils

from attention_kernels import PagedCache, Spans, paged_attention
from attention_kernels.paged import causal_spans

from . import contest
from .cases import Point
from .measure import Effort, Result, build_reference, check
from .problem import Problem, build_problem
from .providers import BASELINE, OURS
from .work import work_of

PAGE_SIZE = 16
FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class PagedProblem:
    """A decoding problem whose keys lie in shuffled pages.

    Attributes:
        problem: the same with keys and values in one piece; those are what the pages hold, once rounded.
        cache: the pages.
        spans: which keys the queries see, found once as engines do for all layers of a step: small kernels that would
            take longer on a GPU than decoding over few keys. None on a CPU, which needs none.
    """

    problem: Problem
    cache: PagedCache
    spans: Spans | None

    @property
    def query(self) -> Tensor:
        """`[batch, num_heads, 1, head_dim]`."""
        return self.problem.query


@dataclass(frozen=True)
class PagedProvider:
    """An implementation that decodes from pages; the attributes are those of `Provider`."""

    name: str
    description: str
    run: Callable[[PagedProblem], Tensor]
    unavailable: Callable[[PagedProblem], str | None] = lambda problem: None
    mask_name: None = None
    """None is built: lengths are in the cache."""

    def bind(self, problem: PagedProblem, mask: None) -> Callable[[], Tensor]:
        """A call without arguments; it returns `[batch, 1, num_heads, head_dim]`."""
        return lambda: self.run(problem)


def run_ours(problem: PagedProblem) -> Tensor:
    """This project's kernel, which reads pages in place."""
    return paged_attention(problem.query, problem.cache, problem.spans).transpose(1, 2)


def run_gathered(problem: PagedProblem) -> Tensor:
    """sdpa over keys gathered from their pages and widened, as `paged|sdpa` of transformers does."""
    cache, query = problem.cache, problem.query

    def rows(tensor: Tensor, scale: Tensor | None) -> Tensor:
        taken = tensor[cache.block_table.long()].flatten(1, 2).to(query.dtype).transpose(1, 2)
        return taken if scale is None else taken * scale.to(query.dtype)

    key, value = rows(cache.key, cache.key_scale), rows(cache.value, cache.value_scale)
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]}
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, **grouped).transpose(1, 2)


def run_flash(problem: PagedProblem) -> Tensor:
    """flash-attn's decoding function over a block table."""
    from flash_attn import flash_attn_with_kvcache

    cache, query = problem.cache, problem.query.transpose(1, 2)
    lengths = {"cache_seqlens": cache.seq_lens, "block_table": cache.block_table}
    return flash_attn_with_kvcache(query, cache.key, cache.value, **lengths, causal=True)


def _no_flash(problem: PagedProblem) -> str | None:
    if problem.query.device.type != "cuda":
        return "FlashAttention runs on GPUs only"
    if not import_utils.is_flash_attn_2_available():
        return "FlashAttention 2 is not installed here"
    if problem.cache.quantised:
        return "FlashAttention 2 has no quantised cache"
    return "FlashAttention 2 takes pages of a multiple of 256 tokens" if problem.cache.page_size % 256 else None


PROVIDERS = (
    PagedProvider(OURS, "this project, reading pages in place", run_ours),
    PagedProvider(BASELINE, "sdpa over keys gathered from their pages", run_gathered),
    PagedProvider("flash_attention_2", "flash-attn's flash_attn_with_kvcache", run_flash, _no_flash),
)


def in_pages(problem: Problem, page_size: int, dtype: torch.dtype) -> PagedProblem:
    """The problem with its keys in pages, in shuffled order; in a quantised dtype it is of the rounded keys."""
    batch, num_kv_heads, key_len, _ = problem.key.shape
    pages = key_len // page_size
    if key_len % page_size:
        raise ValueError(f"the keys of a sequence must fill pages of {page_size} tokens, got {key_len} keys")
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(batch * pages, generator=generator).to(problem.key.device)
    one = torch.ones((), device=problem.key.device)
    scales = {} if dtype == problem.key.dtype else {"key_scale": one, "value_scale": one}

    def paged(tensor: Tensor) -> Tensor:
        split = tensor.to(dtype).transpose(1, 2).reshape(batch * pages, page_size, num_kv_heads, tensor.shape[3])
        # float8 cannot be indexed everywhere; its bytes can.
        shuffled = torch.empty_like(split).view(torch.uint8)
        shuffled[order] = split.contiguous().view(torch.uint8)
        return shuffled.view(dtype)

    cache = PagedCache(
        paged(problem.key),
        paged(problem.value),
        order.view(batch, pages).to(torch.int32),
        torch.full((batch,), key_len, dtype=torch.int32, device=problem.key.device),
        **scales,
    )
    rounded = {name: getattr(problem, name).to(dtype).to(problem.query.dtype) for name in ("key", "value")}
    spans = None if cache.key.device.type == "cpu" else causal_spans(cache, problem.query.shape[2], None)
    return PagedProblem(replace(problem, **rounded), cache, spans)


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
    """Check every implementation on a decoding problem in pages of `cache_dtype`, then time those that are right."""
    whole = build_problem(point.case, point.sizes, dtype, device)
    problem = in_pages(whole, PAGE_SIZE, cache_dtype)
    reference = build_reference(problem.problem)
    kind = "pages" if cache_dtype == dtype else "pages fp8"
    work = work_of(problem.problem, cache_bytes=cache_dtype.itemsize)
    results = contest.enter("kernels", problem.problem, providers, work, f"{point.label} {kind}")

    def judge(run: Callable[[], Any], result: Result) -> bool:
        return check(run(), reference, result)

    runs = contest.admit(problem, providers, results, judge, say, PagedProvider.bind)
    contest.take_turns(runs, results, device, effort, say)
    return results
