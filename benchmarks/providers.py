# SPDX-License-Identifier: Apache-2.0
"""Who is measured: attention functions with the signature of transformers' `AttentionInterface`.

What is timed is therefore what a model would run, down to the repetition of heads and the transposed output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as eager_with_softcap
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as eager_with_sinks
from transformers.models.gpt_oss.modeling_gpt_oss import repeat_kv
from transformers.models.t5 import modeling_t5
from transformers.utils import import_utils

import attention_plugin
from attention_kernels import Spans, hopper
from attention_kernels.arguments import arguments_of

from .problem import Problem

AttentionFunction = Callable[..., tuple[Tensor, Any]]


class AttentionLayer(torch.nn.Module):
    """What an attention function asks of the module that calls it."""

    def __init__(self, problem: Problem, implementation: str) -> None:
        super().__init__()
        self.config = problem.config(implementation)
        self.num_key_value_groups = problem.query.shape[1] // problem.key.shape[1]
        self.head_dim = problem.query.shape[3]
        self.is_causal = problem.case.causal
        self.layer_idx = 0
        self.sinks = problem.sinks
        # Some functions choose another kernel for training.
        self.train(problem.query.requires_grad)


@dataclass(frozen=True)
class Provider:
    """An attention implementation.

    Attributes:
        name: how tables and JSON call it.
        description: for a reader.
        mask_name: the registered implementation whose mask function builds its mask.
        forward: the AttentionInterface function.
        unavailable: why it cannot run a problem, in words, or None. Whatever an implementation refuses by itself need
            not be repeated here: its own error becomes the reason.
        compiles: whether its first call of a kind takes seconds.
    """

    name: str
    description: str
    mask_name: str
    forward: AttentionFunction
    unavailable: Callable[[Problem], str | None] = lambda problem: None
    compiles: bool = False

    def bind(self, problem: Problem, mask: Any) -> Callable[[], Tensor]:
        """A call without arguments that runs the problem; it returns `[batch, query_len, num_heads, head_dim]`."""
        keywords: dict[str, Any] = {"position_ids": problem.position_ids, "sliding_window": problem.window}
        if problem.sinks is not None:
            keywords["s_aux"] = problem.sinks
        if problem.case.softcap is not None:
            keywords["softcap"] = problem.case.softcap
        if problem.bias is not None:
            keywords["position_bias"] = problem.bias
        layer = AttentionLayer(problem, self.mask_name)
        scaling = problem.query.shape[3] ** -0.5
        return lambda: self.forward(
            layer, problem.query, problem.key, problem.value, mask, scaling=scaling, dropout=0.0, **keywords
        )[0]


def eager_attention(module: AttentionLayer, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """The eager function of the model that a problem is taken from: GPT-OSS for sinks, T5 for a bias, else Gemma 2."""
    if "position_bias" in keywords:
        return eager_with_bias(module, *arguments, **keywords)
    forward = eager_with_softcap if module.sinks is None else eager_with_sinks
    return forward(module, *arguments, **keywords)


def eager_with_bias(
    module: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """T5's eager function, which has no grouped heads, after keys and values are repeated as other models do."""
    key, value = (repeat_kv(each, module.num_key_value_groups) for each in (key, value))
    return modeling_t5.eager_attention_forward(module, query, key, value, *arguments, **keywords)


def sdpa_with(backend: SDPBackend, *arguments: Any, **keywords: Any) -> tuple[Tensor, Any]:
    """transformers' sdpa function with one of torch's back ends forced."""
    with sdpa_kernel(backend):
        return sdpa_attention_forward(*arguments, **keywords)


