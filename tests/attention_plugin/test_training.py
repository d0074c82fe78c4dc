# SPDX-License-Identifier: Apache-2.0
"""Training as people do it: several ranks take the step that one process takes, and Trainer and PEFT agree with eager.

Ranks are real processes that speak gloo. Each takes one half of a batch whose rows differ in length, so the loss is
divided by the number of tokens of the whole batch, as Trainer does it.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import transformers
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import DataCollatorWithFlattening, PreTrainedModel, Trainer, TrainingArguments

from attention_plugin import sources, support
from model.configuration_reference import ReferenceConfig
from model.modeling_reference import ReferenceForCausalLM

from tiny_models import VOCAB_SIZE, build

IMPLEMENTATION = "my_triton"
RANKS = 2
LIMIT_SECONDS = 120.0
TOKENS = 12
PADDING = [0, 7, 3, 5]  # in front of each row
STEPS = 2
# llama is plain; gpt_oss has sinks, gemma2 has softcap, and both have windows.
MODEL_TYPES = ["llama", "gpt_oss", "gemma2"]
KEEPS_LENGTHS = ["nemotron", "stablelm"]
"""Layers of these do not pass their keywords on to their attention."""
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    # By default a first step is the sign of the gradient, which rounding decides where that is nearly zero.
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=1e-2),
}
TIGHT = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def left_padded_batch() -> dict[str, Tensor]:
    """Four rows of tokens, padded in front by different lengths.

    Neither padding has a label nor a row's first token, which would be predicted from the padding before it: what
    attention gives a row that sees no key is each implementation's own affair.
    """
    ids = torch.randint(3, VOCAB_SIZE, (len(PADDING), TOKENS), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(TOKENS) >= torch.tensor(PADDING)[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def counted(labels: Tensor) -> int:
    """The number of tokens whose prediction is judged."""
    return int((labels != -100).sum())


def reference_model(implementation: str = IMPLEMENTATION, **changes) -> ReferenceForCausalLM:
    """A tiny reference model with sliding and full layers."""
    shape = dict(vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_attention_heads=4, head_dim=8)
    torch.manual_seed(0)
    config = ReferenceConfig(**shape, num_hidden_layers=2, sliding_window=5, initializer_range=0.2, **changes)
    model = ReferenceForCausalLM(config)
    model.set_attn_implementation(implementation)
    return model


def take_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], items: float
) -> list[float]:
    """The losses of `STEPS` steps on `batch`, each a sum over tokens divided by `items`."""
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch, num_items_in_batch=items, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(parameters: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Parameters by name, detached, and gathered from the ranks where these share them."""
    gathered = ((name, value.full_tensor() if isinstance(value, DTensor) else value) for name, value in parameters)
    return {name: value.detach().clone() for name, value in gathered}


def run_ranks(work: Callable[..., dict], folder: Path, *arguments) -> list[dict]:
    """What `work(*arguments)` returned on each of the ranks, each a process in one group."""
    context = torch.multiprocessing.spawn(enter_rank, (folder, work, arguments), nprocs=RANKS, join=False)
    deadline = time.monotonic() + LIMIT_SECONDS
    try:
        while not context.join(timeout=1.0):  # raises the error of a rank that failed
            assert time.monotonic() < deadline, f"the ranks did not finish within {LIMIT_SECONDS:.0f} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(RANKS)]


def enter_rank(rank: int, folder: Path, work: Callable[..., dict], arguments: tuple) -> None:
    """The whole life of a rank; what `work` returns goes to a file."""
    torch.set_num_threads(1)
    # What torchrun would set; transformers reads it for tensor parallelism.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    # The ranks meet at a file, for which no port must be free.
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", meeting, timedelta(seconds=LIMIT_SECONDS), rank=rank, world_size=RANKS)
    torch.save(work(*arguments), folder / f"rank-{rank}.pt")
    distributed.destroy_process_group()


def on_every_rank(folder: Path) -> dict[str, dict]:
    """All that the ranks do, in one start of processes."""
    return {
        "ddp": train_half(DistributedDataParallel),
        "fsdp2": train_half(fully_sharded),
        "tensor parallel": tensor_parallel_gradients(folder),
    }


