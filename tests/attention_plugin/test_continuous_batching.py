# SPDX-License-Identifier: Apache-2.0
"""transformers' continuous batching runs this attention and gives the tokens that eager gives one by one."""

import copy
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
)
from transformers.generation.continuous_batching import cache, continuous_api, input_outputs
from transformers.generation.continuous_batching import utils as batching_utils
from transformers.utils import generic

import attention_plugin
from attention_kernels import attention_reference
from attention_plugin import support
from attention_plugin.engines import batched_attention, continuous_batching, flash_gates

from helpers import DEVICE, EARLIER_THAN_5_24, assert_within_bound
from tiny_models import VOCAB_SIZE, build

if Version(transformers.__version__) < Version(flash_gates.MINIMUM_VERSION):
    pytest.skip("continuous batching is served from a later transformers on", allow_module_level=True)

NEW_TOKENS = 12
LOGPROB_TOLERANCE = 2e-4
TINY = ["llama", "gemma2", "gpt_oss", "mistral", "phimoe", "qwen3"]
"""Full layers; softcap, or sinks, with a window; windows only, passed on or left to the mask; normalised heads."""


@pytest.fixture(autouse=True)
def unregister() -> Iterator[None]:
    """Takes names that a test registers away again."""
    tables = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    before, names = [dict(table) for table in tables], set(support.registered_names)
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    support.registered_names.clear()
    support.registered_names.update(names)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, keys) of each call to attention over the paged cache."""
    seen: list[tuple[int, int]] = []
    built = batched_attention.request_spans

    def counting(*args: Any):
        spans = built(*args)
        seen.append((spans.query_len, spans.key_len))
        return spans

    monkeypatch.setattr(batched_attention, "request_spans", counting)
    return seen


def settings(**options: Any) -> dict[str, Any]:
    """Greedy generation of exactly `NEW_TOKENS` tokens, in a small cache."""
    eos = options.pop("eos_token_id", -1)
    cache_options = {"page_size": 8, "num_blocks": 64, "max_batch_tokens": 32, "use_cuda_graph": False} | options
    return {
        "generation_config": GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos, pad_token_id=0
        ),
        "continuous_batching_config": ContinuousBatchingConfig(**cache_options),
    }


def one_by_one(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """Tokens of `generate`, request by request."""
    config = settings()["generation_config"]
    outputs = []
    for prompt in prompts:
        tokens = torch.tensor([prompt], device=model.device)
        sequence = model.generate(tokens, generation_config=config, attention_mask=torch.ones_like(tokens), **options)
        outputs.append(sequence[0, len(prompt) :].tolist())
    return outputs


@torch.no_grad()
def batched(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """Tokens of `generate_batch`, which are as likely as `model` finds them in one pass without a cache."""
    outputs = model.generate_batch(prompts, **settings(return_logprobs=True, **options)).values()
    assert [output.error for output in outputs] == [None] * len(prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = model(torch.tensor([prompt + output.generated_tokens], device=model.device)).logits[0].float()
        chosen = torch.tensor(output.generated_tokens, device=model.device)[:, None]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, chosen)[:, 0]
        torch.testing.assert_close(torch.tensor(output.logprobs), expected.cpu(), rtol=0, atol=LOGPROB_TOLERANCE)
    return [list(output.generated_tokens) for output in outputs]


def random_prompts(lengths: list[int], vocab_size: int = VOCAB_SIZE, shared: int = 0) -> list[list[int]]:
    torch.manual_seed(7)
    prefix = torch.randint(3, vocab_size, (shared,)).tolist()
    return [prefix + torch.randint(3, vocab_size, (length,)).tolist() for length in lengths]


def tiny_pair(model_type: str) -> tuple[Any, Any]:
    """The model enabled, and the same under eager."""
    changes = {"max_position_embeddings": 256}
    eager = build(model_type, "eager", **changes)
    ours = build(model_type, "my_triton", eager.state_dict(), **changes)
    return attention_plugin.enable_continuous_batching(ours.to(DEVICE)), eager.to(DEVICE)


# ---------------------------------------------------------------------- spans of a batch of requests


@pytest.mark.parametrize("window", [None, 2, 4, 100])
def test_request_spans(window: int | None):
    """Against the mask that transformers writes down for its sdpa path, with padding behind the last request."""
    queries, keys, spare = [3, 1, 0, 5, 1], [3, 9, 0, 11, 1], 2
    query_offsets, key_offsets = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys))
    query_len, key_len = sum(queries) + spare, sum(keys) + spare
    dense = torch.full((query_len, key_len), torch.finfo(torch.float32).min)
    # A window of 1 stands for none there.
    batching_utils.build_attention_mask(dense, query_offsets.tolist(), key_offsets.tolist(), window or 1)
    spans = batched_attention.request_spans(query_offsets, key_offsets, query_len, key_len, window)
    assert torch.equal(spans.to_dense()[0], dense == 0)


# ---------------------------------------------------------------------- tokens


@pytest.mark.parametrize("page_size", [4, 16, 64])
def test_reference_checkpoint(checkpoint_dir: Any, calls: list, page_size: int):
    """Prompts shorter and longer than the window of 128, some sharing their beginning, more than fit at once."""
    load = AutoModelForCausalLM.from_pretrained
    models = {
        name: load(checkpoint_dir, trust_remote_code=True, attn_implementation=name).to(DEVICE)
        for name in ("eager", "my_triton")
    }
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    texts = ["Return the", "If the file is not found,\n" * 20, "This class", "x", "If the file is not found,\n" * 7]
    prompts = tokenizer(texts)["input_ids"]
    assert max(map(len, prompts)) > 128
    ours = attention_plugin.enable_continuous_batching(models["my_triton"])
    expected = one_by_one(models["eager"], prompts)
    tokens = batched(ours, prompts, page_size=page_size, num_blocks=512 // page_size, max_batch_tokens=48)
    assert tokens == expected
    assert calls
    for implementation in (None, "static"):
        options = {} if implementation is None else {"cache_implementation": implementation, "disable_compile": True}
        assert one_by_one(ours, prompts[:3], **options) == expected[:3]


@pytest.mark.parametrize("model_type", TINY)
def test_tiny_models(model_type: str, calls: list):
    """Mixed lengths in one batch, long prompts in pieces."""
    ours, eager = tiny_pair(model_type)
    prompts = random_prompts([3, 40, 1, 17, 70])
    assert batched(ours, prompts) == one_by_one(eager, prompts)
    assert any(keys > rows > 1 for rows, keys in calls)  # more than prefill from nothing


@pytest.mark.parametrize("page_size", [4, 8, 32])
def test_shared_prefix(page_size: int, monkeypatch: pytest.MonkeyPatch):
    """Blocks of an earlier request serve later ones that begin alike."""
    ours, eager = tiny_pair("llama")
    prompts = random_prompts([4, 9, 1, 6, 3], shared=64)
    processed = []
    prepared = batched_attention._paged_forward

    def counting(forward: Callable, module: Any, query: torch.Tensor, *rest: Any):
        processed.append(query.shape[2] if module.layer_idx == 0 else 0)
        return prepared(forward, module, query, *rest)

    monkeypatch.setattr(batched_attention, "_paged_forward", counting)
    options = {"page_size": page_size, "num_blocks": 512 // page_size, "max_batch_tokens": 80}
    expected = one_by_one(eager, prompts)
    tokens_processed = {}
    for sharing in (True, False):
        processed.clear()
        assert batched(ours, prompts, allow_block_sharing=sharing, **options) == expected
        tokens_processed[sharing] = sum(processed)
    assert tokens_processed[True] < tokens_processed[False] - 64


def test_arrivals_while_running(calls: list):
    """Requests that come while others are being served, and more of them than the cache holds at once."""
    ours, eager = tiny_pair("gemma2")
    prompts = random_prompts([20, 3, 33, 9, 50, 2, 14, 27])
    expected = one_by_one(eager, prompts)
    with ours.continuous_batching_context_manager(**settings(num_blocks=12, max_requests_per_batch=3)) as manager:
        first = [manager.add_request(prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts[:3]]
        deadline = time.monotonic() + 60
        while len(calls) < 6 and time.monotonic() < deadline:  # some steps in
            time.sleep(0.001)
        later = [manager.add_request(prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts[3:]]
        finished: dict[str, Any] = {}
        while len(finished) < len(prompts) and time.monotonic() < deadline:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                finished[result.request_id] = result
    assert [list(finished[name].generated_tokens) for name in first + later] == expected


def test_padded_batches(calls: list, monkeypatch: pytest.MonkeyPatch):
    """As with CUDA graphs and compilers, for which queries, keys and requests are padded to fixed sizes."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # its time is not what this tests
    ours, eager = tiny_pair("gpt_oss")
    prompts = random_prompts([5, 30, 2])
    padded = {"q_padding_interval_size": 16, "kv_padding_interval_size": 32, "varlen_compile_config": CompileConfig()}
    assert batched(ours, prompts, **padded) == one_by_one(eager, prompts)
    assert all(rows % 16 == 0 for rows, _ in calls)