def tutorial_attention(
    module: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """The kernel of Triton's tutorial as the flash-attn package ships it, called as its documentation says."""
    from flash_attn.flash_attn_triton import flash_attn_func

    key, value = (repeat_kv(each, module.num_key_value_groups) for each in (key, value))
    tensors = [each.transpose(1, 2).contiguous() for each in (query, key, value)]
    return flash_attn_func(*tensors, None, module.is_causal and query.shape[2] > 1, scaling), None


def gluon_attention(*arguments: Any, **keywords: Any) -> tuple[Tensor, Any]:
    """Our function with the Gluon kernel for Hopper, which is off until it is proven, switched on."""
    before = hopper.wanted()
    hopper.enable()
    try:
        return attention_plugin.attention_forward(*arguments, **keywords)
    finally:
        hopper.enable(before)


def _no_gluon(problem: Problem) -> str | None:
    if problem.query.device.type != "cuda":
        return "the Gluon kernel runs on Hopper GPUs only"
    from attention_kernels.hopper import launching

    spans = Spans.full(problem.query.shape[2], problem.key.shape[2])  # any are served
    return launching.unserved(
        arguments_of(problem.query, problem.key, problem.value, spans, bias=problem.bias, softcap=problem.case.softcap)
    )


def _no_tutorial(problem: Problem) -> str | None:
    if problem.query.device.type != "cuda":
        return "the Triton tutorial's kernel runs on GPUs only"
    if find_spec("flash_attn") is None or find_spec("flash_attn.flash_attn_triton") is None:
        return "the Triton tutorial's kernel is not installed here; flash-attn 2 has it"
    case = problem.case
    options = (case.windowed, case.packed, case.images, case.sinks, case.softcap, case.bias, not problem.real.all())
    if any(options) or problem.query.shape[3] != problem.value.shape[3]:
        return "the Triton tutorial's kernel knows plain and causal attention only"
    return None


def _no_bias(forward: AttentionFunction, problem: Problem) -> str | None:
    # Without the keyword by name it would be swallowed by **kwargs: a wrong result, and no fault of the kernel.
    if problem.bias is not None and "position_bias" not in inspect.signature(forward).parameters:
        return "this function of transformers takes no position bias"
    return None


def _no_sdpa(problem: Problem) -> str | None:
    if problem.sinks is not None:
        return "sdpa cannot express attention sinks; transformers runs such models without it"
    if problem.case.softcap is not None:
        return "sdpa cannot express a softcap; transformers runs such models without it"
    return _no_bias(sdpa_attention_forward, problem)


def _no_sdpa_backend(backend: str, device_types: tuple[str, ...], problem: Problem) -> str | None:
    if problem.query.device.type not in device_types:
        return f"torch has no {backend} back end of sdpa on this device"
    return _no_sdpa(problem)


def _no_flash_attention(version: int, problem: Problem) -> str | None:
    if problem.query.device.type != "cuda":
        return "FlashAttention runs on GPUs only"
    if not getattr(import_utils, f"is_flash_attn_{version}_available", lambda: False)():
        return f"FlashAttention {version} is not installed here (or this transformers does not know it)"
    if problem.query.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention {version} takes float16 and bfloat16 only"
    return _no_bias(flash_attention_forward, problem)


def _sdpa_provider(backend: str, *device_types: str) -> Provider:
    forced = getattr(SDPBackend, f"{backend.upper()}_ATTENTION", SDPBackend.MATH)
    return Provider(
        f"sdpa_{backend}",
        f"sdpa with torch's {backend} back end forced",
        "sdpa",
        partial(sdpa_with, forced),
        partial(_no_sdpa_backend, backend, device_types),
    )


def _flash_provider(version: int) -> Provider:
    name = f"flash_attention_{version}"
    description = f"flash-attn, generation {version}, as transformers calls it: unpadding and padding on the clock"
    return Provider(name, description, name, flash_attention_forward, partial(_no_flash_attention, version))


OURS = attention_plugin.NAME
GLUON = f"{OURS}_gluon"
OWN = (OURS, GLUON)
"""This project's: where they raise or are wrong a run has failed."""

BASELINE = "sdpa"
FALLBACK_BASELINE = "eager"
"""What ratios are relative to where the baseline cannot run a case."""

PROVIDERS = (
    Provider(OURS, "this project", OURS, attention_plugin.attention_forward),
    Provider(GLUON, "the same with the Gluon kernel for Hopper switched on", OURS, gluon_attention, _no_gluon),
    Provider(BASELINE, "torch's fused attention as transformers calls it", "sdpa", sdpa_attention_forward, _no_sdpa),
    _sdpa_provider("flash", "cpu", "cuda"),
    _sdpa_provider("cudnn", "cuda"),
    _sdpa_provider("efficient", "cuda"),
    _sdpa_provider("math", "cpu", "cuda"),
    Provider(
        FALLBACK_BASELINE, "matrix products and a softmax, as transformers' models write it", "eager", eager_attention
    ),
    Provider(
        "flex_attention",
        "torch's compiled flex attention as transformers calls it",
        "flex_attention",
        flex_attention_forward,
        partial(_no_bias, flex_attention_forward),
        compiles=True,
    ),
    _flash_provider(2),
    _flash_provider(3),
    _flash_provider(4),
    Provider(
        "triton_tutorial",
        "the kernel of Triton's tutorial, as the flash-attn package ships it",
        "flash_attention_2",
        tutorial_attention,
        _no_tutorial,
    ),
)
SLOW = (FALLBACK_BASELINE, "sdpa_math")
"""Those that write all scores to memory; sweeps over long rows leave them out."""

ON_REQUEST = (GLUON,)
"""Those that run only where `--against` names them: no GPU has run the Gluon kernel yet, nor may it stop the others."""
