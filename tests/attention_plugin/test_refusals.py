# SPDX-License-Identifier: Apache-2.0
"""Every refusal: what is not served is an error that names the argument, the value got and the alternative."""

import ast
import copy
import importlib
import inspect
import linecache
import logging
import math
import re
import sys
import zlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from attention_kernels import Spans, attention, call_checks, checks, configs, library, paths, spans
from attention_plugin import SpanMask, attention_forward, sources, span_mask, support
from attention_plugin.weights import AbsentWeights

from helpers import EARLIER_THAN_5_24

BATCH, HEADS, KV_HEADS, TOKENS, DIM = 2, 4, 2, 6, 8
EAGER = 'attn_implementation="eager"'


def raises(error: type[Exception], *words: str) -> Any:
    """Expects an error whose message holds all of the words, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(word) for word in words))


def tensors(query_len: int = TOKENS, key_len: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(BATCH, HEADS, query_len, DIM),
        torch.randn(BATCH, KV_HEADS, key_len, DIM),
        torch.randn(BATCH, KV_HEADS, key_len, DIM),
    )


def call(mask: Any = None, *, training: bool = False, **options: Any) -> tuple[Tensor, None]:
    """One call of the attention function, with a causal mask unless another is given."""
    mask = span_mask(BATCH, TOKENS, TOKENS) if mask is None else mask
    return attention_forward(torch.nn.Module().train(training), *tensors(), mask, **options)


# ---------------------------------------------------------------------- arguments of models


KEYWORDS: list[tuple[str, Any, str]] = [
    ("head_mask", torch.ones(4), "torch.float32 [4]"),
    ("layer_head_mask", torch.ones(4), "torch.float32 [4]"),
    ("cache", "a paged cache", "'a paged cache'"),
    ("temperature_of_attention", 0.5, "0.5"),
    ("something_long", "x" * 100, "x" * 50 + "..."),
]


@pytest.mark.parametrize("name, value, got", KEYWORDS)
def test_keywords(name: str, value: Any, got: str):
    reason = support.REFUSED_KEYWORDS.get(name, "it is not known, so it might change the result")
    got = got if "..." not in got else "..."
    with raises(ValueError, f"`{name}`=", got, "is refused", reason, EAGER):
        call(**{name: value})


def test_every_refused_keyword_is_refused_and_every_ignored_one_passes():
    for name in support.REFUSED_KEYWORDS:
        with raises(ValueError, f"`{name}`"):
            call(**{name: torch.ones(1)})
    expected, _ = attention_forward(torch.nn.Module().eval(), *(fixed := tensors()), span_mask(BATCH, TOKENS, TOKENS))
    ignored: dict[str, Any] = {name: torch.ones(1) for name in support.IGNORED_KEYWORDS}
    ignored["cache"] = DynamicCache()  # as `past_key_values`, whose name it is since transformers 5.24
    output, _ = attention_forward(torch.nn.Module().eval(), *fixed, span_mask(BATCH, TOKENS, TOKENS), **ignored)
    assert torch.equal(output, expected)
    assert not support.IGNORED_KEYWORDS & support.REFUSED_KEYWORDS.keys()


def test_absent_keywords_pass():
    """None and False mean absent, as models pass them."""
    call(indices=None, block_indices=None, output_attentions=False, s_aux=None, softcap=None, unheard_of=None)


def test_dropout():
    with raises(ValueError, "`dropout`=0.1", "eval mode", "pass 0.0 unless `module.training`"):
        call(dropout=0.1)
    with raises(ValueError, "`dropout_p` must be 0 to 1, got 1.5"):
        call(dropout=1.5, training=True)
    call(dropout=0.0)


@pytest.mark.parametrize(
    "mask, got",
    [
        (torch.zeros(2, 6), "torch.float32 [2, 6]"),
        (torch.ones(2, 6, dtype=torch.bool), "torch.bool [2, 6]"),
        (torch.ones(2, 6, 6, dtype=torch.bool), "torch.bool [2, 6, 6]"),
        (torch.zeros(2, 1, 6, 7), "torch.float32 [2, 1, 6, 7]"),
        (torch.zeros(2, 3, 6, 6), "torch.float32 [2, 3, 6, 6]"),
        (torch.zeros(3, 1, 6, 6), "torch.float32 [3, 1, 6, 6]"),
        (torch.ones(2, 1, 6, 6, dtype=torch.long), "torch.int64 [2, 1, 6, 6]"),
        (span_mask(2, 6, 7), "SpanMask [2, 1, 6, 7]"),
        (span_mask(2, 5, 6), "SpanMask [2, 1, 5, 6]"),
        ({"full_attention": None}, "dict []"),
        ([[1, 0]], "list []"),
    ],
)
def test_masks_of_another_kind_or_shape(mask: Any, got: str):
    scores = "[batch, num_heads, query_len, key_len] = [2, 4, 6, 6]"
    with raises(ValueError, "`attention_mask` must be", scores, f"got {got}", "transformers.masking_utils"):
        call(mask)


def test_no_mask_and_unequal_lengths():
    with raises(ValueError, "`attention_mask`=None", "3 queries over 6 keys", "masking_utils", "is_causal=False"):
        attention_forward(torch.nn.Module().eval(), *tensors(3, 6), None)


def test_lengths_of_packed_documents():
    offsets = torch.tensor([0, 6])
    words = ("`cu_seq_lens_q` and `cu_seq_lens_k` go together", "batch of 1", "pack the documents into one row")
    with raises(ValueError, *words[:2], "got a batch of 2", words[2]):
        call(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)
    one = [tensor[:1] for tensor in tensors()]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        with raises(ValueError, *words[:2], "got only one of them", words[2]):
            attention_forward(torch.nn.Module().eval(), *one, None, **{name: offsets})


# ---------------------------------------------------------------------- every message of the plugin
def packed(offsets: list[int]) -> Any:
    """A batch of one with these offsets of documents, of queries and of keys."""
    one = [tensor[:1] for tensor in tensors()]
    given = torch.tensor(offsets)
    return attention_forward(torch.nn.Module().eval(), *one, None, cu_seq_lens_q=given, cu_seq_lens_k=given)


QUERIES = torch.zeros(BATCH, HEADS, TOKENS, 1)
OFFSETS = torch.tensor([0, 6])
PLUGIN_REFUSALS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "keyword": (lambda: call(unheard_of=1), ValueError, ("`unheard_of`=1 is refused: it is not known", EAGER)),
    "dropout": (lambda: call(dropout=0.1), ValueError, ("`dropout`=0.1 with a module in eval mode", "pass 0.0 unless")),
    "a mask written to under torch.compile": (
        lambda: support.refuse_writing("`.masked_fill_`"),
        RuntimeError,
        ("applied `.masked_fill_` to its attention mask under torch.compile", "make a new mask", "`mask.masked_fill`"),
    ),
    "absent weights": (
        lambda: AbsentWeights().shape,
        ValueError,
        ("`output_attentions` did not reach the attention function", "set `output_attentions=True`", EAGER),
    ),
    "a window of no keys": (
        lambda: attention_forward(torch.nn.Module().eval(), *tensors(), None, sliding_window=0),
        ValueError,
        ("`sliding_window` must be at least 1, got 0", "pass None for no window"),
    ),
    "a position bias for other keys beside a mask": (
        lambda: call(torch.zeros(BATCH, 1, TOKENS, TOKENS), position_bias=torch.zeros(1, HEADS, TOKENS, TOKENS + 1)),
        ValueError,
        (
            "`position_bias` must be a floating point tensor that broadcasts",
            "[2, 4, 6, 6], got torch.float32 [1, 4, 6, 7]",
        ),
    ),
    "sinks of tokens as those of heads": (
        lambda: call(s_aux=torch.zeros(BATCH, HEADS, TOKENS, 1)),
        ValueError,
        ("`s_aux` must be [num_heads]", "got torch.float32 [2, 4, 6, 1]", "differ between tokens are `sinks`"),
    ),
    "a factor for each column": (
        lambda: call(scaling=torch.ones(16, requires_grad=True)),
        ValueError,
        ("`scaling` must be one number, got torch.float32 [16]", "multiply the queries"),
    ),
    "a position bias for other keys": (
        lambda: call(position_bias=torch.zeros(2, 4, 6, 5)),
        ValueError,
        ("`position_bias` must be a floating point tensor that broadcasts", "got torch.float32 [2, 4, 6, 5]"),
    ),
    "a position bias of flags beside a mask": (
        lambda: call(torch.zeros(BATCH, 1, TOKENS, TOKENS), position_bias=torch.ones(HEADS, 1, TOKENS).bool()),
        ValueError,
        ("`position_bias` must be a floating point tensor", "got torch.bool [4, 1, 6]; slice or expand it"),
    ),
    "sinks of both kinds": (
        lambda: call(sinks=QUERIES, s_aux=torch.zeros(HEADS)),
        ValueError,
        ("`s_aux`", "and `sinks`", "exclude each other", "torch.logaddexp(sinks, s_aux[:, None, None])"),
    ),
    "sinks of tokens": (
        lambda: call(sinks=torch.zeros(3, HEADS, TOKENS, 1)),
        ValueError,
        (
            "`sinks` must be floating point and broadcast to",
            "= [2, 4, 6, 1]",
            "got torch.float32 [3, 4, 6, 1]",
            "`s_aux`",
        ),
    ),
    "alignment": (
        lambda: attention_forward(torch.nn.Module().eval(), *tensors(2, 6), None),
        ValueError,
        ("`attention_mask`=None", "2 queries over 6 keys is ambiguous", "is_causal=False"),
    ),
    "mask": (
        lambda: call(torch.zeros(6, 6)),
        ValueError,
        ("`attention_mask` must be what the registered mask function built", "got torch.float32 [6, 6]; build it with"),
    ),
    "mask of padding": (
        lambda: span_mask(2, 6, 6, attention_mask=torch.ones(3, 6)),
        ValueError,
        ("`attention_mask` must be [batch, tokens] with a batch of 2 or 1", "got [3, 6]", "bool or additive tensor"),
    ),
    "foreign use": (
        lambda: span_mask(1, 4, 4) + 1,
        TypeError,
        ("a model applied", "to its attention mask, so it computes attention", "cannot use this implementation", EAGER),
    ),
    "model at its first mask": (
        lambda: support.refuse_model(transformers.BloomModel.config_class()),
        ValueError,
        ("bloom computes attention in its own code (modeling_bloom.py does not leave it to", EAGER, "pass a dict"),
    ),
    "model while it is built": (
        lambda: self_computing("bloom", "my_triton"),
        ValueError,
        ("BloomModel computes attention in its own code (modeling_bloom.py does not", EAGER, "pass a dict"),
    ),
    "lengths of documents": (
        lambda: call(cu_seq_lens_q=OFFSETS, cu_seq_lens_k=OFFSETS),
        ValueError,
        ("`cu_seq_lens_q` and `cu_seq_lens_k` go together", "got a batch of 2; pack the documents into one row"),
    ),
    "lengths of more documents of queries than of keys": (
        lambda: attention_forward(
            torch.nn.Module().eval(),
            *[tensor[:1] for tensor in tensors()],
            None,
            cu_seq_lens_q=torch.tensor([0, 2, 4, 6]),
            cu_seq_lens_k=OFFSETS,
        ),
        ValueError,
        ("`cu_seq_lens_q` and `cu_seq_lens_k` must be [documents + 1]", "got [4] and [2]; a document without queries"),
    ),
    "lengths that are not cumulated": (
        lambda: packed([2, 4]),
        ValueError,
        ("`cu_seq_lens_q` must be a tensor of cumulative lengths, from 0 on", "got [2, 4]", "lengths.cumsum(0)"),
    ),
    "lengths in a list": (
        lambda: attention_forward(
            torch.nn.Module().eval(),
            *[tensor[:1] for tensor in tensors()],
            None,
            cu_seq_lens_q=[0, 6],
            cu_seq_lens_k=[0, 6],
        ),
        ValueError,
        ("`cu_seq_lens_q` must be a tensor of cumulative lengths", "got [0, 6]"),
    ),
    "cumulated lengths that fall": (lambda: packed([0, 4, 2, 6]), ValueError, ("`cu_seq_lens_q`", "got [0, 4, 2, 6]")),
    "cumulated lengths beyond the tokens": (
        lambda: packed([0, 4, 7]),
        ValueError,
        ("`cu_seq_lens_q`", "not beyond the 6 tokens there are, got [0, 4, 7]"),
    ),
    "selected keys": (
        lambda: call(indices=torch.zeros(BATCH, TOKENS, 3)),
        ValueError,
        (
            "`indices` must be integers [batch, query_len, selected] = [2, 6, 'any number']",
            "got torch.float32 [2, 6, 3]",
        ),
    ),
    "size of blocks": (
        lambda: call(block_indices=torch.zeros(BATCH, KV_HEADS, TOKENS, 1).long()),
        ValueError,
        ("`block_indices` needs `index_block_size`", "got None; hand over `indices` of keys instead"),
    ),
}
PLUGIN_FILES = [
    importlib.import_module(f"attention_plugin.{name}")
    for name in (
        "attention",
        "carried_mask",
        "documents",
        "kept_lengths",
        "masks",
        "reading",
        "selected_keys",
        "sources",
        "support",
        "token_sinks",
        "weights",
    )
]


@pytest.mark.parametrize("shape", [(6,), (2, 6, 6), (2, 1, 6, 6, 1), ()])
def test_masks_of_padding_of_another_shape(shape: tuple[int, ...]):
    with raises(ValueError, "`attention_mask` must be [batch, tokens]", f"got {list(shape)}"):
        span_mask(2, 6, 6, attention_mask=torch.ones(shape))


@pytest.mark.parametrize(
    "given",
    [{"sinks": [1.0]}, {"indices": [1]}, {"block_indices": [1]}, {"position_ids": [0, 1]}],
    ids=lambda given: next(iter(given)),
)
def test_arguments_that_are_no_tensors(given: dict[str, Any]):
    with raises(TypeError, "my_triton attention: ", f"`{next(iter(given))}` must be a tensor, got list"):
        call(**given)


def test_operands_of_another_shape():
    query, key, value = tensors()
    with raises(ValueError, "`query` must", "got"):
        attention_forward(torch.nn.Module().eval(), query[0], key, value, None)
    with raises(TypeError, "`query` must be a tensor, got list"):
        attention_forward(torch.nn.Module().eval(), [1.0], key, value, None)


def test_offsets_that_are_one_number():
    offsets = torch.tensor(0)
    with raises(ValueError, "my_triton attention: ", "`cu_seq_lens_q` must be a tensor of cumulative lengths"):
        attention_forward(
            torch.nn.Module().eval(), *(each[:1] for each in tensors()), None, cu_seq_lens_q=offsets,
            cu_seq_lens_k=offsets, max_length_q=1, max_length_k=1,
        )  # fmt: skip


@pytest.mark.parametrize("name", PLUGIN_REFUSALS)
def test_plugin(name: str):
    refused, error, words = PLUGIN_REFUSALS[name]
    with raises(error, "my_triton attention: ", *words):
        refused()


def messages_of(module: Any) -> set[tuple[str, int]]:
    """File and first line of each `raise` that says something of its own. `raise AttributeError(name)` is protocol."""
    file = inspect.getsourcefile(module)
    assert file is not None
    return {
        (file, node.lineno)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Raise) and ast.unparse(node) not in ("raise", "raise AttributeError(name)")
    }


def raised_at(refused: Callable[[], Any], error: type[Exception]) -> tuple[str, int]:
    """File and first line of the `raise` that a call reaches."""
    with pytest.raises(error) as caught:
        refused()
    last = caught.traceback[-1]
    return str(last.path), last.lineno + 1


def test_every_error_of_the_plugin_has_a_test():
    """Each `raise` is reached by one of the cases above, which read its words."""
    messages = set().union(*map(messages_of, PLUGIN_FILES))
    assert {raised_at(refused, error) for refused, error, _ in PLUGIN_REFUSALS.values()} == messages


def test_every_reason_for_refusing_a_keyword_is_read():
    assert support.REFUSED_KEYWORDS.keys() <= {name for name, _, _ in KEYWORDS}


# ---------------------------------------------------------------------- the operator


def operator(**changes: Any) -> Tensor:
    """The operator with some of its arguments replaced."""
    query, key, value = tensors()
    return attention(**{"query": query, "key": key, "value": value} | changes)


OPERATOR_REFUSALS: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], tuple[str, ...]]] = {
    "learned softcap": (
        lambda: {"softcap": torch.tensor(5.0, requires_grad=True)},
        ValueError,
        ("`softcap` must be a number, got a tensor that wants a gradient", "detach it"),
    ),
    "three dimensions": (
        lambda: {"query": torch.randn(4, 6, 8)},
        ValueError,
        ("`query` must be [batch, heads, tokens, dim]", "got [4, 6, 8]", "unsqueeze"),
    ),
    "mixed dtypes": (
        lambda: {"key": torch.randn(2, 2, 6, 8, dtype=torch.float16)},
        TypeError,
        ("must share one dtype", "'torch.float32', 'torch.float16', 'torch.float32'", "cast"),
    ),
    "integer dtype": (
        lambda: {name: torch.ones(2, 2, 6, 8, dtype=torch.int32) for name in ("query", "key", "value")},
        TypeError,
        ("must share one dtype of", "torch.bfloat16", "got", "torch.int32", "cast"),
    ),
    "mixed devices": (
        lambda: {"value": torch.randn(2, 2, 6, 8, device="meta")},
        ValueError,
        ("must be on one device", "'cpu', 'cpu', 'meta'", "move"),
    ),
    "batch": (
        lambda: {"key": torch.randn(3, 2, 6, 8)},
        ValueError,
        ("batch sizes of query, key, value must be equal or 1", "[2, 3, 2]"),
    ),
    "head dim": (
        lambda: {"key": torch.randn(2, 2, 6, 16)},
        ValueError,
        ("`query` and `key` must share the head dim", "8 and 16"),
    ),
    "value length": (
        lambda: {"value": torch.randn(2, 2, 7, 8)},
        ValueError,
        ("`key` and `value` must share heads and length", "[2, 2, 6, 8] and [2, 2, 7, 8]"),
    ),
    "groups": (
        lambda: {"key": torch.randn(2, 3, 6, 8), "value": torch.randn(2, 3, 6, 8)},
        ValueError,
        ("query heads must be a multiple", "4 and 3", "shard or repeat"),
    ),
    "no heads": (
        lambda: {"key": torch.randn(2, 0, 6, 8), "value": torch.randn(2, 0, 6, 8)},
        ValueError,
        ("must be a multiple", "4 and 0"),
    ),
    "wide heads": (
        lambda: {"query": torch.randn(2, 4, 6, 577), "key": torch.randn(2, 2, 6, 577)},
        ValueError,
        ("head dim of `query` must be 1 to 576", "got 577", EAGER),
    ),
    "wide values": (
        lambda: {"value": torch.randn(2, 2, 6, 513)},
        ValueError,
        ("head dim of `value` must be 1 to 512", "got 513", EAGER),
    ),
    "empty heads": (
        lambda: {"query": torch.randn(2, 4, 6, 0), "key": torch.randn(2, 2, 6, 0)},
        ValueError,
        ("head dim of `query` must be 1 to 576", "got 0", "a column at least"),
    ),
    "other queries": (
        lambda: {"spans": Spans.causal(5, 6)},
        ValueError,
        ("`spans` is for", "5 queries and 6 keys", "6 queries and 6 keys", "build it"),
    ),
    "other keys": (lambda: {"spans": Spans.causal(6, 7)}, ValueError, ("`spans` is for", "6 queries and 7 keys")),
    "other batch": (
        lambda: {"spans": Spans.padded(torch.arange(6) >= torch.arange(3)[:, None], 6)},
        ValueError,
        ("`spans` is for batch 3", "have batch 2"),
    ),
    "spans elsewhere": (
        lambda: {"spans": Spans.causal(6, device="meta")},
        ValueError,
        ("`spans` is on meta", "`query` on cpu", "spans.to("),
    ),
    "per-token sinks": (
        lambda: {"sinks": torch.randn(2, 4, 6)},
        ValueError,
        ("`sinks` must be floating point of shape [num_heads] = [4]", "torch.float32 [2, 4, 6]", "belong in `bias`"),
    ),
    "integer sinks": (lambda: {"sinks": torch.ones(4, dtype=torch.long)}, ValueError, ("`sinks`", "torch.int64 [4]")),
    "sinks elsewhere": (
        lambda: {"sinks": torch.randn(4, device="meta")},
        ValueError,
        ("`sinks` is on meta", "`query` on cpu", "move"),
    ),
    "softcap of zero": (
        lambda: {"softcap": 0.0},
        ValueError,
        ("`softcap` must be a positive number", "got 0.0", "pass None"),
    ),
    "negative softcap": (lambda: {"softcap": -1.0}, ValueError, ("`softcap`", "got -1.0")),
    "softcap of NaN": (lambda: {"softcap": float("nan")}, ValueError, ("`softcap`", "got nan")),
    "infinite softcap": (lambda: {"softcap": float("inf")}, ValueError, ("`softcap`", "got inf")),
    "infinite scale": (lambda: {"scale": float("inf")}, ValueError, ("`scale` must be finite", "got inf")),
    "scale of NaN": (lambda: {"scale": float("nan")}, ValueError, ("`scale` must be finite", "got nan")),
    "negative dropout": (
        lambda: {"dropout_p": -0.1},
        ValueError,
        ("`dropout_p` must be 0 to 1", "got -0.1", "the share that is dropped"),
    ),
    "no splits": (
        lambda: {"num_splits": 0},
        ValueError,
        ("`num_splits` must be whole and at least 1", "got 0", "pass None"),
    ),
    "a split of NaN": (lambda: {"num_splits": float("nan")}, ValueError, ("`num_splits` must be whole", "got nan")),
    "several scales": (
        lambda: {"scale": torch.ones(2)},
        TypeError,
        ("`scale` must be a number, got tensor([1., 1.])",),
    ),
    "several caps": (lambda: {"softcap": torch.ones(2)}, TypeError, ("`softcap` must be a number, got tensor([1.",)),
    "complex scale": (lambda: {"scale": 1j}, TypeError, ("`scale` must be a number, got 1j",)),
    "several dropouts": (lambda: {"dropout_p": torch.ones(2)}, ValueError, ("`dropout_p` must be 0 to 1",)),
    "a list as dropout": (lambda: {"dropout_p": []}, ValueError, ("`dropout_p` must be 0 to 1", "got []")),
    "sparse query": (
        lambda: {"query": torch.zeros(2, 4, 6, 8).to_sparse()},
        TypeError,
        ("`query` must be a dense tensor, got one of layout torch.sparse_coo", "Tensor.to_dense"),
    ),
    "nested query": (
        lambda: {"query": torch.nested.nested_tensor([torch.zeros(4, 6, 8), torch.zeros(4, 5, 8)])},
        TypeError,
        ("`query` must be a dense tensor, got a nested one", "to_padded_tensor"),
    ),
    "half a split": (lambda: {"num_splits": 1.5}, ValueError, ("`num_splits` must be whole", "got 1.5")),
    "numbers as text": (lambda: {"softcap": "30"}, TypeError, ("`softcap` must be a number, got '30'", "pass None")),
    "scale as text": (lambda: {"scale": "2"}, TypeError, ("`scale` must be a number, got '2'",)),
    "dropout as text": (lambda: {"dropout_p": "0.1"}, ValueError, ("`dropout_p` must be 0 to 1", "got '0.1'")),
    "no dropout": (lambda: {"dropout_p": None}, ValueError, ("`dropout_p` must be 0 to 1", "got None")),
    "a list as query": (
        lambda: {"query": [[1.0]], "dropout_p": 0.5},
        TypeError,
        ("`query` must be a tensor, got list", "torch.as_tensor"),
    ),
    "an array as key": (lambda: {"key": np.zeros((2, 2, 6, 8))}, TypeError, ("`key` must be a tensor, got ndarray",)),
    "no value": (lambda: {"value": None}, TypeError, ("`value` must be a tensor, got NoneType",)),
    "a list of sinks": (lambda: {"sinks": [0.0] * 4}, TypeError, ("`sinks` must be a tensor, got list",)),
    "a list as mask": (lambda: {"mask": [[True]]}, TypeError, ("`mask` must be a tensor, got list",)),
    "dropout in percent": (lambda: {"dropout_p": 10}, ValueError, ("`dropout_p` must be 0 to 1", "got 10")),
    "dropout of NaN": (lambda: {"dropout_p": float("nan")}, ValueError, ("`dropout_p` must be 0 to 1", "got nan")),
    "seed of another shape": (
        lambda: {"dropout_p": 0.1, "dropout_seed": torch.tensor(3)},
        ValueError,
        ("`dropout_seed` must be int64 of shape [1] on cpu", "got torch.int64 []", "leave it out"),
    ),
    "seed of another dtype": (
        lambda: {"dropout_p": 0.1, "dropout_seed": torch.zeros(1)},
        ValueError,
        ("`dropout_seed` must be int64", "got torch.float32 [1]"),
    ),
    "seed elsewhere": (
        lambda: {"dropout_p": 0.1, "dropout_seed": torch.zeros(1, dtype=torch.int64, device="meta")},
        ValueError,
        ("`dropout_seed` must be int64 of shape [1] on cpu", "on meta"),
    ),
    "additive mask": (
        lambda: {"mask": torch.zeros(6, 6)},
        TypeError,
        ("`mask` must be bool", "`bias` floating point", "got `mask` of torch.float32"),
    ),
    "boolean bias": (
        lambda: {"bias": torch.ones(6, 6, dtype=torch.bool)},
        TypeError,
        ("`mask` must be bool", "got `bias` of torch.bool"),
    ),
    "integer bias": (
        lambda: {"bias": torch.ones(6, 6, dtype=torch.long)},
        TypeError,
        ("`bias` floating point", "got `bias` of torch.int64"),
    ),
    "mask of a wrong shape": (
        lambda: {"mask": torch.ones(6, 7, dtype=torch.bool)},
        ValueError,
        ("`mask` of shape [6, 7] does not broadcast", "[2, 4, 6, 6]", "slice or expand"),
    ),
    "bias of five dimensions": (
        lambda: {"bias": torch.zeros(1, 1, 1, 6, 6)},
        ValueError,
        ("`bias` of shape [1, 1, 1, 6, 6] does not broadcast", "[2, 4, 6, 6]"),
    ),
    "no query heads": (
        lambda: {"query": torch.randn(2, 0, 6, 8)},
        ValueError,
        ("query heads must be a multiple", "0 and 2", "each group is whole"),
    ),
    "a dense mask as spans": (
        lambda: {"spans": torch.ones(6, 6, dtype=torch.bool)},
        TypeError,
        ("`spans` must be Spans, got Tensor", "pass a dense mask as `mask`"),
    ),
    "a number as seed": (
        lambda: {"dropout_p": 0.1, "dropout_seed": 3},
        TypeError,
        ("`dropout_seed` must be an int64 tensor", "got int", "leave it out"),
    ),
    "bias elsewhere": (
        lambda: {"bias": torch.zeros(6, 6, device="meta")},
        ValueError,
        ("`bias` is on meta", "`query` on cpu", "move"),
    ),
}


@pytest.mark.parametrize("name", OPERATOR_REFUSALS)
def test_operator(name: str):
    changes, error, words = OPERATOR_REFUSALS[name]
    with raises(error, "attention: ", *words) as caught:
        operator(**changes())
    assert "; " in str(caught.value), "no alternative is named"


def test_operator_errors_reach_through_the_attention_function():
    """A model hands over what it likes; the operator's words are the ones its user reads."""
    with raises(ValueError, "query heads must be a multiple", "4 and 3"):
        query = torch.randn(BATCH, 4, 6, 8)
        attention_forward(torch.nn.Module().eval(), query, *torch.randn(2, BATCH, 3, 6, 8), span_mask(2, 6, 6))
    with raises(ValueError, "`sinks` must be", "[num_heads] = [4]", "[5]"):
        call(s_aux=torch.randn(5))
    with raises(ValueError, "`softcap`", "-2"):
        call(softcap=-2.0)


