# SPDX-License-Identifier: Apache-2.0
"""Whole models under torch.compile, torch.export, autocast and gradient checkpointing equal eager attention."""

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import CompileConfig, masking_utils
from transformers.models.bloom import modeling_bloom

import attention_plugin
from attention_kernels import Spans, attention
from model.configuration_reference import ReferenceConfig
from model.modeling_reference import ReferenceForCausalLM

from helpers import DEVICE, assert_within_bound
from tiny_models import SLIDING_WINDOW, VOCAB_SIZE, build

TOLERANCE = 2e-4
EARLIER_COMPILER = Version(torch.__version__) < Version("2.13")
"""Whether torch is earlier than the pinned one. The tests pass with 2.11 too, the oldest that is served."""
GPU_ONLY = pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@functools.lru_cache(maxsize=2)
def models(name: str) -> SimpleNamespace:
    """The same weights under eager and under our implementation."""
    if name in ("reference", "one layer"):
        torch.manual_seed(0)
        layer_types = ["sliding_attention", "full_attention"][: 2 if name == "reference" else 1]
        config = ReferenceConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_hidden_layers=len(layer_types), layer_types=layer_types,
            sliding_window=SLIDING_WINDOW, initializer_range=0.2,
        )  # fmt: skip
        eager = ReferenceForCausalLM._from_config(config, attn_implementation="eager").eval()
        ours = ReferenceForCausalLM._from_config(copy.deepcopy(config), attn_implementation="my_triton").eval()
        ours.load_state_dict(eager.state_dict())
    else:
        eager = build(name, "eager")
        ours = build(name, "my_triton", eager.state_dict())
    return SimpleNamespace(eager=eager.to(DEVICE), ours=ours.to(DEVICE))


def inputs(kind: str, tokens: int = 17) -> dict[str, Tensor]:
    """Two rows of tokens: plain, left-padded, or packed and told apart by nothing but their positions."""
    generator = torch.Generator().manual_seed(tokens)
    arguments = {"input_ids": torch.randint(3, VOCAB_SIZE, (2, tokens), generator=generator)}
    if kind == "left-padded":
        arguments["attention_mask"] = (torch.arange(tokens) >= torch.tensor([[3], [0]])).long()
    if kind == "packed":
        positions = torch.cat([torch.arange(length) for length in (4, 7, tokens - 11)])
        arguments["position_ids"] = positions.expand(2, -1).contiguous()
    return {name: tensor.to(DEVICE) for name, tensor in arguments.items()}


def run(model: Callable, arguments: dict[str, Tensor]) -> Tensor:
    """Logits of the tokens that are no padding."""
    logits = model(**arguments, use_cache=False).logits
    mask = arguments.get("attention_mask")
    return logits.flatten(0, 1) if mask is None else logits[mask.bool()]


def run_with_gradients(model: torch.nn.Module, call: Callable, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and gradients of every parameter for a random weighting of them."""
    model.zero_grad()
    logits = run(call, arguments)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device)
    (logits * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": logits.detach(), **gradients}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Error in norm; that of a gradient which is small beside all of them is measured against those."""
    assert actual.keys() == expected.keys()
    total = sum(tensor.norm() ** 2 for name, tensor in expected.items() if name != "logits") ** 0.5
    for name, tensor in expected.items():
        size = tensor.norm() if name == "logits" else max(tensor.norm(), 1e-3 * total)
        assert (actual[name] - tensor).norm() < tolerance * size, name


# ---------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "packed"),
        ("mistral", "left-padded"),  # sliding windows
        ("gemma2", "packed"),  # softcap, two kinds of layers
        pytest.param(
            "gpt_oss",
            "plain",  # sinks
            marks=pytest.mark.skipif(EARLIER_COMPILER, reason="cannot compile transformers' products of experts"),
        ),
        ("bert", "left-padded"),  # an encoder where it is no decoder
        ("reference", "left-padded"),
    ],
)
def test_compiled_model_equals_eager_attention(name: str, kind: str):
    pair = models(name)
    expected = run_with_gradients(pair.eager, pair.eager, inputs(kind))
    compiled = torch.compile(pair.ours, backend="aot_eager", fullgraph=True)
    assert_close(run_with_gradients(pair.ours, compiled, inputs(kind)), expected)


