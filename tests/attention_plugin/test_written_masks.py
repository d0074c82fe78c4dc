# SPDX-License-Identifier: Apache-2.0
"""Models whose own code writes to the attention mask: what eager attention sees of it, attention sees."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama import modeling_llama

from attention_plugin import span_mask

LEAST = torch.finfo(torch.float32).min


class WritesToMasks(modeling_llama.LlamaAttention):
    """A layer as a user may write it: it hides keys by writing to the mask, which all layers share."""

    writing: Callable[[Any], Any]

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **arguments: Any) -> tuple[Tensor, Any]:
        self.writing(attention_mask)
        return super().forward(hidden_states, attention_mask=attention_mask, **arguments)


WRITINGS: dict[str, Callable[[Any], Any]] = {
    "an item": lambda mask: mask.__setitem__((slice(None), 0, slice(None), 1), LEAST),
    "one sample's": lambda mask: mask.__setitem__((1, 0, slice(None), 1), LEAST),
    "a method": lambda mask: mask.masked_fill_(torch.arange(8) == 1, LEAST),
    "a function": lambda mask: torch.fill_(mask, 0.0),
    "a view": lambda mask: mask[..., 1].fill_(LEAST),
    "out": lambda mask: torch.add(mask, torch.where(torch.arange(8) == 1, LEAST, 0.0), out=mask),
}


CONFIG = transformers.LlamaConfig(
    vocab_size=41, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3,
)  # fmt: skip


def llama(implementation: str, writing: Callable[[Any], Any] | None) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(copy.deepcopy(CONFIG), attn_implementation=implementation)
    if writing is not None:
        first = model.model.layers[0].self_attn
        first.__class__, first.writing = WritesToMasks, writing
    return model.eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", WRITINGS)
def test_what_a_model_writes_to_its_mask_holds(name: str, padded: bool, mode: Any):
    tokens = torch.randint(1, 41, (2, 8))
    real = torch.tensor([[not padded] * 2 + [True] * 6, [True] * 8])
    inputs = {"input_ids": tokens, "attention_mask": real.long() if padded else None}
    with mode():
        expected, output, unwritten = (
            llama(*given)(**inputs).logits[real]
            for given in (("eager", WRITINGS[name]), ("my_triton", WRITINGS[name]), ("eager", None))
        )
    assert (output - expected).norm() < 1e-5 * expected.norm()
    assert (unwritten - expected).norm() > 1e-2 * expected.norm(), "what is written changes nothing"


def hide_second_key(mask: Any, values: Tensor) -> Tensor:
    mask.masked_fill_(torch.arange(8) == 1, LEAST)
    return mask + values


def test_a_compiler_leaves_writing_to_python_or_says_why_it_cannot():
    """In a compiled graph what is written would be lost."""
    mask = span_mask(2, 8, 8, config=CONFIG, dtype=torch.float32)
    result = torch.compile(hide_second_key, backend="eager")(mask, torch.zeros(8))
    assert mask.rewritten is not None and torch.equal(mask.rewritten, result) and (result[..., 1] == LEAST).all()
    torch._dynamo.reset()  # or it would know by now where to break the graph
    with pytest.raises(
        Exception, match=r"applied `.masked_fill_` .* under torch.compile, which is refused, .* a new mask"
    ):
        torch.compile(hide_second_key, backend="eager", fullgraph=True)(mask, torch.zeros(8))