@pytest.mark.parametrize("given", [2.5, True])
def test_a_window_that_is_no_number_of_keys_is_refused_by_its_name(given: Any):
    """Not by the name of what is made of it, nor taken for a window of one key."""
    with raises(TypeError, f"`sliding_window` must be a whole number, got {given}"):
        attention_forward(torch.nn.Module().eval(), *tensors(), None, sliding_window=given)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap], ids=["grad", "vmap"])
def test_transforms_of_torch_func_are_refused_beside_padding(transform: Any):
    """Building the mask does not fail first, in words of torch's own."""
    query, key, value = tensors()
    padding = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * TOKENS])

    def loss(query: Tensor) -> Tensor:
        mask = span_mask(BATCH, TOKENS, TOKENS, attention_mask=padding)
        return attention_forward(torch.nn.Module().eval(), query, key, value, mask)[0].sum()

    with raises(RuntimeError, "transforms of torch.func", "are not served", EAGER):
        transform(loss)(query[None] if transform is torch.func.vmap else query)


@pytest.fixture
def no_architecture_cached():
    configs._architecture.cache_clear()
    yield
    configs._architecture.cache_clear()


@pytest.mark.usefixtures("no_architecture_cached")
@pytest.mark.parametrize("capability", [(7, 5), (6, 1)])
def test_gpu_without_support(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    monkeypatch.setattr(paths, "triton_installed", lambda: True)
    monkeypatch.setattr(paths, "interpreting", lambda: False)
    name = f"sm_{capability[0]}{capability[1]}"
    tensor = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)
    with raises(RuntimeError, "GPU 'Old Card'", name, "not supported", "sm_90", 'attn_implementation="sdpa"', "CPU"):
        paths.runs_triton(tensor)