def train_half(shard: Callable[[PreTrainedModel], nn.Module]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Train every model with every optimizer on this rank's half of the batch; returns the parameters afterwards."""
    batch, rank = left_padded_batch(), distributed.get_rank()
    items = counted(batch["labels"]) / RANKS  # gradients are averaged over the ranks
    half = {name: value.chunk(RANKS)[rank] for name, value in batch.items()}
    trained = {}
    for model_type in MODEL_TYPES:
        for optimizer in OPTIMIZERS:
            model = build(model_type, IMPLEMENTATION).train()
            sharded = shard(model)
            take_steps(sharded, OPTIMIZERS[optimizer](sharded.parameters()), half, items)
            trained[model_type, optimizer] = whole(model.named_parameters())
    return trained


def fully_sharded(model: PreTrainedModel) -> nn.Module:
    """The model with its parameters, sinks among them, cut over the ranks; layers gather theirs when they run."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def tensor_parallel_gradients(folder: Path) -> dict:
    """The loss, and the gradient of each parameter, of the saved model cut by its own plan."""
    model = ReferenceForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation=IMPLEMENTATION).train()
    loss = model(**left_padded_batch(), use_cache=False).loss
    loss.backward()
    cut = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.item(), "gradients": whole(gradients.items()), "cut": cut}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """What each rank found, in the order of the ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    reference_model().save_pretrained(folder / "model")
    return run_ranks(on_every_rank, folder, folder / "model")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_process(
    parallelism: str, model_type: str, optimizer: str, ranks: list[dict[str, dict]]
) -> None:
    batch, model = left_padded_batch(), build(model_type, IMPLEMENTATION).train()
    before = whole(model.named_parameters())
    take_steps(model, OPTIMIZERS[optimizer](model.parameters()), batch, counted(batch["labels"]))
    expected = whole(model.named_parameters())
    for found in ranks:
        torch.testing.assert_close(found[parallelism][model_type, optimizer], expected, **TIGHT)
    assert any("sinks" in name for name in expected) == (model_type == "gpt_oss")
    moved = {name: (expected[name] - before[name]).abs().max() for name in expected if "self_attn" in name}
    assert min(moved.values()) > 1e-4


def test_tensor_parallel_gradients_equal_those_of_one_process(ranks: list[dict[str, dict]]) -> None:
    model = reference_model().train()
    loss = model(**left_padded_batch(), use_cache=False).loss
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for found in (rank["tensor parallel"] for rank in ranks):
        assert any("q_proj" in name for name in found["cut"])
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(found["gradients"], expected, **TIGHT)


def trainer_losses(model: PreTrainedModel, folder: Path, **options) -> list[float]:
    """The losses of twelve Trainer steps on left-padded rows."""
    batch = left_padded_batch()
    rows = [{name: batch[name][row] for name in batch} for row in range(len(PADDING))]
    options |= dict(max_steps=12, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True)
    quiet = dict(logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    trainer = Trainer(model, TrainingArguments(str(folder), **options, **quiet), train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_trainer_losses_equal_those_of_eager(checkpointing: bool, tmp_path: Path) -> None:
    ours = trainer_losses(reference_model(), tmp_path, gradient_checkpointing=checkpointing)
    eager = trainer_losses(reference_model("eager"), tmp_path, gradient_checkpointing=checkpointing)
    assert len(ours) == 12 and ours[-1] < ours[0]
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=0)


def test_trainer_in_bfloat16_autocast_stays_near_float32(tmp_path: Path) -> None:
    ours, exact = trainer_losses(reference_model(), tmp_path, bf16=True), trainer_losses(reference_model(), tmp_path)
    assert ours != exact
    torch.testing.assert_close(ours, exact, rtol=5e-2, atol=0)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *KEEPS_LENGTHS, "llama4_text"])
def test_packed_documents_have_the_loss_of_separate_ones(model_type: str, use_cache: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(3, VOCAB_SIZE, (tokens,), generator=generator) for tokens in (5, 7, 9)]
    model = build(model_type, IMPLEMENTATION).train()
    # With their lengths. From positions alone not every model tells documents apart, and none that makes a cache first.
    row = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": ids} for ids in documents])
    packed = model(**row, use_cache=use_cache).loss
    separate = [(len(ids) - 1) * model(input_ids=ids[None], labels=ids[None]).loss for ids in documents]
    torch.testing.assert_close(packed, sum(separate) / sum(len(ids) - 1 for ids in documents), **TIGHT)


