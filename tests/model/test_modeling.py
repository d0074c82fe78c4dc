# SPDX-License-Identifier: Apache-2.0
"""The reference model: the same numbers on every path, and what engines ask of its source."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import model as model_package
from model import modeling_reference
from model.configuration_reference import ReferenceConfig
from model.modeling_reference import CACHE, ReferenceForCausalLM, ReferenceModel, ReferenceRMSNorm

from helpers import EARLIER_TRANSFORMERS

TOKENS = 12
WINDOW = 5
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def small_model(implementation: str = "sdpa", **changes) -> ReferenceForCausalLM:
    """Four layers, sliding and full by turns, weights large enough that the attention is far from uniform."""
    shape = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_attention_heads=6, head_dim=10)
    torch.manual_seed(0)
    config = ReferenceConfig(**shape | dict(sliding_window=WINDOW, initializer_range=0.3) | changes)
    model = ReferenceForCausalLM(config).eval()
    model.set_attn_implementation(implementation)
    return model


def random_ids(batch: int = 2, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))


def left_padded(ids: torch.Tensor, padding: int) -> dict[str, torch.Tensor]:
    """Inputs whose last row has `padding` tokens in front, with the positions that `generate` would give."""
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def packed(ids: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}


def inputs_of(case: str) -> dict[str, torch.Tensor]:
    ids = random_ids()
    return {"plain": {"input_ids": ids}, "left-padded": left_padded(ids, 4), "packed": packed(ids, [5, 1, 6])}[case]


@pytest.mark.parametrize("layers", ["mixed", "sliding", "full"])
@pytest.mark.parametrize("case", ["plain", "left-padded", "packed"])
def test_sdpa_equals_eager(case: str, layers: str) -> None:
    types = {"mixed": None, "sliding": ["sliding_attention"] * 4, "full": ["full_attention"] * 4}[layers]
    model, inputs = small_model(layer_types=types), inputs_of(case)
    tokens = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    logits = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        logits[implementation] = model(**inputs).logits[tokens]
    torch.testing.assert_close(logits["sdpa"], logits["eager"], **TOLERANCE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_changes_nothing(implementation: str) -> None:
    model, ids = small_model(implementation), random_ids()
    padded = model(**left_padded(ids, 4)).logits[-1, 4:]
    torch.testing.assert_close(padded, model(ids[-1:, 4:]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(implementation: str, use_cache: bool) -> None:
    model, ids, lengths = small_model(implementation), random_ids(), [5, 1, 6]
    together = model(**packed(ids, lengths), use_cache=use_cache).logits.split(lengths, dim=1)
    for document, logits in zip(ids.split(lengths, dim=1), together, strict=True):
        torch.testing.assert_close(logits, model(document).logits, **TOLERANCE)


def test_a_sliding_layer_sees_the_window_and_no_more() -> None:
    model, ids = small_model(num_hidden_layers=1, layer_types=["sliding_attention"]), random_ids(batch=1)
    changed = ids.clone()
    changed[0, 2] += 1
    differs = (model(ids).logits != model(changed).logits).any(dim=-1)[0]
    assert differs.nonzero().flatten().tolist() == list(range(2, 2 + WINDOW))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generation_is_the_same_with_every_cache(implementation: str) -> None:
    model = small_model(implementation)
    inputs = left_padded(random_ids(), 4)
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    dynamic = model.generate(**prompt, **options)
    assert torch.equal(dynamic, model.generate(**prompt, **options, cache_implementation="static"))
    assert torch.equal(dynamic, model.generate(**prompt, **options, use_cache=False))

    ids = prompt["input_ids"][:1]  # the row without padding, one whole forward pass a token
    for _ in range(10):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(dynamic[:1], ids)


def gradients(model: ReferenceForCausalLM) -> list[torch.Tensor]:
    ids = random_ids()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.skipif(EARLIER_TRANSFORMERS, reason="earlier ones hand the cache of a batch over in another way")
@pytest.mark.parametrize("implementation", ["paged|eager", "sdpa"])
def test_continuous_batching_gives_the_tokens_of_generate(implementation: str) -> None:
    """Layers write to the cache of a batch since transformers 5.24, and attention does before."""
    model, prompts = small_model("eager"), [random_ids(1, length)[0].tolist() for length in (3, 20, 1, 11)]
    greedy = GenerationConfig(max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        expected.append(tokens[0, len(prompt) :].tolist())
    model.set_attn_implementation(implementation)
    small = ContinuousBatchingConfig(page_size=8, num_blocks=64, max_batch_tokens=32, use_cuda_graph=False)
    outputs = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=small).values()
    assert [list(output.generated_tokens) for output in outputs] == expected


@pytest.mark.parametrize("name", ["past_key_values", CACHE])
def test_the_cache_may_be_given_by_either_name(name: str) -> None:
    model, ids = small_model(), random_ids()
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :7], use_cache=True, **{name: cache})
    assert getattr(first, CACHE) is cache
    second = model(ids[:, 7:], use_cache=True, **{name: cache})
    logits = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(logits, model(ids).logits, **TOLERANCE)


def test_gradients_agree_with_and_without_checkpointing() -> None:
    model = small_model("eager").train()
    expected = gradients(model)
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-5)
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-5)


def test_keywords_reach_the_attention_function_of_every_layer() -> None:
    calls = []

    def probe(module, query, key, value, attention_mask, **kwargs):
        calls.append((module, query.shape, key.shape, kwargs))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("reference_model_probe", probe)
    AttentionMaskInterface.register("reference_model_probe", sdpa_mask)
    model, inputs, marker = small_model(), packed(random_ids(), [5, 7]), object()
    expected = model(**inputs).logits
    model.set_attn_implementation("reference_model_probe")
    torch.testing.assert_close(model(**inputs, marker=marker).logits, expected, **TOLERANCE)

    assert [module.layer_idx for module, *_ in calls] == [0, 1, 2, 3]
    assert [kwargs["sliding_window"] for *_, kwargs in calls] == [WINDOW, None, WINDOW, None]
    for module, query_shape, key_shape, kwargs in calls:
        assert (query_shape, key_shape) == ((2, 6, TOKENS, 10), (2, 2, TOKENS, 10))
        assert module.is_causal and module.num_key_value_groups == 3
        assert kwargs["marker"] is marker and torch.equal(kwargs["position_ids"], inputs["position_ids"])
        assert kwargs["scaling"] == pytest.approx(10**-0.5) and kwargs["dropout"] == 0.0


def test_the_source_calls_the_interface_once_and_as_engines_expect() -> None:
    source = inspect.getsource(modeling_reference)
    assert source.count("ALL_ATTENTION_FUNCTIONS.get_interface(") == 1
    assert ReferenceForCausalLM._can_set_attn_implementation() and ReferenceModel._supports_attention_backend
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (call,) = (call for call in calls if ast.unparse(call.func) == "attention_interface")
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert keywords["scaling"] == "self.scaling"
    assert keywords[None] == "kwargs"


def test_the_model_imports_neither_the_plugin_nor_the_kernels() -> None:
    imported = set()
    for path in Path(model_package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    assert {"torch", "transformers"} <= imported
    assert not imported & {"attention_plugin", "attention_kernels", "kernels", "triton"}


def test_rms_norm_takes_one_size_and_normalises() -> None:
    norm, states = ReferenceRMSNorm(16), torch.randn(3, 16, dtype=torch.bfloat16)
    wide = states.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm.to(torch.bfloat16)(states).dtype == torch.bfloat16
    torch.testing.assert_close(norm(states).double(), expected, rtol=1e-2, atol=1e-2)


def test_the_parallel_plans_fit_the_model() -> None:
    base = small_model().model
    plan = ReferenceConfig.base_model_tp_plan
    assert set(plan.values()) == {"colwise", "rowwise"}
    assert base.tp_plan == plan
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    assert {name.replace("*", str(layer)) for name in plan for layer in range(4)} == linear

    stages = {name: base.get_submodule(name) for name in ReferenceConfig.base_model_pp_plan}
    assert [name for name, module in stages.items() if isinstance(module, nn.ModuleList)] == ["layers"]
    # What the plan leaves out holds no weights, so that every stage can have its own.
    left_out = [module for name, module in base.named_children() if name not in stages]
    assert not [parameter for module in left_out for parameter in module.parameters()]
    assert base.base_model_prefix == "model" and not list(base.buffers())


def test_loss_logits_and_recorded_outputs() -> None:
    model, ids = small_model("eager"), random_ids()
    outputs = model(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    expected = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    assert len(outputs.hidden_states) == 5 and len(outputs.attentions) == 4
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 6, TOKENS))
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, outputs.logits[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 7])).logits, outputs.logits[:, [0, 7]])
    torch.testing.assert_close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, outputs.logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=model.model.embed_tokens(ids))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings_survive_saving(tied: bool, tmp_path: Path) -> None:
    model, ids = small_model(tie_word_embeddings=tied), random_ids()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    model.save_pretrained(tmp_path)
    again = ReferenceForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "multiple of num_key_value_heads, got 6 and 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"num_key_value_heads": None}, "num_key_value_heads must be at least 1, got None"),
        ({"vocab_size": 2}, "pad_token_id must be one of the 2 token ids of vocab_size, or None, got 2"),
        ({"head_dim": 7}, "head_dim must be even, .* got 7"),
        ({"layer_types": ["full_attention"]}, "each of the 4 layers, got 1"),
        ({"layer_types": ["chunked_attention"] * 4}, r"got \['chunked_attention'\]"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window of at least 1, got None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 'must be "default", got "linear"'),
    ],
)
def test_contradictory_configurations_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReferenceConfig(**arguments)