@pytest.mark.usefixtures("no_architecture_cached")
@pytest.mark.parametrize("capability", [(8, 0), (8, 7), (9, 0), (10, 3), (12, 1)])
def test_gpu_with_support(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(paths, "triton_installed", lambda: True)
    monkeypatch.setattr(paths, "interpreting", lambda: False)
    assert paths.runs_triton(SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16))


def test_other_paths_are_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """What runs in torch although one may expect a kernel says so; plain CPU tensors are no surprise."""
    paths.log_once.cache_clear()
    monkeypatch.setattr(paths, "interpreting", lambda: False)
    for _ in range(2):
        for device, dtype in (("cuda", torch.float64), ("mps", torch.float16), ("cpu", torch.float32)):
            assert not paths.runs_triton(SimpleNamespace(device=torch.device(device), dtype=dtype))
        monkeypatch.setattr(paths, "triton_installed", lambda: False)
        assert not paths.runs_triton(SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16))
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 3
    assert "float64" in messages[0] and "mps" in messages[1] and "pip install triton" in messages[2]


# ---------------------------------------------------------------------- spans


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


HOLES = Spans.padded(torch.tensor([[True, False, True]]), 3)
SPANS_REFUSALS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "start of another dtype": (
        lambda: Spans(torch.zeros(1, 3), int32(1, 3), 3, 3),
        ("`start` must be int32", "[batch or 1, 3 or 1]", "torch.float32 [1, 3]", "Spans.causal"),
    ),
    "end of another length": (lambda: Spans(int32(1, 3), int32(1, 2), 3, 3), ("`end` must be int32", "int32 [1, 2]")),
    "end of one dimension": (lambda: Spans(int32(1, 3), int32(3), 3, 3), ("`end` must be int32", "int32 [3]")),
    "key mask alone": (
        lambda: Spans(int32(1, 3), int32(1, 3), 3, 3, key_mask=torch.ones(1, 3, dtype=torch.bool)),
        ("`key_mask` and `gap_count` go together", "Spans.padded"),
    ),
    "key mask of another length": (
        lambda: Spans(int32(1, 3), int32(1, 3), 3, 3, torch.ones(1, 4, dtype=torch.bool), int32(1)),
        ("`key_mask` must be bool [batch or 1, key_len] with 3 keys", "got torch.bool [1, 4]", "Spans.padded"),
    ),
    "key mask of another dtype": (
        lambda: Spans(int32(1, 3), int32(1, 3), 3, 3, int32(1, 3), int32(1)),
        ("`key_mask` must be bool", "got torch.int32 [1, 3]", "Spans.padded"),
    ),
    "gaps in a column": (
        lambda: Spans(int32(1, 3), int32(1, 3), 3, 3, torch.ones(1, 3, dtype=torch.bool), int32(1, 1)),
        ("`gap_count` must be int32 [batch or 1]", "got torch.int32 [1, 1]", "Spans.padded"),
    ),
    "batches": (
        lambda: Spans(int32(2, 3), int32(3, 3), 3, 3),
        ("`start` and `end` must have one batch", "got [2, 3]", "slice or expand"),
    ),
    "batches of padding": (
        lambda: Spans(int32(2, 3), int32(1, 3), 3, 3, torch.ones(2, 3, dtype=torch.bool), int32(3)),
        ("`start`, `end`, `key_mask` and `gap_count` must have one batch", "got [2, 1, 2, 3]", "slice or expand"),
    ),
    "devices": (
        lambda: Spans(int32(1, 3), int32(1, 3).to("meta"), 3, 3),
        ("`start` and `end` must be on one device", "got ['cpu', 'meta']", "Tensor.to"),
    ),
    "fewer tokens than none": (
        lambda: Spans.full(-1),
        ("`query_len` and `key_len` must be at least 0", "got -1 and -1"),
    ),
    "fewer keys than none": (
        lambda: Spans.causal(2, -3),
        ("`query_len` and `key_len` must be at least 0", "got 2 and -3", "numbers of tokens"),
    ),
    "left": (lambda: Spans.sliding(3, left=-1), ("`left` must be None or at least 0", "got -1")),
    "right": (lambda: Spans.sliding(3, left=None, right=-2), ("`right` must be None or at least 0", "got -2")),
    "chunk": (lambda: Spans.chunked(3, chunk_size=0), ("`chunk_size` must be at least 1", "got 0")),
    "no lengths": (lambda: Spans.packed_lengths([]), ("`lengths` must hold numbers of at least 0", "got []")),
    "negative length": (lambda: Spans.packed_lengths([2, -1]), ("`lengths`", "got [2, -1]")),
    "offsets of different lengths": (
        lambda: Spans.packed_offsets(int32(3), int32(2), 3, 3),
        ("`query_offsets` and `key_offsets` must have one dimension", "at least 2", "[3] and [2]"),
    ),
    "one offset": (lambda: Spans.packed_offsets(int32(1), int32(1), 3, 3), ("at least 2", "[1] and [1]")),
    "offsets of two dimensions": (
        lambda: Spans.packed_offsets(int32(1, 3), int32(1, 3), 3, 3),
        ("must have one dimension", "[1, 3] and [1, 3]"),
    ),
    "integer padding": (
        lambda: Spans.padded(torch.ones(1, 3, dtype=torch.long), 3),
        ("`key_mask` must be bool [batch, key_len]", "torch.int64 [1, 3]"),
    ),
    "padding of one dimension": (lambda: Spans.padded(torch.ones(3, dtype=torch.bool), 3), ("torch.bool [3]",)),
    "ids of one dimension": (
        lambda: Spans.packed(int32(3)),
        (".packed: `document_ids` must be [batch, tokens]", "got [3]"),
    ),
    "block ids of one dimension": (
        lambda: Spans.blocks(int32(1, 2, 3)),
        (".blocks: `block_ids` must be [batch, tokens]", "[1, 2, 3]"),
    ),
    "block ids without a batch": (lambda: Spans.blocks(int32(3)), ("got [3]", "put a batch of one before them")),
    "chunks of fewer tokens than none": (
        lambda: Spans.chunked(-1, chunk_size=2),
        ("`query_len` and `key_len` must be at least 0", "got -1 and -1"),
    ),
    "additive mask": (
        lambda: Spans.from_dense(torch.zeros(1, 2, 3)),
        ("`mask` must be bool [batch, query_len, key_len]", "torch.float32 [1, 2, 3]", "pass `mask == 0`"),
    ),
    "mask with heads": (
        lambda: Spans.from_dense(torch.ones(1, 1, 2, 3, dtype=torch.bool)),
        ("torch.bool [1, 1, 2, 3]", "one head's"),
    ),
    "union with a gap": (
        lambda: Spans.packed_lengths([1, 2]) | Spans.full(3) & Spans(int32(1, 1) + 2, int32(1, 1) + 3, 3, 3),
        ("leaves a gap", "dense `mask`"),
    ),
    "union with holes": (lambda: Spans.causal(3) | HOLES, ("padding in the middle is no span", "Spans.padded after")),
    "other lengths": (
        lambda: Spans.causal(3) & Spans.causal(3, 4),
        ("query_len x key_len of 3 x 3 with 3 x 4", "build both for the same lengths"),
    ),
    "other lengths in a union": (lambda: Spans.causal(2, 3) | Spans.causal(3), ("2 x 3 with 3 x 3",)),
    "blocks for fewer queries than none": (
        lambda: Spans.blocks(int32(1, 3), -1),
        ("`query_len` and `key_len` must be at least 0", "got -1 and 3"),
    ),
    "documents for fewer queries than none": (
        lambda: Spans.packed_offsets(int32(2), int32(2), -1, 3),
        ("`query_len` and `key_len` must be at least 0", "got -1 and 3"),
    ),
    "spans of other samples": (
        lambda: Spans(int32(2, 3), int32(2, 3), 3, 3) & Spans(int32(3, 3), int32(3, 3), 3, 3),
        ("cannot combine spans of 2 samples with those of 3", "same batch"),
    ),
    "every second row": (
        lambda: Spans.causal(3).cut(slice(None, None, 2), slice(None)),
        (".cut: `rows` and `keys` must be slices of step 1", "slice(None, None, 2)", "one by one"),
    ),
    "tiles of no rows": (lambda: Spans.causal(3).tile_bounds(0), ("`block_m` must be at least 1", "got 0")),
}