def test_one_call_a_layer(monkeypatch: pytest.MonkeyPatch):
    """Requests are attended to together, with spans shared by the layers that see alike, and no dense mask."""
    ours, _ = tiny_pair("gemma2")
    attended, built = [], []
    plain, spans = attention_plugin.attention_forward, batched_attention.request_spans

    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any):
        assert isinstance(mask, attention_plugin.SpanMask) and mask.holes is None
        attended.append(module.layer_idx)
        return plain(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "my_triton", attend)
    monkeypatch.setattr(batched_attention, "request_spans", lambda *args: built.append(args[-1]) or spans(*args))
    attention_plugin.enable_continuous_batching(attention_plugin.disable_continuous_batching(ours))
    ours.generate_batch(random_prompts([5, 9, 2]), **settings())
    layers = ours.config.num_hidden_layers
    assert attended == list(range(layers)) * (len(attended) // layers)
    assert len(attended) == layers * NEW_TOKENS  # three prompts at once, then a token of each at a time
    assert len(built) == 2 * NEW_TOKENS  # one with the window and one without, in each pass


def test_the_same_offsets_twice():
    """Offsets written in place, as for the capture of a CUDA graph: a new pass builds its spans anew."""
    requests = OtherCache()
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)

    def shared(layer_idx: int):
        return batched_attention._shared_spans(requests, layer_idx, offsets, offsets, (5, 5), None)

    first = shared(0)
    assert shared(1) is first
    offsets[1] = 3
    second = shared(0)
    assert second is not first and second.start.tolist() == [[0, 0, 0, 3, 3]]
    assert shared(1) is second


