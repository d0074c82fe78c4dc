# SPDX-License-Identifier: Apache-2.0
"""Models whose own code writes to the attention mask: what eager attention sees of it, attention sees."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import masking_utils
from transformers.models.llama import modeling_llama

from attention_kernels import attention_reference
from attention_plugin import attention_forward, span_mask

LEAST = torch.finfo(torch.float32).min


class WritesToMasks(modeling_llama.LlamaAttention):
    """A layer as a user may write it: it hides keys by writing to the mask, which all layers share."""

    writing: Callable[[Any], Any]

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **arguments: Any) -> tuple[Tensor, Any]:
        self.writing(attention_mask)
        return super().forward(hidden_states, attention_mask=attention_mask, **arguments)


def write_to_view_of_one_sample(mask: Any) -> None:
    mask[1][..., 1].fill_(LEAST)


def write_between_views(mask: Any) -> None:
    view = mask[0]
    mask.masked_fill_(torch.arange(8) == 1, LEAST)
    view[..., 2].fill_(LEAST)


def add_in_place(mask: Any) -> None:
    mask += torch.where(torch.arange(8) == 1, LEAST, 0.0)


def add_to_items(mask: Any) -> None:
    mask[..., 1] += LEAST / 2


WRITINGS: dict[str, Callable[[Any], Any]] = {
    "a view of one sample": write_to_view_of_one_sample,
    "a view from before": write_between_views,
    "an operator": add_in_place,
    "an operator on items": add_to_items,
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


@pytest.mark.parametrize("name", ["an item", "a method", "an operator on items"])
def test_what_a_compiled_model_writes_to_its_mask_holds(name: str):
    """The compiler leaves it to Python."""
    torch._dynamo.reset()
    inputs = {"input_ids": torch.randint(1, 41, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    with torch.no_grad():
        expected = llama("eager", WRITINGS[name])(**inputs).logits
        output = torch.compile(llama("my_triton", WRITINGS[name]), backend="eager")(**inputs).logits
    assert (output - expected).norm() < 1e-5 * expected.norm()


def test_a_mask_that_was_looked_at_before_serves_a_compiled_graph():
    """There nobody can tell whether it was written to: what the model was given holds."""
    torch._dynamo.reset()
    query, key, value = torch.randn(3, 2, 4, 8, 16)
    mask = span_mask(2, 8, 8, config=CONFIG, dtype=torch.float32)
    module = torch.nn.Module().eval()
    compiled = torch.compile(attention_forward, backend="eager", fullgraph=True)
    assert mask[0, 0, 0, 1] == LEAST
    for visible in (torch.ones(8), torch.arange(8) != 1):
        mask.masked_fill_(visible == 0, LEAST)
        output, _ = compiled(module, query, key, value, mask)
        expected, _ = attention_reference(query, key, value, mask=torch.ones(8, 8).tril().bool() & visible.bool())
        torch.testing.assert_close(output.transpose(1, 2).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_written_mask_keeps_documents_apart():
    """Positions that start anew beside a 2D mask are honoured, whatever else a model hides."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    query, key, value = torch.randn(3, 1, 4, 8, 16)
    mask = span_mask(1, 8, 8, attention_mask=torch.ones(1, 8), config=CONFIG, dtype=torch.float32)
    mask[..., 5] = LEAST
    module = torch.nn.Module().eval()
    module.is_causal = True
    output, _ = attention_forward(module, query, key, value, mask, position_ids=positions)
    seen = torch.ones(8, 8).tril().bool() & (torch.arange(8)[:, None] // 4 == torch.arange(8) // 4)
    seen[:, 5] = False
    expected, _ = attention_reference(query, key, value, mask=seen)
    torch.testing.assert_close(output.transpose(1, 2).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_written_mask_keeps_its_chunks_beside_lengths():
    """Documents are cut apart; chunks are where the model has them."""
    config = transformers.Llama4TextConfig(attention_chunk_size=3)
    pattern = masking_utils.and_masks(
        masking_utils.causal_mask_function, masking_utils.chunked_overlay(3, torch.zeros(1, dtype=torch.long))
    )
    mask = span_mask(1, 8, 8, mask_function=pattern, config=config, dtype=torch.float32)
    assert mask.chunks is not None
    mask.dense_dtype = torch.float32
    mask[..., 5] = LEAST
    seen = mask.to_dense()[0, 0] & (torch.arange(8)[:, None] // 4 == torch.arange(8) // 4)
    seen[:, 5] = False
    query, key, value = torch.randn(3, 1, 4, 8, 16)
    lengths = torch.tensor([0, 4, 8], dtype=torch.int32)
    output, _ = attention_forward(
        torch.nn.Module().eval(), query, key, value, mask, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths
    )
    expected, _ = attention_reference(query, key, value, mask=seen)
    blind = ~seen.any(1)
    torch.testing.assert_close(
        output.transpose(1, 2).double()[:, :, ~blind], expected[:, :, ~blind], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("written", [False, True])
def test_copies_know_whether_they_were_written_to(written: bool):
    mask = span_mask(2, 8, 8, config=CONFIG, dtype=torch.float32)
    assert mask[0, 0, 0, 0] == 0
    if written:
        mask[..., 1] = LEAST
    for copied in (copy.deepcopy(mask), copy.copy(mask), pickle.loads(pickle.dumps(mask))):
        assert (copied.rewritten is not None) == written
        assert not written or torch.equal(copied.rewritten, mask.rewritten)


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