@pytest.mark.parametrize("name", SPANS_REFUSALS)
def test_spans(name: str):
    make, words = SPANS_REFUSALS[name]
    with raises(ValueError, "Spans", *words):
        make()


WHOLE = "must be a whole number"
SPANS_OF_OTHER_TYPES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "half a token": (lambda: Spans.causal(2.5), ("`query_len`", WHOLE, "got 2.5", "see int")),
    "keys of NaN": (lambda: Spans.full(2, math.nan), ("`key_len`", WHOLE, "got nan")),
    "tokens as text": (lambda: Spans.chunked("2", chunk_size=1), ("`query_len`", WHOLE, "got '2'")),
    "several lengths": (
        lambda: Spans.causal(torch.tensor([2, 3])),
        ("`query_len`", WHOLE, "got torch.int64 [2]; see Tensor.long"),
    ),
    "length of padding": (lambda: Spans.padded(torch.ones(1, 3) > 0, 1.5), ("`query_len`", WHOLE, "got 1.5")),
    "half an offset": (
        lambda: Spans.causal(2, 4, offset=torch.tensor(1.5)),
        ("`offset`", WHOLE, "got torch.float32 []; see Tensor.long"),
    ),
    "an offset for each": (lambda: Spans.causal(2, 4, offset=torch.tensor([1, 2])), ("`offset`", WHOLE)),
    "half of a window": (lambda: Spans.sliding(3, left=1.5), (".sliding: `left`", WHOLE, "got 1.5")),
    "a window that is true": (lambda: Spans.sliding(3, left=True), (".sliding: `left`", WHOLE, "got True")),
    "half of an array": (lambda: Spans.sliding(3, left=np.array(1.5)), (".sliding: `left`", WHOLE, "array(1.5)")),
    "right as text": (lambda: Spans.sliding(3, left=1, right="0"), (".sliding: `right`", WHOLE, "got '0'")),
    "half of a chunk": (lambda: Spans.chunked(3, chunk_size=1.5), (".chunked: `chunk_size`", WHOLE)),
    "chunks from a half": (
        lambda: Spans.chunked(3, chunk_size=2, first=torch.tensor([0.5])),
        (".chunked: `first` must be integers", "got torch.float32 [1]"),
    ),
    "half a document": (lambda: Spans.packed_lengths([2, 1.5]), (".packed_lengths: `lengths[1]`", "got 1.5")),
    "no list of lengths": (
        lambda: Spans.packed_lengths(None),
        (".packed_lengths: `lengths` must be a sequence, got None", "put a single length in a list"),
    ),
    "one length": (lambda: Spans.packed_lengths(torch.tensor(3)), ("`lengths` must be a sequence, got tensor(3)",)),
    "offsets of halves": (
        lambda: Spans.packed_offsets(torch.tensor([0, 1.5]), int32(2), 3, 3),
        (".packed_offsets: `query_offsets` must be integers", "got torch.float32 [2]; see Tensor.long"),
    ),
    "a list of offsets": (
        lambda: Spans.packed_offsets(int32(2), [0, 3], 3, 3),
        (".packed_offsets: `key_offsets` must be a tensor, got list", "torch.as_tensor"),
    ),
    "ids that are no integers": (
        lambda: Spans.packed(torch.zeros(1, 3)),
        (".packed: `document_ids` must be a tensor of integers, got torch.float32", "Tensor.long"),
    ),
    "a list of ids": (
        lambda: Spans.blocks([[0, 1]]),
        (".blocks: `block_ids` must be a tensor of integers, got list", "torch.as_tensor"),
    ),
    "a list as padding": (lambda: Spans.padded([True], 1), (".padded: `key_mask` must be a tensor, got list",)),
    "a list as mask": (lambda: Spans.from_dense([[[True]]]), (".from_dense: `mask` must be a tensor, got list",)),
    "a list of starts": (lambda: Spans([0], int32(1, 1), 1, 1), ("`start` must be a tensor, got list",)),
    "spans and a mask": (
        lambda: Spans.causal(3) & torch.ones(3, 3, dtype=torch.bool),
        ("spans combine with spans only, got Tensor", "Spans.from_dense", "dense `mask`"),
    ),
    "spans or nothing": (lambda: Spans.causal(3) | None, ("spans combine with spans only, got NoneType",)),
    "rows that are no slice": (lambda: Spans.causal(3).cut(1, slice(2)), ("`rows` must be a slice, got int",)),
}


