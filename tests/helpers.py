# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the device, the one error bound, and random attention problems."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from attention_kernels import Spans, attention, attention_reference, tuned
from attention_kernels.config_tables import CONFIGS
from attention_kernels.configs import architecture
from attention_kernels.paths import interpreting
from attention_kernels.reference import error_bound

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
"""A GPU runs the Triton kernels; a CPU runs the torch path, or the kernels where TRITON_INTERPRET=1."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

SLOW_IN_INTERPRETER = pytest.mark.exhaustive if interpreting() else ()
"""Mark of tests that the interpreter takes long for; torch and GPUs run them in `make test`."""

KERNEL_DTYPES = (torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=SLOW_IN_INTERPRETER))
"""Those that have kernels of their own, for tests of many sizes: the interpreter computes bfloat16 by float32's."""

EARLIER_TRANSFORMERS = Version(transformers.__version__) < Version("5.23")
"""Whether transformers is earlier than the pinned one. The tests pass with 5.17 too, the oldest that is served."""

EARLIER_THAN_5_24 = Version(transformers.__version__) < Version("5.24")
"""Whether transformers is earlier than the release that calls every cache `cache`, which layers alone write to."""

GRADIENTS = ("query", "key", "value", "bias", "sinks")


def assert_within_bound(actual: Tensor, eager: Tensor, exact: Tensor, what: str = "output") -> None:
    """The project's error bound, `reference.error_bound`: at most twice the error of eager attention in the same dtype.

    Args:
        actual: what is tested; its dtype is the one that eager ran in.
        eager: the same from dense attention with every intermediate in that dtype.
        exact: the same in float64.
    """
    dtype = actual.dtype
    actual, eager, exact = (tensor.detach().to("cpu", torch.float64) for tensor in (actual, eager, exact))
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{what}: NaN or Inf elsewhere than in the reference"
    error, eager_error = float((actual - exact)[finite].norm()), float((eager - exact)[finite].norm())
    size = float(exact[finite].norm())
    assert error <= error_bound(eager_error, size, dtype), (
        f"{what}: error {error:.2e}, eager's {eager_error:.2e}, norm {size:.2e}"
    )


def assert_gradients_within_bound(problem: Problem, wanted: Sequence[str] = GRADIENTS) -> None:
    """Each gradient of a random weighting of the output within the error bound, against float64.

    Terms as large as the problem's largest gradient may cancel to almost nothing: a query that sees one key has none, a
    sink's is one number, that of a bias for all scores is 0. There either side's error is chance. So the floor is that
    of outputs plus one unit in the last place of float32, in which statistics are, of the largest gradient. Four for
    what has cancelled, since one is about the deviation of that chance, and for 16-bit problems, where the two numbers
    that cancel are sums in different orders (a thousandth of a unit of their own dtype).
    """
    inputs = {name: getattr(problem, name) for name in wanted}
    inputs = {name: tensor.detach() for name, tensor in inputs.items() if tensor is not None}

    def gradients(dtype: torch.dtype | None, run: Callable[[Problem], Tensor]) -> tuple[Tensor, ...]:
        leaves = {name: tensor.to(dtype or tensor.dtype).requires_grad_() for name, tensor in inputs.items()}
        output = run(replace(problem, **leaves))
        return torch.autograd.grad(output, leaves.values(), grad.to(output.dtype))

    dtype = problem.query.dtype
    grad = torch.randn_like(problem.run()[0])
    actual = gradients(None, lambda leaf_problem: leaf_problem.run()[0])
    eager = gradients(None, lambda leaf_problem: leaf_problem.reference(dtype)[0])
    # float64 leaves, too: a gradient arrives in the dtype of its leaf.
    exact = gradients(torch.float64, lambda leaf_problem: leaf_problem.reference(torch.float64)[0])
    largest = max(float(gradient.double().norm()) for gradient in exact)
    for name, ours, plain, truth in zip(inputs, actual, eager, exact, strict=True):
        assert ours.dtype == inputs[name].dtype
        assert ours.shape == truth.shape
        error, eager_error = (float((each.double() - truth.double()).norm()) for each in (ours, plain))
        size = float(truth.double().norm())
        units = 1 if dtype == torch.float32 and size > 1e-3 * largest else 4
        chance = units * torch.finfo(torch.float32).eps * largest
        assert error <= error_bound(eager_error, size, ours.dtype) + chance, (
            f"gradient of {name}: error {error:.2e}, eager's {eager_error:.2e}, norm {size:.2e} of {largest:.2e}"
        )


@dataclass
class Problem:
    """One call of `attention`, with its mask also stated densely."""

    query: Tensor
    key: Tensor
    value: Tensor
    spans: Spans
    mask: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None

    def run(self) -> tuple[Tensor, Tensor]:
        return attention(
            self.query, self.key, self.value, self.spans, mask=self.mask, bias=self.bias, sinks=self.sinks,
            scale=self.scale, softcap=self.softcap, return_lse=True,
        )  # fmt: skip

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mask = self.spans.to_dense()[:, None]
        if self.mask is not None:
            mask = mask & self.mask
        return attention_reference(
            self.query, self.key, self.value, mask=mask, bias=self.bias, sinks=self.sinks, scale=self.scale,
            softcap=self.softcap, dtype=dtype,
        )  # fmt: skip

    def check(self) -> None:
        """Output within the error bound, and log-sum-exp, against float64."""
        output, lse = self.run()
        exact, exact_lse = self.reference(torch.float64)
        eager, _ = self.reference(self.query.dtype)
        assert output.dtype == self.query.dtype
        assert output.transpose(1, 2).is_contiguous()
        assert_within_bound(output, eager, exact)
        # Statistics are float32; torch's fused attention computes exp less exactly for 16-bit inputs.
        tolerance = 2e-5 if self.query.dtype == torch.float32 else 1e-4
        torch.testing.assert_close(lse.cpu().double(), exact_lse.cpu(), rtol=tolerance, atol=tolerance)


