# SPDX-License-Identifier: Apache-2.0
"""Tiny models of transformers' causal language model types: `my_triton` equals eager on every kind of run."""

import contextlib
import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AttentionInterface, DynamicCache, StaticCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import attention_plugin  # noqa: F401  (importing it registers "my_triton")
from model.modeling_reference import CACHE

from helpers import EARLIER_THAN_5_24, EARLIER_TRANSFORMERS, SLOW_IN_INTERPRETER
from tiny_models import SLIDING_WINDOW, VOCAB_SIZE, WINDOWS, build

IMPLEMENTATION = "my_triton"
TOLERANCE = 2e-4
# A wrong mask must move the result by far more than the tolerance, or the comparison could not fail.
VISIBLE = 1e-2

# Every run of these is compared with eager.
MODEL_TYPES = """
    afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba bart beam bert bert-generation
    bigbird_pegasus biogpt bitnet blenderbot blenderbot-small camembert codegen cohere cohere2 cohere2_moe
    cohere_compass_text ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dory
    dots1 dots3_note_text electra ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_h1 flex_olmo flint gemma
    gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt-sw3
    gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_loop_text
    inkling2_text inkling_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2
    lfm2_moe lfm3 llama llama4_text longcat_flash marian mbart mellum mimo_v2_flash minicpm3 minimax minimax_m2
    minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder moshi nanochat nemotron nemotron_h olmo
    olmo2 olmo3 olmo_hybrid olmoe opt pegasus persimmon phi phi3 phimoe plbart qwen2 qwen2_moe qwen3 qwen3_5_moe_text
    qwen3_5_text qwen3_moe qwen3_next recurrent_gemma roberta roberta-prelayernorm roc_bert sarvam_mla sarvam_moe
    seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma whisper xlm-roberta xlm-roberta-xl xmod youtu zamba
    zamba2 zaya
""".split()

COMPUTES_ATTENTION_ITSELF = "computes attention itself and never asks for an attention implementation"
NO_ATTENTION = "state-space or recurrent layers only: there is no attention to replace"
WRAPPER = "multimodal wrapper that needs sub-configs of its own; text models are tested under their own types"
DRAFT = "draft model: reads the hidden states and the cache of another model and cannot run alone"
SKIPPED = {
    **dict.fromkeys(
        """
        big_bird bloom cpmant falcon gpt_neo gpt_neox_japanese megatron-bert mpt mvp openai-gpt prophetnet reformer
        rembert roformer trocr xglm xlm xlnet
        """.split(),
        COMPUTES_ATTENTION_ITSELF,
    ),
    **dict.fromkeys("falcon_mamba mamba mamba2 rwkv xlstm".split(), NO_ATTENTION),
    **dict.fromkeys(
        """
        dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified got_ocr2 llama4 mllama moss_transcribe_diarize
        phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp
        """.split(),
        WRAPPER,
    ),
    **dict.fromkeys("gemma4_assistant gemma4_unified_assistant".split(), DRAFT),
    "blt": "byte-latent: five models in one, cut into patches by an entropy model with weights of its own",
    "qwen4_exp_text": "its configuration has no default sizes for its indexer",
    "git": "its text decoder computes attention itself; only its vision tower asks for an implementation",
    "musicgen": "AutoModelForCausalLM hands the decoder the composite config, which lacks the decoder's fields",
    "musicgen_melody": "AutoModelForCausalLM hands the decoder the composite config, which lacks the decoder's fields",
}

COMPUTED_ATTENTION_THEMSELVES = ("codegen", "gptj")
"""Served since transformers 5.24."""

if EARLIER_THAN_5_24:
    MODEL_TYPES = [name for name in MODEL_TYPES if name not in COMPUTED_ATTENTION_THEMSELVES]
    SKIPPED |= dict.fromkeys(COMPUTED_ATTENTION_THEMSELVES, COMPUTES_ATTENTION_ITSELF)

# Runs that a model refuses or fails under eager already; a test sees to it that it still does.
OWN_CACHE = "takes no cache but one of its own class"
STATIC_SLIDING_FIRST = "eager fails: the mask is sized for a full layer while the first layer's static cache is sliding"
FAILS_UNDER_EAGER = {
    ("minimax", "dynamic_cache"): OWN_CACHE,
    ("minimax", "static_cache"): OWN_CACHE,
    ("deepseek_v4", "static_cache"): "there is no static cache of its compressed keys",
    ("inkling_text", "static_cache"): STATIC_SLIDING_FIRST,
    ("inkling2_text", "static_cache"): STATIC_SLIDING_FIRST,
    ("zaya", "static_cache"): STATIC_SLIDING_FIRST,
}