@pytest.mark.parametrize("name", SPANS_OF_OTHER_TYPES)
def test_spans_of_what_is_something_else(name: str):
    make, words = SPANS_OF_OTHER_TYPES[name]
    with raises(TypeError, "Spans", *words) as caught:
        make()
    assert "; " in str(caught.value), "no alternative is named"


def test_every_error_of_arguments_has_a_test():
    """Each `raise` about what the operator and spans are given is reached by one of the cases above."""
    messages = set().union(*map(messages_of, (checks, call_checks, library, paths, spans)))
    reached = {raised_at(partial(operator, **changes()), error) for changes, error, _ in OPERATOR_REFUSALS.values()}
    reached |= {raised_at(make, ValueError) for make, _ in SPANS_REFUSALS.values()}
    reached |= {raised_at(make, TypeError) for make, _ in SPANS_OF_OTHER_TYPES.values()}
    assert reached == {place for place in messages if not raises_at_run_time(*place)}


def raises_at_run_time(file: str, line: int) -> bool:
    """Whether that refuses what is no argument: a device, a transform of torch's, gradients of gradients."""
    return "raise RuntimeError(" in linecache.getline(file, line)


@pytest.mark.parametrize("lengths", [torch.tensor([2, 1]), np.array([2, 1]), (2, np.int64(1)), iter([2, 1])])
def test_lengths_may_be_any_whole_numbers(lengths: Any):
    spans = Spans.packed_lengths(lengths)
    assert torch.equal(spans.to_dense(), Spans.packed_lengths([2, 1]).to_dense())
    assert torch.equal(Spans.causal(np.int32(3)).to_dense(), Spans.causal(3).to_dense())


