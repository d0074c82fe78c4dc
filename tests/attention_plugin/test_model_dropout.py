# SPDX-License-Identifier: Apache-2.0
"""Dropout of attention weights, in models that train."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from attention_kernels import attention_reference
from attention_plugin import attention_forward, span_mask

import tiny_models

P = 0.4
TOKENS = 9
FIELDS = {"llama": "attention_dropout", "gpt2": "attn_pdrop", "bert": "attention_probs_dropout_prob"}
"""Where a configuration has the dropout of attention weights; all other dropout of the tiny models is 0."""


def decoder(model_type: str) -> Any:
    return tiny_models.build(model_type, "my_triton", **{FIELDS[model_type]: P})


def encoder_decoder(name: str) -> Any:
    """Its dropout of everything but attention weights is 0."""
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny_models.VOCAB_SIZE, "d_model": 32, "decoder_start_token_id": 1}
    if name == "t5":
        config = transformers.T5Config(**sizes, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=P)
    else:
        config = transformers.BartConfig(
            **sizes, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, attention_dropout=P, max_position_embeddings=32,
            init_std=0.2,
        )  # fmt: skip
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="my_triton")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


MODELS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: decoder(name) for name in FIELDS},
    **{name: lambda name=name: encoder_decoder(name) for name in ("t5", "bart")},
}


def inputs(model: Any) -> dict[str, Tensor]:
    tokens = torch.arange(2 * TOKENS).reshape(2, TOKENS) + 5
    attention_mask = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS - 3]])).long()
    return {"input_ids": tokens, "attention_mask": attention_mask, "labels": tokens.flip(1), "use_cache": False}


def run(model: Any, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients with this state of torch's generator."""
    torch.manual_seed(seed)
    loss = model(**inputs(model)).loss
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss, [grad for grad in torch.autograd.grad(loss, trainable, allow_unused=True) if grad is not None]


@pytest.mark.parametrize("name", MODELS)
def test_only_in_training_and_decided_by_the_seed(name: str):
    model = MODELS[name]()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected = eager.eval()(**inputs(model)).loss
        for seed in range(2):
            torch.manual_seed(seed)
            torch.testing.assert_close(model.eval()(**inputs(model)).loss, expected)
    model.train()
    losses, gradients = zip(*(run(model, seed) for seed in (3, 3, 4)), strict=True)
    assert torch.equal(losses[0], losses[1]) and losses[0] != losses[2] and losses[0] != expected
    assert all(torch.equal(*pair) for pair in zip(*gradients[:2], strict=True))
    assert all(gradient.isfinite().all() for gradient in gradients[2])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name: str, use_reentrant: bool):
    """The second forward pass drops the same weights."""
    model = MODELS[name]().train()
    loss, gradients = run(model, 3)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(3)
    again = model(**inputs(model)).loss
    again.backward()  # reentrant checkpoints do not take torch.autograd.grad
    checkpointed = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(again, loss)
    for ours, expected in zip(checkpointed, gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


def test_mean_over_seeds_is_attention_without_dropout():
    """Of one layer, with as many keys as rows see at least four, so that the spread is known."""
    query, key, value = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    module = torch.nn.Module().train()
    torch.manual_seed(0)
    outputs = torch.stack(
        [attention_forward(module, query, key, value, span_mask(1, 12, 12), dropout=P)[0] for _ in range(600)]
    )
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    expected = attention_reference(query, key, value, mask=causal)[0].transpose(1, 2)
    standard_error = outputs.std(0) / 600**0.5
    deviations = (outputs.mean(0) - expected).abs() / standard_error
    assert float(deviations.max()) < 5 and 0.5 < float(deviations.mean()) < 1.2  # 0.8 for a normal distribution
    assert float(outputs.std(0).min()) > 0


def test_padding_stays_hidden():
    query, key, value = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    attended = torch.arange(12) >= torch.tensor([[0], [5]])
    mask = span_mask(2, 12, 12, attention_mask=attended)
    outputs = []
    for noise in (0.0, 100.0):
        torch.manual_seed(0)
        key[1, :, :5] += noise
        value[1, :, :5] += noise
        outputs.append(attention_forward(torch.nn.Module().train(), query, key, value, mask, dropout=P)[0])
    assert torch.equal(*outputs) and (outputs[0][1, :5] == 0).all()


def test_everything_is_dropped():
    query, key, value = (torch.randn(1, 2, 5, 8).requires_grad_() for _ in range(3))
    output, _ = attention_forward(torch.nn.Module().train(), query, key, value, span_mask(1, 5, 5), dropout=1.0)
    output.sum().backward()
    assert (output == 0).all() and all((tensor.grad == 0).all() for tensor in (query, key, value))