if EARLIER_TRANSFORMERS or not EARLIER_THAN_5_24:
    FAILS_UNDER_EAGER = {
        model_and_run: reason for model_and_run, reason in FAILS_UNDER_EAGER.items() if reason != STATIC_SLIDING_FIRST
    }

# Eager is no reference for these: moshi's has no mask at all where nothing is padded, and sees what comes later.
WRONG_UNDER_EAGER = [("moshi", "plain"), ("moshi", "packed")] if EARLIER_TRANSFORMERS else []

# These build their masks without `position_ids`, so that transformers loses the packing: under eager a packed row is
# one causal sequence to them.
IGNORES_PACKING = """
    afmoe bart bert bert-generation bigbird_pegasus biogpt blenderbot blenderbot-small camembert data2vec-text
    electra ernie gpt_oss granitemoehybrid marian mbart opt pegasus plbart roberta roberta-prelayernorm roc_bert
    xlm-roberta xlm-roberta-xl xmod
""".split()

# Of those, these make a 2D mask of ones when they are given none, beside which my_triton honours the packing.
MAKES_A_MASK = "bart biogpt blenderbot blenderbot-small marian mbart pegasus plbart".split()
if EARLIER_TRANSFORMERS:
    MAKES_A_MASK.append("opt")

# These do not hand `position_ids` on to the attention function, or compute with their mask and so have a dense one, or
# choose keys without regard to packing: beside a 2D mask their documents see each other.
HIDES_PACKING = """
    axk2 bigbird_pegasus cohere_compass_text ctrl deepseek_v32 deepseek_v4 doge dory dots3_note_text glm_moe_dsa
    gpt_bigcode granitemoehybrid hy_v4 inkling_text llama4_text moshi persimmon recurrent_gemma whisper zamba zaya
""".split()
if EARLIER_TRANSFORMERS:
    HIDES_PACKING.append("ministral3")

WITH_SINKS = ("flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash")
WITH_SOFTCAP = ("gemma2", "vaultgemma")
GENERATES = ("llama", "gemma2", "gpt_oss", "mistral", "phi")


def random_tokens(batch, length):
    """Token ids without the special ones (padding, beginning, end)."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)


def left_padding(length, *pads):
    """2D padding mask, one row for each number of leading pads."""
    return (torch.arange(length)[None, :] >= torch.tensor(pads)[:, None]).long()


def right_padding(length, *pads):
    """2D padding mask, one row for each number of trailing pads."""
    return left_padding(length, *pads).flip(1)


def padded_logits(model, mask):
    """Logits of the real tokens, `[real tokens, vocabulary]`; what padding tokens compute has no meaning."""
    tokens = random_tokens(*mask.shape).masked_fill(mask == 0, 0)
    return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]


@torch.no_grad()
def plain(model):
    logits = [model(input_ids=random_tokens(2, length), use_cache=False).logits for length in (13, 17)]
    return {"13 tokens": logits[0], "17 tokens": logits[1]}


@torch.no_grad()
def left_padded(model):
    return {"logits": padded_logits(model, left_padding(13, 3, 7))}


@torch.no_grad()
def right_padded(model):
    return {"logits": padded_logits(model, right_padding(13, 7, 2))}


def packed_inputs():
    """Token ids and positions of three documents in one row, told apart by nothing but their positions."""
    return random_tokens(1, 17), torch.cat([torch.arange(length) for length in (4, 7, 6)])[None, :]


@torch.no_grad()
def packed(model):
    tokens, positions = packed_inputs()
    return {"logits": model(input_ids=tokens, position_ids=positions, use_cache=False).logits}


@torch.no_grad()
def packed_by_dense_mask(model):
    """What `packed` should give: the mask of its documents is handed in, one for each layer type if there are some."""
    tokens, positions = packed_inputs()
    documents = (positions == 0).cumsum(dim=1)[0]
    index = torch.arange(len(documents))
    distance = index[:, None] - index[None, :]
    allowed = (documents[:, None] == documents[None, :]) & (distance >= 0)
    windows = {"full_attention": len(documents), "sliding_attention": SLIDING_WINDOW}
    masks = {
        layer_type: torch.where(allowed & (distance < window), 0.0, torch.finfo(torch.float32).min)[None, None]
        for layer_type, window in windows.items()
    }
    mask = masks if getattr(model.config, "layer_types", None) else masks["full_attention"]
    return {
        "logits": model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits,
    }


def gradient(model):
    """Gradients of every parameter for a random weighting of the real tokens' logits."""
    model.zero_grad()
    logits = padded_logits(model, left_padding(13, 0, 5))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()
    # An expert that only padding tokens chose has a zero gradient in one model and may have none in the other.
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    model.zero_grad()
    return gradients