def test_a_variant_keeps_its_options():
    """A name registered with options of its own can be enabled as well."""
    attention_plugin.register("my_triton_flat", scale=0.01)
    eager = build("llama", "eager", max_position_embeddings=256)
    ours = build("llama", "my_triton_flat", eager.state_dict(), max_position_embeddings=256)
    for block in eager.model.layers:
        block.self_attn.scaling = 0.01
    prompts = random_prompts([3, 20])
    assert batched(attention_plugin.enable_continuous_batching(ours), prompts) == one_by_one(eager, prompts)


@pytest.mark.parametrize("passed", [None, 3, 9])
def test_attention_over_the_cache(passed: int | None):
    """Numbers, not tokens: grouped heads, sinks, softcap and a window over keys that the cache returns.

    Some models leave the window to their masks. The cache knows it too.
    """
    torch.manual_seed(0)
    query = torch.randn(1, 6, 5, 16, device=DEVICE)
    key, value = torch.randn(2, 1, 2, 11, 16, device=DEVICE).unbind()
    sinks = torch.randn(6, device=DEVICE)
    query_offsets, key_offsets = (
        torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in ([0, 4, 5], [0, 6, 11])
    )

    class Cache:
        layer_to_allocator = [SimpleNamespace(sliding_window=3)]

        def update(self, key_states: Any, value_states: Any, layer_idx: int, kwargs: dict[str, Any]):
            kwargs["cu_seq_lens_k"] = kwargs["cu_seq_lens_k"]["sliding_attention"]
            return key, value

    module = torch.nn.Module().eval()
    module.layer_idx = 0
    output, weights = batched_attention.variable_length_forward(
        attention_plugin.attention_forward, module, query, key[:, :, :5], value[:, :, :5], None,
        cache=Cache(), scaling=0.2, softcap=3.0, s_aux=sinks, sliding_window=passed, is_causal=True, dropout=0.0,
        cu_seq_lens_q=query_offsets, cu_seq_lens_k={"sliding_attention": key_offsets}, max_length_q=4,
        max_length_k={"sliding_attention": 6}, read_index=[], write_index=[], block_table=None,
        logits_indices=None, logits_processor_args=None, use_cache=False,
    )  # fmt: skip
    assert weights is None
    mask = torch.zeros(5, 11, dtype=torch.bool, device=DEVICE)
    for row, last in enumerate([2, 3, 4, 5, 10]):
        mask[row, max(last - 2, 0) : last + 1] = True
    options = {"mask": mask, "sinks": sinks, "scale": 0.2, "softcap": 3.0}
    exact, eager = (
        attention_reference(query, key, value, dtype=dtype, **options)[0] for dtype in (torch.float64, torch.float32)
    )
    assert_within_bound(output.transpose(1, 2), eager, exact)