# ---------------------------------------------------------------------- models that compute attention themselves

SELF_COMPUTING: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 1, "n_head": 2, "hidden_size": 16},
    "falcon": {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16},
    "gptj": {"n_layer": 1, "n_head": 2, "n_embd": 16, "rotary_dim": 4, "n_positions": 32},
    "codegen": {"n_layer": 1, "n_head": 4, "n_embd": 32, "rotary_dim": 4, "n_positions": 32},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 1},
    "rembert": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "input_embedding_size": 16, "output_embedding_size": 16, "is_decoder": True,
    },
    "roformer": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "is_decoder": True, "embedding_size": 16,
    },
    "xglm": {"d_model": 16, "ffn_dim": 16, "num_layers": 1, "attention_heads": 2, "max_position_embeddings": 32},
}  # fmt: skip
if not EARLIER_THAN_5_24:  # which leave it to the interface since
    del SELF_COMPUTING["gptj"], SELF_COMPUTING["codegen"]


def self_computing(model_type: str, implementation: str) -> Any:
    config = CONFIG_MAPPING[model_type](vocab_size=41, bos_token_id=1, eos_token_id=2, **SELF_COMPUTING[model_type])
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


@pytest.mark.parametrize("model_type", SELF_COMPUTING)
def test_models_are_refused_while_they_are_built(model_type: str):
    words = ("computes attention in its own code", f"modeling_{model_type}.py", "AttentionInterface", EAGER)
    with raises(ValueError, *words, "attn_implementation={"):
        self_computing(model_type, "my_triton")