def test_dynamic_lengths_compile_once():
    pair = models("mistral")
    compiled = torch.compile(pair.ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (17, 40):
        with torch._dynamo.config.patch(error_on_recompile=tokens != 17):
            actual = run_with_gradients(pair.ours, compiled, inputs("left-padded", tokens))
        assert_close(actual, run_with_gradients(pair.eager, pair.eager, inputs("left-padded", tokens)))


@torch.no_grad()
def test_dynamic_lengths_compile_once_without_gradients():
    pair, kind = models("reference"), "packed"
    compiled = torch.compile(pair.ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (17, 40):
        with torch._dynamo.config.patch(error_on_recompile=tokens != 17):
            actual = run(compiled, inputs(kind, tokens))
        assert_close({"logits": actual}, {"logits": run(pair.eager, inputs(kind, tokens))})


@pytest.mark.parametrize("symbolic", ["input_ids", "attention_mask"])
@torch.no_grad()
def test_one_symbolic_length_beside_a_known_one(symbolic: str):
    """As compilers make them of what has changed since the last call. It is found equal to the other all the same."""
    pair, arguments = models("llama"), inputs("left-padded", 17)
    torch._dynamo.maybe_mark_dynamic(arguments[symbolic], 1)
    actual = run(torch.compile(pair.ours, backend="aot_eager", fullgraph=True), arguments)
    torch.testing.assert_close(actual, run(pair.eager, arguments), rtol=0, atol=1e-4)


@pytest.mark.exhaustive  # minutes of compiling on a slow machine
def test_inductor():
    pair = models("one layer")
    expected = run_with_gradients(pair.eager, pair.eager, inputs("left-padded"))
    compiled = torch.compile(pair.ours, fullgraph=True)
    assert_close(run_with_gradients(pair.ours, compiled, inputs("left-padded")), expected)


@pytest.mark.parametrize("name", ["llama", "reference"])
def test_generation_with_a_static_cache_compiles_once(name: str):
    """The cache's last slot is filled too, with padding in one row and none in the other."""
    pair = models(name)
    arguments = {
        **inputs("left-padded", 11),
        "do_sample": False,
        "min_new_tokens": 8,
        "max_new_tokens": 8,
        "cache_implementation": "static",
    }
    # A sliding layer of transformers' static cache counts its tokens in Python: its second step is compiled once more,
    # for any count, whatever the attention.
    graphs = 2 if "sliding_attention" in (getattr(pair.ours.config, "layer_types", None) or ()) else 1
    compile_config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    expected = pair.eager.generate(**arguments, disable_compile=True)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(pair.ours.generate(**arguments, compile_config=compile_config), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def user_mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Something that no function of transformers gives: every other key."""
    return (key % 2 == 0) | (key == query)


def user_mask_of_tensors(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return torch.where(query > 3, key <= query, key >= 0)


def mask_functions(tokens: int) -> dict[str, Callable[[], Callable]]:
    positions = torch.cat([torch.arange(5), torch.arange(tokens - 5)]).expand(2, -1)
    documents = (positions == 0).cumsum(1)
    blocks = (torch.arange(tokens) // 3 - 1).expand(2, -1)
    returning = (torch.arange(tokens) % 4).expand(2, -1)
    positions, documents, blocks, returning = (t.to(DEVICE) for t in (positions, documents, blocks, returning))
    pads = torch.tensor([2, 0], device=DEVICE)
    causal = masking_utils.causal_mask_function
    window = masking_utils.sliding_window_causal_mask_function
    return {
        "causal": lambda: causal,
        "bidirectional": lambda: masking_utils.bidirectional_mask_function,
        "sliding": lambda: window(4),
        "no window": lambda: window(0),
        "sliding both ways": lambda: masking_utils.sliding_window_bidirectional_mask_function(3),
        "chunked": lambda: masking_utils.chunked_causal_mask_function(4, pads),
        "packed": lambda: masking_utils.and_masks(
            masking_utils.remap_positions_for_packed_sequence(window(3), positions),
            masking_utils.packed_sequence_mask_function(documents),
        ),
        "packed bidirectional": lambda: masking_utils.and_masks(
            masking_utils.remap_positions_for_packed_sequence(
                masking_utils.sliding_window_bidirectional_mask_function(2), positions
            ),
            masking_utils.packed_sequence_mask_function(documents),
        ),
        "blocks": lambda: masking_utils.or_masks(causal, masking_utils.blockwise_overlay(blocks)),
        "blocks that come back": lambda: masking_utils.or_masks(causal, masking_utils.blockwise_overlay(returning)),
        "or": lambda: masking_utils.or_masks(window(3), masking_utils.sliding_window_bidirectional_overlay(1)),
        "swapped": lambda: lambda batch, head, query, key: query <= key,
        "shifted": lambda: lambda batch, head, query, key: key <= query - 1,
        "constant": lambda: lambda batch, head, query, key: key <= 3 + 0 * query,
        "user's": lambda: masking_utils.and_masks(causal, user_mask),
        "user's of tensors": lambda: user_mask_of_tensors,
    }


REMAPS = hasattr(masking_utils, "remap_positions_for_packed_sequence")
KINDS = [kind for kind in mask_functions(12) if REMAPS or not kind.startswith("packed")]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_are_built_while_tracing(kind: str, padded: bool):
    """Every mask function, compiled for any values, equals transformers' dense mask for values not seen then."""
    tokens = 12
    arguments = {"batch_size": 2, "q_length": tokens, "kv_length": tokens, "device": torch.device(DEVICE)}

    def dense(attention_mask: Tensor | None) -> Tensor:
        function = mask_functions(tokens)[kind]()
        mask = attention_plugin.span_mask(**arguments, mask_function=function, attention_mask=attention_mask)
        return mask.to_dense().expand(2, 1, tokens, tokens)

    compiled = torch.compile(dense, backend="eager", fullgraph=True)
    index = torch.arange(tokens, device=DEVICE)
    masks = [None]
    if padded:  # none, then on the left and right, then in the middle
        masks = [
            index >= torch.zeros(2, 1, device=DEVICE),
            (index > 1) & (index < torch.tensor([[9], [12]]).to(DEVICE)),
        ]
        masks.append((index != 4).repeat(2, 1))
    for number, mask in enumerate(masks):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            actual = compiled(mask)
        expected = masking_utils.sdpa_mask(
            **arguments, mask_function=mask_functions(tokens)[kind](), attention_mask=mask, allow_is_causal_skip=False
        )
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("kind", "is_spans"),
    [("sliding", True), ("chunked", True), ("user's", False), ("blocks", False), *[("packed", True)] * REMAPS],
)
def test_known_functions_are_read_while_tracing(kind: str, is_spans: bool):
    def holds_no_square(tokens: Tensor) -> bool:
        function = mask_functions(12)[kind]()
        mask = attention_plugin.span_mask(2, 12, 12, mask_function=function, device=tokens.device)
        return mask.holes is None

    assert torch.compile(holds_no_square, backend="eager", fullgraph=True)(torch.zeros(2, device=DEVICE)) == is_spans


def test_a_model_that_computes_attention_itself_is_refused_while_tracing():
    config = modeling_bloom.BloomConfig()

    def mask(tokens: Tensor) -> Tensor:
        return tokens + attention_plugin.span_mask(1, 4, 4, config=config).spans.end

    with pytest.raises(Exception, match="computes attention in its own code"):
        torch.compile(mask, backend="eager", fullgraph=True)(torch.zeros(1))


# ---------------------------------------------------------------------- torch.export


class LogitsOf(torch.nn.Module):
    """A model as a function of tensors alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("llama", "plain"), ("mistral", "left-padded")])
def test_exported_model_serves_other_lengths(name: str, kind: str, strict: bool):
    pair = models(name)
    length = torch.export.Dim("length", min=2, max=60)
    arguments = inputs(kind)
    with torch.no_grad():
        exported = torch.export.export(
            LogitsOf(pair.ours),
            (),
            arguments,
            dynamic_shapes={argument: {1: length} for argument in arguments},
            strict=strict,
        ).module()
        for tokens in (17, 23):
            actual, expected = exported(**inputs(kind, tokens)), LogitsOf(pair.eager)(**inputs(kind, tokens))
            mask = inputs(kind, tokens).get("attention_mask", torch.ones(2, tokens)).bool()
            assert_close({"logits": actual[mask]}, {"logits": expected[mask]})


class CausalAttention(torch.nn.Module):
    """What somebody writes around the operator."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
        spans = Spans.causal(query.shape[2], key.shape[2], device=query.device) & Spans.padded(padding, query.shape[2])
        return attention(query, key, value, spans, softcap=5.0)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_attention_over_spans(strict: bool):
    def problem(tokens: int) -> tuple[Tensor, ...]:
        query, key, value = torch.randn(3, 2, 2, tokens, 16, device=DEVICE).unbind()
        return query, key, value, torch.rand(2, tokens, device=DEVICE) > 0.3

    tokens = torch.export.Dim("tokens", min=2)
    shapes = ({2: tokens}, {2: tokens}, {2: tokens}, {1: tokens})
    exported = torch.export.export(CausalAttention(), problem(9), dynamic_shapes=shapes, strict=strict).module()
    for length in (9, 30):
        arguments = problem(length)
        torch.testing.assert_close(exported(*arguments), CausalAttention()(*arguments))


# ---------------------------------------------------------------------- autocast, gradient checkpointing


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled: bool):
    """bfloat16 within the error of eager attention under the same autocast, forward and backward."""
    pair = models("llama")
    call = torch.compile(pair.ours, backend="aot_eager", fullgraph=True) if compiled else pair.ours
    arguments = inputs("left-padded")
    exact = run_with_gradients(pair.eager, pair.eager, arguments)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = run_with_gradients(pair.ours, call, arguments)
        eager = run_with_gradients(pair.eager, pair.eager, arguments)
    assert actual["logits"].dtype == torch.bfloat16
    assert actual.keys() == exact.keys()
    for name, tensor in exact.items():
        assert_within_bound(actual[name], eager[name], tensor, name)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(name: str, use_reentrant: bool):
    pair = models(name)
    arguments = inputs("left-padded")
    expected = run_with_gradients(pair.eager, pair.eager, arguments)
    pair.ours.train()
    pair.ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    try:
        assert_close(run_with_gradients(pair.ours, pair.ours, arguments), expected)
        # The other kind is an autograd function of its own, which compilers do not trace; earlier ones trace neither.
        if not use_reentrant and not EARLIER_COMPILER:
            compiled = torch.compile(pair.ours, backend="aot_eager", fullgraph=True)
            assert_close(run_with_gradients(pair.ours, compiled, arguments), expected)
    finally:
        pair.ours.gradient_checkpointing_disable()
        pair.ours.eval()


@pytest.mark.skipif(EARLIER_COMPILER, reason="cannot trace dataclasses.replace in a checkpoint")
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_compiled_checkpoints_carry_the_mask(name: str, caplog: pytest.LogCaptureFixture):
    """GPT-2 and BERT hand their layers the mask by position, so that it is an argument of the checkpoint itself.

    Documents packed beside a 2D mask are in no dense mask, so that this also tells whether the spans arrived.
    """
    pair = models(name)
    arguments = inputs("packed")
    arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    expected = run_with_gradients(pair.ours, pair.ours, arguments)
    pair.ours.train()
    pair.ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        compiled = torch.compile(pair.ours, backend="aot_eager", fullgraph=True)
        assert_close(run_with_gradients(pair.ours, compiled, arguments), expected)
    finally:
        pair.ours.gradient_checkpointing_disable()
        pair.ours.eval()
    assert "dense" not in caplog.text


# ---------------------------------------------------------------------- CUDA graphs


@GPU_ONLY
def test_cuda_graphs_of_a_compiled_model():
    pair = models("llama")
    compiled = torch.compile(pair.ours, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # warm-up, capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        actual = run_with_gradients(pair.ours, compiled, inputs("left-padded"))
    assert_close(actual, run_with_gradients(pair.eager, pair.eager, inputs("left-padded")))


@GPU_ONLY
def test_cuda_graph_of_attention():
    """Captured once, with spans built inside, and replayed on other values and other padding."""
    query, key, value = (torch.randn(2, 4, 70, 64, device="cuda", requires_grad=True) for _ in range(3))
    padding = torch.ones(2, 70, dtype=torch.bool, device="cuda")

    def step() -> tuple[Tensor, ...]:
        spans = Spans.causal(70, device="cuda") & Spans.padded(padding, 70)
        output = attention(query, key, value, spans)
        return output, *torch.autograd.grad(output.square().sum(), (query, key, value))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for tensor in (query, key, value):
            tensor.normal_()
        padding[0, :9] = False
        padding[1, 30:33] = False
    graph.replay()
    for actual, expected in zip(results, step(), strict=True):
        torch.testing.assert_close(actual, expected)