# ---------------------------------------------------------------------- switching on and off


def test_without_enabling():
    model = build("llama", "my_triton")
    with pytest.raises(ValueError, match="my_triton is not supported for continuous batching"):
        model.generate_batch([[3, 4, 5]], **settings())
    # A cache that arrives all the same is refused with the call that helps.
    tensors = torch.randn(3, 1, 2, 4, 8).unbind()
    with pytest.raises(ValueError, match=r"`cache`=.*enable_continuous_batching"):
        attention_plugin.attention_forward(torch.nn.Module().eval(), *tensors, None, cache=object())


def test_enabling_twice_and_taking_it_back():
    model, other = build("llama", "my_triton"), build("llama", "my_triton")
    tokens = torch.randint(3, VOCAB_SIZE, (2, 9))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    before = model(tokens, attention_mask=mask).logits
    for _ in range(2):
        assert attention_plugin.enable_continuous_batching(model) is model
        assert model.config._attn_implementation == "my_triton_flash"
        assert torch.equal(model(tokens, attention_mask=mask).logits, before)
    assert other.config._attn_implementation == "my_triton"
    for _ in range(2):
        assert attention_plugin.disable_continuous_batching(model) is model
        assert model.config._attn_implementation == "my_triton"
    assert torch.equal(model(tokens, attention_mask=mask).logits, before)


def test_an_enabled_model_compiles():
    """In one graph, and with a static cache in one graph for all steps; both with padding."""
    ours, eager = tiny_pair("llama")
    mask = torch.ones(2, 11, dtype=torch.long, device=DEVICE)
    mask[1, :4] = 0
    tokens = torch.randint(3, VOCAB_SIZE, mask.shape, device=DEVICE)
    with torch.no_grad():
        logits = torch.compile(ours, backend="aot_eager", fullgraph=True)(tokens, attention_mask=mask).logits
        expected = eager(tokens, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)
    arguments = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, "cache_implementation": "static"}
    compile_config = CompileConfig(backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    generated = ours.generate(tokens, attention_mask=mask, compile_config=compile_config, **arguments)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(generated, eager.generate(tokens, attention_mask=mask, disable_compile=True, **arguments))


def test_nothing_of_the_name_is_saved(tmp_path: Any):
    model = attention_plugin.enable_continuous_batching(build("llama", "my_triton"))
    model.save_pretrained(tmp_path)
    assert "flash" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation != "my_triton_flash"


def test_what_is_no_model():
    with pytest.raises(TypeError, match="must be a loaded model of transformers, got str; load one with"):
        attention_plugin.enable_continuous_batching("llama")


def test_a_model_without_this_attention():
    with pytest.raises(ValueError, match=r"no part of `model` uses this attention.*\['eager'\].*my_triton"):
        attention_plugin.enable_continuous_batching(build("llama", "eager"))


def test_chunked_attention():
    with pytest.raises(ValueError, match=r"chunked attention .*llama4_text.*use `model.generate` without enabling"):
        attention_plugin.enable_continuous_batching(build("llama4_text", "my_triton"))


@pytest.mark.parametrize("model_type", ["nemotron", "stablelm"])
def test_models_that_keep_the_cache_back(model_type: str):
    """Their layers would see the newest tokens alone."""
    ours, _ = tiny_pair(model_type)
    outputs = ours.generate_batch(random_prompts([3, 9]), **settings())
    # Where layers write to the cache themselves, they fail at what they were not given.
    expected = "is not told of the requests in a batch" if EARLIER_THAN_5_24 else "'cu_seq_lens_k'"
    assert all(expected in output.error for output in outputs.values())
    assert not any(output.generated_tokens for output in outputs.values())


def test_a_model_that_makes_its_own_mask():
    """Which has a row for each of the batch's tokens, and no column for what is in the cache."""
    ours, _ = tiny_pair("doge")
    outputs = ours.generate_batch(random_prompts([3, 9]), **settings())
    assert all("attends under a mask of its own" in output.error for output in outputs.values())
    assert not any(output.generated_tokens for output in outputs.values())


@pytest.mark.skipif(
    not EARLIER_THAN_5_24, reason="since transformers 5.24 layers write to the cache, and fail at what they lack"
)
def test_compiled_models_that_keep_the_cache_back():
    """Compiled layers cannot look at what their thread is computing; the pass as a whole is refused at its end."""
    ours, _ = tiny_pair("stablelm")
    options = {"varlen_compile_config": CompileConfig(backend="eager", mode=None)}
    outputs = ours.generate_batch(random_prompts([3, 9]), **settings(**options))
    assert all("does not hand `cache` on to its attention layers" in output.error for output in outputs.values())


def test_a_batch_for_a_part_of_the_enabled_model():
    """Which is not told of the cache in use."""
    tensors, offsets = torch.randn(3, 1, 2, 4, 8).unbind(), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="outside of a pass of the model that was enabled; pass the model that"):
        batched_attention.variable_length_forward(
            attention_plugin.attention_forward, torch.nn.Module().eval(), *tensors, None,
            write_index=[], read_index=[], cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
        )  # fmt: skip