@pytest.mark.parametrize("model_type", ["bloom", "falcon"])
def test_models_are_refused_while_they_are_loaded(model_type: str, tmp_path):
    self_computing(model_type, "eager").save_pretrained(tmp_path)
    with raises(ValueError, "computes attention in its own code", f"modeling_{model_type}.py", EAGER):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="my_triton")
    assert AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager") is not None


@pytest.mark.parametrize("model_type", SELF_COMPUTING)
def test_models_are_refused_at_their_first_forward(model_type: str, caplog: pytest.LogCaptureFixture):
    """The implementation is set when the model is already there; transformers' own switch leaves it as it was."""
    model = self_computing(model_type, "eager")
    tokens = torch.randint(5, 41, (2, 6))
    attention_mask = (torch.arange(6) >= torch.tensor([[0], [2]])).long()
    expected = model(tokens, attention_mask=attention_mask).logits
    model.set_attn_implementation("my_triton")
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(tokens, attention_mask=attention_mask).logits, expected)
    model.config._attn_implementation = "my_triton"
    for inputs in ({}, {"attention_mask": attention_mask}):
        with raises(ValueError, model_type, "computes attention in its own code", EAGER):
            model(tokens, **inputs)


def test_every_causal_model_that_computes_attention_itself_is_refused():
    """By the text of the modeling files: attention classes without a call of the interface."""
    refused, served, partly = set(), set(), set()
    for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        module_name = getattr(transformers, class_name).__module__
        code = inspect.getsource(sys.modules[module_name])
        calls_interface = "ALL_ATTENTION_FUNCTIONS.get_interface(" in code
        has_attention = re.search(r"^class \w*(?:Attention|Attn)\w*\(", code, re.MULTILINE) is not None
        uses_interface = sources.leaves_attention(module_name) and not sources.models_from_tables(module_name)
        if has_attention and not calls_interface:
            assert not uses_interface, f"{model_type}: computes attention itself and is not refused"
        if calls_interface and not uses_interface:
            partly.add(model_type)
        (served if uses_interface else refused).add(model_type)
    assert refused >= {*SELF_COMPUTING, "big_bird", "gpt_neo", "openai-gpt", "reformer", "xlm", "xlnet"}
    assert served >= {"llama", "gemma2", "gpt_oss", "bert", "bart", "opt", "gpt2", "mistral", "qwen3", "whisper", "phi"}
    assert len(served) > 100
    assert partly == {"git"}  # its vision tower calls the interface, its text layers come from a table of classes