@contextmanager
def forward_rows(**changes: bool | int) -> Iterator[None]:
    """Tile shapes of all rows of the forward kernel, changed."""
    device = torch.empty(0, device=DEVICE).device
    with ExitStack() as stack:
        for key, config in CONFIGS[architecture(device)].items():
            stack.enter_context(tuned.overriding(device, ("forward", *key), config._replace(**changes)))
        yield


def tensor(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "heads") -> Tensor:
    """Random `[batch, heads, tokens, dim]` tensor in one of the layouts that models hand in."""
    batch, heads, tokens, dim = shape
    if layout == "heads":
        return torch.randn(shape, device=DEVICE).to(dtype)
    if layout == "tokens":  # as projections leave it
        return torch.randn(batch, tokens, heads, dim, device=DEVICE).to(dtype).transpose(1, 2)
    if layout == "columns":  # dim is not the fastest
        return torch.randn(batch, heads, dim, tokens, device=DEVICE).to(dtype).transpose(2, 3)
    # part of a fused projection: every other column of a larger tensor
    return torch.randn(batch, tokens, heads, 2 * dim + 3, device=DEVICE).to(dtype)[..., 1 : 2 * dim : 2].transpose(1, 2)


LAYOUTS = ("heads", "tokens", "columns", "slices")


def random_spans(draw: random.Random, batch: int, query_len: int, key_len: int) -> Spans:
    """One of the patterns that models use, or rows that see arbitrary runs, possibly none."""
    kind = draw.choice(
        ["full", "causal", "empty cache", "sliding", "chunked", "left", "right", "holes", "any", "packed"]
    )
    lengths = {"query_len": query_len, "key_len": key_len, "device": DEVICE}
    causal = Spans.causal(**lengths)
    index = torch.arange(key_len, device=DEVICE)[None]
    pads = torch.randint(0, key_len + 1, (batch, 1), device=DEVICE)
    if kind == "causal":
        return causal
    if kind == "empty cache":
        return Spans.causal(**lengths, offset=draw.randint(-3, 3))
    if kind == "sliding":
        return Spans.sliding(**lengths, left=draw.choice([None, 0, 3, 40]), right=draw.choice([None, 0, 7]))
    if kind == "chunked":
        return causal & Spans.chunked(**lengths, chunk_size=draw.choice([1, 5, 33]), first=pads[:, 0])
    if kind == "left":
        return causal & Spans.padded(index >= pads, query_len)
    if kind == "right":
        return causal & Spans.padded(index < pads, query_len)
    if kind == "holes":
        return causal & Spans.padded(torch.rand(batch, key_len, device=DEVICE) > 0.3, query_len)
    if kind == "any":
        bounds = torch.randint(0, key_len + 1, (2, batch, query_len), device=DEVICE, dtype=torch.int32)
        return Spans(bounds[0], bounds[1], query_len, key_len)
    if kind == "packed" and query_len == key_len:
        return causal & Spans.packed(torch.randint(0, 9, (batch, key_len), device=DEVICE).sort(1).values // 2)
    return Spans.full(**lengths)


def random_problem(seed: int) -> Problem:
    """A problem that crosses features, sizes, dtypes and layouts at random."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice(DTYPES)
    batch, num_kv_heads, group_size = draw.randint(1, 2), draw.randint(1, 2), draw.choice([1, 1, 2, 3, 5])
    num_heads = num_kv_heads * group_size
    query_len = draw.choice([1, 2, 5, 16, 17, 33, 64, 70, 129])
    key_len = draw.choice([query_len, query_len, 1, 7, 31, 64, 100, 131])
    head_dim = draw.choice([1, 3, 8, 15, 16, 24, 36, 64, 72, 80, 96, 128])
    value_dim = head_dim if draw.random() < 0.7 else draw.choice([1, 5, 16, 40, 128])
    scores = (batch, num_heads, query_len, key_len)

    def broadcast_shape() -> list[int]:
        return [size if draw.random() < 0.6 else 1 for size in scores]

    bias = None
    if draw.random() < 0.3:
        bias = torch.randn(broadcast_shape(), device=DEVICE).to(draw.choice([dtype, torch.float32]))
        bias[torch.rand_like(bias, dtype=torch.float32) < 0.1] = draw.choice([float("-inf"), 2.0])
    return Problem(
        query=tensor(batch, num_heads, query_len, head_dim, dtype=dtype, layout=draw.choice(LAYOUTS)),
        key=tensor(batch, num_kv_heads, key_len, head_dim, dtype=dtype, layout=draw.choice(LAYOUTS)),
        value=tensor(batch, num_kv_heads, key_len, value_dim, dtype=dtype, layout=draw.choice(LAYOUTS)),
        spans=random_spans(draw, batch, query_len, key_len),
        mask=torch.rand(broadcast_shape(), device=DEVICE) > 0.2 if draw.random() < 0.3 else None,
        bias=bias,
        sinks=torch.randn(num_heads, 2, device=DEVICE)[:, 1] if draw.random() < 0.3 else None,
        scale=draw.choice([None, 0.3, 1.0, -0.4]),
        softcap=draw.choice([None, None, 1.5, 30.0]),
    )