def packed_gradients(model: PreTrainedModel, forward: Callable, **options) -> dict[str, Tensor]:
    """Gradients of a loss over packed documents that are told by their lengths alone."""
    ids = torch.randint(3, VOCAB_SIZE, (1, 17), generator=torch.Generator().manual_seed(3))
    offsets = torch.tensor([0, 4, 11, 17], dtype=torch.int32)
    model.zero_grad()
    forward(input_ids=ids, labels=ids, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("model_type", [*KEEPS_LENGTHS, "llama4_text"])
def test_lengths_are_enough(model_type: str) -> None:
    """In a copy as well, compiled, and in layers that are computed again."""
    model = build(model_type, IMPLEMENTATION).train()
    starts = torch.cat([torch.arange(tokens) for tokens in (4, 7, 6)])[None]
    expected = packed_gradients(model, model, position_ids=starts, use_cache=False)  # transformers finds these itself
    copied = copy.deepcopy(model)
    torch.testing.assert_close(packed_gradients(model, model), expected, **TIGHT)
    torch.testing.assert_close(packed_gradients(copied, copied), expected, **TIGHT)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(packed_gradients(model, compiled, use_cache=False), expected, **TIGHT)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(packed_gradients(model, model, use_cache=False), expected, **TIGHT)


def test_no_other_layers_are_taken_for_such_that_keep_lengths_back(monkeypatch) -> None:
    """Methods that make masks or embeddings are given masks and positions, too."""
    paths = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    files = {f"transformers.models.{path.parent.name}.{path.stem}": path for path in paths}
    monkeypatch.setattr(sources, "source", lambda name: files[name].read_text())
    keeping = {path.parent.name for name, path in files.items() if sources.layers_keeping_keywords(name)}
    assert keeping == set(KEEPS_LENGTHS)


def test_lengths_that_a_model_keeps_back_are_logged_where_it_was_switched_over(caplog) -> None:
    support.log_once.cache_clear()
    model = build("stablelm", "eager")
    model.set_attn_implementation(IMPLEMENTATION)
    model(input_ids=torch.ones(1, 5, dtype=torch.long))
    assert (
        "modeling_stablelm.py keep `cu_seq_lens_q`" in caplog.text and "`position_ids` that start anew" in caplog.text
    )
    caplog.clear()
    support.log_once.cache_clear()
    build("stablelm", IMPLEMENTATION)(input_ids=torch.ones(1, 5, dtype=torch.long))
    assert not caplog.text


def test_training_with_dropout_repeats_bit_for_bit_and_under_checkpointing(tmp_path: Path) -> None:
    runs = [
        trainer_losses(reference_model(attention_dropout=0.3), tmp_path, gradient_checkpointing=checkpointing)
        for checkpointing in (False, False, True)
    ]
    assert runs[0] == runs[1]
    # Checkpointing draws the same weights again when it computes a layer for the second time.
    torch.testing.assert_close(runs[2], runs[0], rtol=1e-5, atol=0)
    assert runs[0] != trainer_losses(reference_model(), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["lora", "prefix"],
)
def test_peft_gradients_equal_those_of_eager(config: LoraConfig | PrefixTuningConfig) -> None:
    batch, gradients = left_padded_batch(), {}
    del batch["position_ids"]  # a prefix moves them
    for implementation in (IMPLEMENTATION, "eager"):
        base = build("llama", implementation)
        torch.manual_seed(0)
        model = get_peft_model(base, config).train()
        model(**batch).loss.backward()
        trained = (item for item in model.named_parameters() if item[1].requires_grad)
        gradients[implementation] = {name: parameter.grad for name, parameter in trained}
    assert gradients["eager"] and all(gradient.abs().max() > 0 for gradient in gradients["eager"].values())
    torch.testing.assert_close(gradients[IMPLEMENTATION], gradients["eager"], rtol=1e-4, atol=1e-6)