@torch.no_grad()
def run_in_steps(model, cache):
    """Prefill, single-token steps and a step of several tokens, left-padded: logits of each step's real tokens."""
    steps = (7, 1, 1, 3, 1)
    mask = left_padding(sum(steps), 4, 1)
    tokens = random_tokens(*mask.shape).masked_fill(mask == 0, 0)
    logits, start = {}, 0
    for step in steps:
        end = start + step
        output = model(input_ids=tokens[:, start:end], attention_mask=mask[:, :end], use_cache=True, **{CACHE: cache})
        logits[f"tokens {start} to {end}"] = output.logits[mask[:, start:end].bool()]
        start = end
    return logits


def dynamic_cache(model):
    return run_in_steps(model, DynamicCache(config=model.config))


def static_cache(model):
    return run_in_steps(model, StaticCache(config=model.config, max_cache_len=16))


RUNS = {run.__name__: run for run in (plain, left_padded, right_padded, packed, gradient, dynamic_cache, static_cache)}


def relative_error(actual, expected):
    """Largest difference relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def gradient_errors(actual, expected):
    """Error in norm of each gradient; one that is small beside all gradients together is measured against those."""
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    return {
        name: ((actual[name] - gradient).norm() / torch.maximum(gradient.norm(), 1e-3 * total)).item()
        for name, gradient in expected.items()
    }


def errors_of(run, ours, eager, reference_run=None):
    """Relative error of each tensor that a run gives, where `reference_run` may say how eager gets to the same."""
    actual, expected = RUNS[run](ours), (reference_run or RUNS[run])(eager)
    assert actual.keys() == expected.keys()
    assert all(tensor.isfinite().all() for tensor in expected.values())
    if run == "gradient":
        return gradient_errors(actual, expected)
    return {name: relative_error(actual[name], tensor) for name, tensor in expected.items()}


@functools.lru_cache(maxsize=2)
def models(model_type):
    """The same weights under eager and under our implementation. The tests of a model follow one another."""
    eager = build(model_type, "eager")
    return SimpleNamespace(eager=eager, ours=build(model_type, IMPLEMENTATION, eager.state_dict()))


def model_module(model_type):
    """The modeling module of a causal language model type."""
    return inspect.getmodule(getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]))


@contextlib.contextmanager
def counted_calls():
    """Count the calls of our implementation."""
    calls = []
    implementation = AttentionInterface()[IMPLEMENTATION]

    def count(*args, **kwargs):
        calls.append(1)
        return implementation(*args, **kwargs)

    AttentionInterface.register(IMPLEMENTATION, count)
    try:
        yield calls
    finally:
        AttentionInterface.register(IMPLEMENTATION, implementation)


def with_marks(model_type, *marks):
    """A model type as a parameter; skipped if it is later than the installed transformers."""
    there = model_type in CONFIG_MAPPING and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if EARLIER_TRANSFORMERS and model_type == "cohere_compass_text":
        there = False  # it is, for heads of 128 columns alone
    reason = f"transformers {transformers.__version__} has no {model_type}"
    return pytest.param(model_type, marks=[*marks, *([] if there else [pytest.mark.skip(reason=reason)])])


@pytest.mark.skipif(
    not transformers.__version__.startswith(("5.23.", "5.24.")), reason="the lists are those of transformers 5.24"
)
def test_every_model_type_is_tested_or_skipped_with_a_reason():
    listed, there = {*MODEL_TYPES, *SKIPPED}, set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert there <= listed if EARLIER_THAN_5_24 else there == listed


@pytest.mark.parametrize(
    "model_type",
    [with_marks(model_type) for model_type, reason in SKIPPED.items() if reason == COMPUTES_ATTENTION_ITSELF],
)
def test_skipped_model_computes_attention_itself(model_type):
    assert "ALL_ATTENTION_FUNCTIONS" not in inspect.getsource(model_module(model_type))


IN_THE_INTERPRETER = {
    "llama": (pytest.mark.interpreter,),
    "gpt_oss": (pytest.mark.interpreter,),
    "gemma2": (pytest.mark.interpreter, *([SLOW_IN_INTERPRETER] if SLOW_IN_INTERPRETER else [])),
}
"""Plain, with sinks, with softcap and windows: enough to see the kernels inside models."""


# The model type is the outer loop, so that a model is built once for all its runs.
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    "model_type",
    [with_marks(name, *IN_THE_INTERPRETER.get(name, ())) for name in MODEL_TYPES],
)
def test_equals_eager(model_type, run):
    pair = models(model_type)
    if reason := FAILS_UNDER_EAGER.get((model_type, run)):
        with pytest.raises((RuntimeError, ValueError, KeyError)):
            RUNS[run](pair.eager)
        pytest.skip(reason)
    if (model_type, run) in WRONG_UNDER_EAGER:
        pytest.skip("eager is no reference for it")
    honoured = run == "packed" and model_type in MAKES_A_MASK
    with counted_calls() as calls:
        errors = errors_of(run, pair.ours, pair.eager, packed_by_dense_mask if honoured else None)
    assert calls, "the model never called the implementation"
    # `not <` also catches NaN.
    assert not {name: error for name, error in errors.items() if not error < TOLERANCE}


@pytest.mark.parametrize("model_type", [with_marks(name) for name in MODEL_TYPES if name not in HIDES_PACKING])
@torch.no_grad()
def test_packing_is_honoured_beside_a_mask_of_ones(model_type):
    """transformers looks for packing only where no 2D mask is given; eager with the documents' mask is right."""
    pair = models(model_type)
    tokens, positions = packed_inputs()
    inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    actual = pair.ours(**inputs, attention_mask=torch.ones_like(tokens)).logits
    reference = packed_by_dense_mask if model_type in IGNORES_PACKING else packed
    assert relative_error(actual, reference(pair.eager)["logits"]) < TOLERANCE