def test_an_enabled_model_may_be_set_to_another_attention():
    """Then no layer of this attention waits for the cache, as where only a vision tower has it."""
    ours, eager = tiny_pair("llama")
    ours.set_attn_implementation("sdpa")
    prompts = random_prompts([3, 9])
    assert batched(ours, prompts) == one_by_one(eager, prompts)


def test_hooks_are_taken_back():
    ours, _ = tiny_pair("llama")
    assert ours._forward_hooks and ours._forward_pre_hooks
    attention_plugin.disable_continuous_batching(ours)
    assert not ours._forward_hooks and not ours._forward_pre_hooks


def test_a_copy_of_an_enabled_model_is_enabled():
    """With the hooks of what it is a copy of, which it neither gets twice nor keeps."""
    ours, eager = tiny_pair("llama")
    prompts = random_prompts([3, 9])
    copied = copy.deepcopy(ours)
    for model in (copied, attention_plugin.enable_continuous_batching(copied)):
        assert batched(model, prompts) == one_by_one(eager, prompts)
    attention_plugin.disable_continuous_batching(copied)
    assert not copied._forward_hooks and not copied._forward_pre_hooks
    assert batched(ours, prompts) == one_by_one(eager, prompts)


def test_a_failed_pass_leaves_nothing_behind():
    """The cache of a pass that ended in an error is not taken for that of what its thread does next."""
    ours, eager = tiny_pair("llama")
    tokens = torch.randint(3, VOCAB_SIZE, (1, 9), device=DEVICE)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        ours(cache=SimpleNamespace(layer_to_allocator=[]))
    torch.testing.assert_close(ours(tokens).logits, eager(tokens).logits, rtol=0, atol=1e-4)


def test_block_tables():
    module = torch.nn.Module().eval()
    with pytest.raises(ValueError, match=r"`block_table` .*max_blocks_per_request=0"):
        batched_attention.variable_length_forward(
            attention_plugin.attention_forward, module, *torch.randn(3, 1, 2, 4, 8).unbind(), None,
            block_table=torch.zeros(1, 1, 1), cu_seq_lens_q=None,
        )  # fmt: skip


# ---------------------------------------------------------------------- transformers serve


class Serve:
    """Stands for `transformers.cli.serve.Serve` where models without weights on disk will do, or it is to fail."""

    def __init__(self, **options: Any):
        self.server, self._thread = SimpleNamespace(started=True), threading.current_thread()
        self.options = options
        self.killed = False
        SERVERS.append(self)
        name = options["force_model"]
        loaded = SimpleNamespace(model=build(name, "eager"))
        self._model_manager = SimpleNamespace(loaded_models={name: loaded})

    def kill_server(self):
        self.killed = True