@pytest.mark.parametrize(
    ("line", "served"),
    [
        ("attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)", True),
        ("attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]", True),
        ('attend = ALL_ATTENTION_FUNCTIONS["sdpa"]', False),
        ("attend = torch.nn.functional.scaled_dot_product_attention", False),
    ],
)
def test_code_of_earlier_transformers_calls_the_interface_too(line: str, served: bool, tmp_path, monkeypatch):
    """As models on the Hub do that carry their own code."""
    name = f"modeling_of_the_hub_{zlib.crc32(line.encode())}"  # what a file says is remembered by its name
    (tmp_path / f"{name}.py").write_text(
        f"from torch import nn\nclass HubAttention(nn.Module):\n    def forward(self, hidden):\n        {line}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(name)
    assert sources.leaves_attention(name) == served == sources.calls_interface(name)


def test_modules_without_source_get_the_benefit_of_the_doubt():
    assert sources.leaves_attention("a_module_that_is_not_there")


# ---------------------------------------------------------------------- computing with a mask

ONES = torch.ones(1, 1, 4, 4)
FOREIGN_USES: dict[str, Callable[[SpanMask], Any]] = {
    "mask + tensor": lambda mask: mask + ONES,
    "tensor + mask": lambda mask: ONES + mask,
    "mask - number": lambda mask: mask - 1,
    "number - mask": lambda mask: 1.0 - mask,
    "mask * number": lambda mask: mask * 2,
    "tensor * mask": lambda mask: ONES * mask,
    "mask / number": lambda mask: mask / 2,
    "number / mask": lambda mask: 2 / mask,
    "-mask": lambda mask: -mask,
    "~mask": lambda mask: ~mask,
    "abs": abs,
    "mask @ mask": lambda mask: mask @ mask,
    "mask & tensor": lambda mask: mask & ONES.bool(),
    "tensor & mask": lambda mask: ONES.bool() & mask,
    "tensor | mask": lambda mask: ONES.bool() | mask,
    "tensor ^ mask": lambda mask: ONES.bool() ^ mask,
    "power": lambda mask: mask**2,
    "comparison": lambda mask: mask == 0,
    "order": lambda mask: mask > 0,
    "tensor == mask": lambda mask: mask == ONES,
    "truth": lambda mask: "yes" if mask else "no",
    "float": float,
    "slice": lambda mask: mask[:, :, :, :3],
    "assignment": lambda mask: mask.__setitem__(0, 1),
    "index": lambda mask: ONES[mask],
    "membership": lambda mask: 1 in mask,
    "iteration": list,
    "length": len,
    "where": lambda mask: torch.where(mask, 0.0, 1.0),
    "masked_fill": lambda mask: ONES.masked_fill(mask, 0.0),
    "cat": lambda mask: torch.cat([mask, mask]),
    "logical_not": torch.logical_not,
    "attention": lambda mask: torch.nn.functional.scaled_dot_product_attention(ONES, ONES, ONES, attn_mask=mask),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("use", FOREIGN_USES)
def test_computing_with_a_mask(use: str):
    with raises(TypeError, "my_triton attention: a model applied", "to its attention mask", EAGER):
        FOREIGN_USES[use](span_mask(1, 4, 4))


@pytest.mark.parametrize("name", ["dtype", "float", "masked_fill", "expand", "sum", "unsqueeze", "stride", "is_cuda"])
def test_attributes_of_tensors(name: str):
    """An AttributeError, so that `hasattr` says no."""
    with raises(AttributeError, f"`.{name}`", "to its attention mask", EAGER):
        getattr(span_mask(1, 4, 4), name)
    assert not hasattr(span_mask(1, 4, 4), name)


def test_masks_can_be_copied_and_hashed():
    mask = span_mask(1, 4, 4)
    assert torch.equal(copy.deepcopy(mask).to_dense(), mask.to_dense())
    assert len({mask, mask}) == 1