@pytest.mark.exhaustive  # of the tests here, not of what they test
@pytest.mark.parametrize("model_type", map(with_marks, MODEL_TYPES))
@torch.no_grad()
def test_masks_matter(model_type):
    """Without its padding, its packing or its window a model computes something else, so a lost mask would show."""
    eager = models(model_type).eager
    mask = left_padding(13, 3, 7)
    tokens = random_tokens(*mask.shape).masked_fill(mask == 0, 0)
    unmasked = eager(input_ids=tokens, attention_mask=torch.ones_like(mask), use_cache=False).logits[mask.bool()]
    assert relative_error(unmasked, padded_logits(eager, mask)) > VISIBLE

    # transformers looks for packing only where no 2D mask is given.
    tokens, positions = packed_inputs()
    unpacked = eager(
        input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False
    ).logits
    assert (relative_error(unpacked, packed(eager)["logits"]) > VISIBLE) == (model_type not in IGNORES_PACKING)

    layer_types = getattr(eager.config, "layer_types", None) or []
    has_window = any("sliding" in layer_type or "chunked" in layer_type for layer_type in layer_types)
    if has_window and model_type not in ("inkling_text", "inkling2_text"):  # its window is also the size of a weight
        unlimited = dict.fromkeys((name for name in WINDOWS if getattr(eager.config, name, None)), 64)
        without_window = build(model_type, "eager", eager.state_dict(), **unlimited)
        assert relative_error(plain(without_window)["17 tokens"], plain(eager)["17 tokens"]) > VISIBLE


@pytest.mark.parametrize("model_type", map(with_marks, WITH_SINKS))
def test_sinks_matter(model_type):
    eager = models(model_type).eager
    state = {
        name: torch.full_like(value, -1e4) if "sink" in name else value for name, value in eager.state_dict().items()
    }
    without_sinks = build(model_type, "eager", state)
    assert relative_error(plain(without_sinks)["17 tokens"], plain(eager)["17 tokens"]) > VISIBLE


@pytest.mark.parametrize("model_type", WITH_SOFTCAP)
def test_softcap_matters(model_type):
    eager = models(model_type).eager
    without_softcap = build(model_type, "eager", eager.state_dict(), attn_logit_softcapping=None)
    assert relative_error(plain(without_softcap)["17 tokens"], plain(eager)["17 tokens"]) > VISIBLE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model_type", GENERATES)
def test_generates_the_tokens_of_eager(model_type, cache):
    mask = left_padding(11, 4, 0)
    tokens = random_tokens(*mask.shape).masked_fill(mask == 0, 0)
    pair = models(model_type)
    actual, expected = (
        model.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=8,
            max_new_tokens=8,
            cache_implementation=cache,
            disable_compile=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for model in (pair.ours, pair.eager)
    )
    assert torch.equal(actual.sequences, expected.sequences)
    assert relative_error(torch.stack(actual.logits), torch.stack(expected.logits)) < TOLERANCE