SERVERS: list[Serve] = []


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[Serve]:
    monkeypatch.setitem(sys.modules, "transformers.cli.serve", SimpleNamespace(Serve=Serve))
    SERVERS.clear()
    return SERVERS


def test_serving(servers: list[Serve]):
    server = continuous_batching.serve("llama", port=1234)
    assert server is servers[0] and not server.killed
    assert server.options == {"force_model": "llama", "continuous_batching": True, "non_blocking": True, "port": 1234}
    model = server._model_manager.loaded_models["llama"].model
    assert model.config._attn_implementation == "my_triton_flash"
    prompts = random_prompts([3, 9])
    assert batched(model, prompts) == one_by_one(build("llama", "eager"), prompts)


def test_serving_a_model_that_cannot_use_it(servers: list[Serve]):
    with pytest.raises(ValueError, match="chunked attention"):
        continuous_batching.serve("llama4_text")
    assert servers[0].killed


@pytest.mark.parametrize("gone", ["server", "_thread"])
def test_a_web_server_elsewhere(servers: list[Serve], monkeypatch: pytest.MonkeyPatch, gone: str):
    started = Serve.__init__

    def without(self: Serve, **options: Any):
        started(self, **options)
        delattr(self, gone)

    monkeypatch.setattr(Serve, "__init__", without)
    with pytest.raises(RuntimeError, match="keeps its web server elsewhere"):
        continuous_batching.serve("llama")
    assert servers[0].killed


def test_serving_from_elsewhere(servers: list[Serve], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Serve, "_model_manager", property(lambda self: None, lambda self, value: None), raising=False)
    with pytest.raises(RuntimeError, match="keeps the models it has loaded elsewhere"):
        continuous_batching.serve("llama")
    assert servers[0].killed


# ---------------------------------------------------------------------- where the gate has moved


def refuse(*args: Any, **kwargs: Any):
    raise ValueError("not for you")


class OtherCache:
    def update(self, key_states: Any, value_states: Any, layer_idx: int, read_index: Any, write_index: Any): ...


MOVED = {
    # The plugin's own reference: when all tests are collected together, this file's is another module object.
    "version": (
        flash_gates.transformers,
        "__version__",
        "5.22.1",
        "transformers 5.22.1 .* needs transformers 5.23",
    ),
    "name": (generic, "is_flash_attention_requested", lambda **kwargs: False, "no longer goes by the word 'flash'"),
    "gone": (generic, "is_flash_attention_requested", None, "no longer goes by the word 'flash'.*TypeError"),
    "by number": (generic, "is_flash_attention_requested", lambda **kwargs: True, "no longer goes by the word"),
    "manager": (
        continuous_api.ContinuousBatchingManager,
        "switch_to_cb_friendly_attn",
        refuse,
        "no longer takes every name .*ValueError: not for you",
    ),
    "mask": (batching_utils, "attn_mask_is_needed", lambda config: True, "builds dense masks for such a name"),
    "cache": (cache, "PagedAttentionCache", OtherCache, "hands its cache to attention in another way.*TypeError"),
    "keywords": (
        input_outputs,
        "PagedAttentionArgs",
        type("PagedAttentionArgs", (), {"__annotations__": {"cache": object}}),
        "hands its cache to attention in another way",
    ),
}


@pytest.mark.parametrize("moved", MOVED)
def test_a_gate_that_has_moved(moved: str, monkeypatch: pytest.MonkeyPatch):
    owner, name, replacement, message = MOVED[moved]
    model = build("llama", "my_triton")
    monkeypatch.setattr(owner, name, replacement)
    with pytest.raises(RuntimeError, match=f"transformers {transformers.__version__}.*{message}|{message}") as refusal:
        attention_plugin.enable_continuous_batching(model)
    assert "constraints.txt" in str(refusal.value) and 'attn_implementation="sdpa"' in str(refusal.value)
    assert model.config._attn_implementation == "my_triton"
    assert "my_triton_flash" not in AttentionInterface._global_mapping
