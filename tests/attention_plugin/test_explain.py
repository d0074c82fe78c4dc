# SPDX-License-Identifier: Apache-2.0
"""`my-triton explain`: what it says of a model is what the model gets when it runs with weights."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel

import attention_plugin
from attention_kernels import Spans, configs
from attention_plugin import support
from attention_plugin.__main__ import main
from attention_plugin.command import UsageError
from attention_plugin.explain import explain
from attention_plugin.explain.inputs import Prompts, inputs_for
from attention_plugin.explain.layers import Target, work_of
from attention_plugin.explain.plot import COLOURS, SKIPPED, WHOLE, rasterize
from attention_plugin.explain.probe import probe
from attention_plugin.explain.record import NAME, Call
from attention_plugin.explain.report import Mask, picture
from attention_plugin.explain.weightless import Weightless

from tiny_models import build, shrink

REPOSITORY = Path(__file__).resolve().parents[2]
INSTEAD = "give a folder with a config.json, a config.json, a hub id that is in the cache, or a model type"


def config_file(folder: Path, model_type: str, **changes) -> str:
    """A tiny configuration of this model type, saved as `save_pretrained` would."""
    config = shrink(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    return str(folder)


def call_of(spans: Spans, **changes) -> Call:
    """A call of one head with these spans."""
    scores = (spans.batch, 1, spans.query_len, spans.key_len)
    return Call(torch.nn.Module(), scores, 1, 64, 64, "mask", spans, **changes)


# ---------------------------------------------------------------------- what a model gets


LAYOUTS = ("left", "right", "packed")
DECODERS = ("gemma2", "gpt_oss", "llama4_text", "deepseek_v3", "qwen3_moe", "jamba")


@pytest.mark.parametrize(
    ("model_type", "layout"),
    # T5 has no position_ids, which would tell packed texts apart.
    [*((model_type, layout) for model_type in DECODERS for layout in LAYOUTS), ("t5", "left"), ("t5", "right")],
)
def test_without_weights_layers_get_what_they_get_with_weights(model_type, layout, monkeypatch):
    if model_type == "t5":
        config = CONFIG_MAPPING["t5"](d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, vocab_size=61)
        model = AutoModel.from_config(config, attn_implementation="my_triton").eval()
    else:
        model = build(model_type, "my_triton").model
        config = shrink(model_type)
    prompts = Prompts((11, 7), layout)
    found = probe(config, prompts)

    real = []
    operator = attention_plugin.attention.attention

    def record_and_attend(query, key, value, spans, **options):
        real.append((query.shape, key.shape, value.shape, spans, options))
        return operator(query, key, value, spans, **options)

    monkeypatch.setattr(attention_plugin.attention, "attention", record_and_attend)
    with torch.no_grad():
        model(**inputs_for(model, prompts, with_media=False))
    assert found.refusals == found.notes == []
    assert len(found.calls) == len(real) > 0
    for call, (query, key, value, spans, options) in zip(found.calls, real, strict=True):
        assert call.scores == (*query[:3], key[2])
        assert (call.num_kv_heads, call.head_dim, call.value_dim) == (key[1], query[3], value[3])
        assert torch.equal(call.spans.to_dense(), spans.to_dense())
        assert call.softcap == options["softcap"]
        assert call.has_sinks == (options["sinks"] is not None)
        assert call.bias == (None if options["bias"] is None else tuple(options["bias"].shape))


def test_layers_of_a_kind_are_one_row():
    rows = explain("gemma2", [5000, 100], architecture="torch").rows
    assert [row.layers for row in rows] == ["layers.{0,2,...,24}.self_attn", "layers.{1,3,...,25}.self_attn"]
    assert [row.count for row in rows] == [13, 13]
    assert rows[0].names == tuple(f"layers.{index}.self_attn" for index in range(0, 26, 2))
    assert [row.mask.name for row in rows] == ["causal, window 4096, padding", "causal, padding"]
    assert [row.call.softcap for row in rows] == [50.0, 50.0]
    assert {row.path for row in rows} == {"torch, written out"}


@pytest.mark.parametrize(
    ("model_type", "layers", "path", "mask"),
    [
        ("bert", "encoder.layer.{0-11}.attention.self", "torch, fused", "all keys, padding"),
        ("vit", "layers.{0-11}.attention", "torch, fused", "all keys"),
        ("whisper", "decoder.layers.{0-3}.encoder_attn", "torch, fused", "all keys"),
        ("t5", "decoder.block.{0-5}.layer.1.EncDecAttention", "torch, fused, bias", "all keys, padding"),
        ("siglip", "vision_model.encoder.layers.{0-11}.self_attn", "torch, fused", "all keys"),
        ("qwen2_5_vl", "visual.blocks.{7,15,...,31}.attn", "torch, fused", "all keys"),
        ("gemma3", "vision_tower.encoder.layers.{0-11}.self_attn", "torch, fused", "all keys"),
    ],
)
def test_encoders_vision_towers_and_cross_attention_are_reached(model_type, layers, path, mask):
    report = explain(model_type, [40, 20], architecture="torch")
    (row,) = [row for row in report.rows if row.layers == layers]
    assert (row.path, row.mask.name) == (path, mask)
    assert report.refusals == []


def test_sizes_are_those_of_the_model():
    (row,) = explain("deepseek_v3", [30]).rows
    assert (row.count, row.call.scores) == (61, (1, 128, 30, 30))
    assert (row.call.num_kv_heads, row.call.head_dim, row.call.value_dim) == (128, 192, 128)


def test_sinks_and_chunks_are_named():
    rows = explain("gpt_oss", [200]).rows
    assert [(row.mask.name, row.call.has_sinks) for row in rows] == [("causal, window 128", True), ("causal", True)]
    assert [row.mask.name for row in explain("llama4_text", [9000]).rows] == ["causal, chunks of 8192", "causal"]


def test_packed_prompts_see_their_own_document():
    report = explain("llama", [30, 10], layout="packed")
    (mask,) = report.masks
    assert mask.name == "causal, own document"
    expected = Spans.causal(40) & Spans.packed_lengths([30, 10])
    assert torch.equal(mask.call.spans.to_dense(), expected.to_dense())


def test_a_checkpoint_with_code_of_its_own(checkpoint_dir):
    with pytest.raises(UsageError, match=r"Python files of its own \(auto_map\); pass --trust-remote-code"):
        explain(str(checkpoint_dir))
    report = explain(str(checkpoint_dir / "config.json"), [200, 50], trust_remote_code=True)
    assert report.model == "ReferenceModel"
    assert [row.mask.name for row in report.rows] == ["causal, window 128, padding", "causal, padding"]


def test_a_configuration_of_another_name_finds_the_code_beside_it(checkpoint_dir, tmp_path):
    shutil.copytree(checkpoint_dir, tmp_path, dirs_exist_ok=True)
    other = (tmp_path / "config.json").rename(tmp_path / "other.json")
    with pytest.raises(UsageError, match="pass --trust-remote-code"):
        explain(str(other))
    report = explain(str(other), [200, 50], trust_remote_code=True)
    expected = explain(str(checkpoint_dir), [200, 50], trust_remote_code=True)
    assert report.model == expected.model
    assert [row.mask.name for row in report.rows] == [row.mask.name for row in expected.rows]


def test_layers_that_call_the_interface_in_brackets_are_found(checkpoint_dir, tmp_path):
    """As code on the Hub does; what is not found would be left out in silence."""
    shutil.copytree(checkpoint_dir, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "modeling_reference.py"
    code = re.sub(
        r"ALL_ATTENTION_FUNCTIONS\.get_interface\(\s*(self\.config\._attn_implementation), [^)]*\)",
        r"ALL_ATTENTION_FUNCTIONS[\1]",
        file.read_text(),
    )
    assert ".get_interface(" not in code
    file.write_text(code)
    found, expected = (explain(str(folder), [200], trust_remote_code=True) for folder in (tmp_path, checkpoint_dir))
    assert [row.layers for row in found.rows] == [row.layers for row in expected.rows]


def test_nothing_stays_registered():
    before = set(AttentionInterface()), set(AttentionMaskInterface()), set(support.registered_names)
    operator = attention_plugin.attention.attention
    explain("falcon", [8])
    explain("llama", [8])
    assert (set(AttentionInterface()), set(AttentionMaskInterface()), set(support.registered_names)) == before
    assert NAME not in AttentionInterface()
    assert attention_plugin.attention.attention is operator


def test_a_million_tokens_take_little_memory(tmp_path):
    # A boolean of each score would take 10^12 bytes.
    source = config_file(tmp_path, "gpt_oss", sliding_window=1000)
    report = explain(source, [1_000_000, 3])
    window, causal = report.rows
    assert window.call.scores[2:] == (1_000_000, 1_000_000)
    assert window.work.visible == 1000 * 1_000_000 - 1000 * 999 // 2 + 6
    assert causal.work.visible == 1_000_000 * 1_000_001 // 2 + 6
    assert len(picture(report.masks[0], 0)) == 24


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("model_type", ["falcon", "bloom"])
def test_a_model_with_attention_of_its_own_is_refused_in_the_words_of_loading_it(model_type, capsys):
    with pytest.raises(ValueError, match="computes attention in its own code") as refused, torch.device("meta"):
        AutoModel.from_config(CONFIG_MAPPING[model_type](), attn_implementation="my_triton")
    report = explain(model_type, [20, 10])
    assert [(part.part, part.reason) for part in report.refusals] == [("", str(refused.value))]
    assert not report.serves
    assert main(["explain", model_type]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "refused: the whole model: my_triton attention: " in printed
    assert "Nothing of this model can be served." in printed


def test_a_refused_part_leaves_the_others():
    report = explain("deepseek_vl_hybrid", [20, 10])
    (refusal,) = report.refusals
    assert refusal.part.startswith("high_res_vision_model")
    assert "computes attention in its own code (modeling_sam.py does not leave it to" in refusal.reason
    assert report.serves
    assert not any(name.startswith(refusal.part) for row in report.rows for name in row.names)


def test_a_keyword_that_is_refused_is_refused_for_its_layer(tmp_path, monkeypatch, capsys):
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(
        modeling_llama.LlamaAttention,
        "forward",
        lambda self, *args, **kwargs: forward(self, *args, **kwargs, head_mask=3),
    )
    assert main(["explain", config_file(tmp_path, "llama"), "--prompt-lengths", "9"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "layers.{0-1}.self_attn: my_triton attention: `head_mask`=3 is refused: masks of heads are not served"
        in printed
    )


def test_heads_that_are_too_wide_are_refused(tmp_path):
    (row,) = explain(config_file(tmp_path, "llama", head_dim=600), [9]).rows
    assert row.path == "refused"
    assert row.call.refused.startswith("attention: the head dim of `query` must be 1 to 576, got 600")


# ---------------------------------------------------------------------- how much is computed


MASKS = {
    "causal": Spans.causal(700),
    "window": Spans.sliding(700, left=99),
    "padded": Spans.causal(300) & Spans.padded(torch.arange(300)[None] >= torch.tensor([[0], [130], [300]]), 300),
    "documents": Spans.causal(600) & Spans.packed_lengths([100, 350, 150]),
    "cross": Spans.full(40, 500),
    "gap": Spans.causal(200) & Spans.padded((torch.arange(200) % 90 > 20)[None], 200),
}
TARGETS = {
    "torch": Target(None, torch.float32),
    "sm_90": Target("sm_90", torch.bfloat16),
    "sm_86": Target("sm_86", torch.float32),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("where", TARGETS)
def test_work_is_what_a_dense_mask_says(name, where):
    spans, target = MASKS[name], TARGETS[where]
    call = call_of(spans)
    dense, work = spans.to_dense(), work_of(call, target)
    assert work.dense == dense.numel()
    assert work.visible == int(dense.sum())
    assert work.visible <= work.computed <= work.dense
    raster = np.stack([rasterize(Mask("A", name, call), element, target) for element in range(spans.batch)])
    rows = (np.arange(raster.shape[1]) + 0.5) * spans.query_len / raster.shape[1]
    keys = (np.arange(raster.shape[2]) + 0.5) * spans.key_len / raster.shape[2]
    seen = dense.numpy()[:, rows.astype(int)][:, :, keys.astype(int)]
    assert not (seen & (raster == SKIPPED)).any(), "what rows see is computed"
    assert not (~seen & (raster == WHOLE)).any(), "and only what they see is computed without a mask"
    assert abs((raster != SKIPPED).mean() - work.computed / work.dense) < 0.02


def test_tiles_are_counted_as_the_kernel_walks_them():
    # Every tile that holds a key of one of its rows.
    spans = MASKS["window"]
    config = configs.forward_config("sm_86", torch.float32, 64, 64, 700, has_tiles=False, has_dropout=False)
    rows, keys = -(-700 // config.block_m), -(-700 // config.block_n)
    padded = torch.zeros(rows * config.block_m, keys * config.block_n, dtype=torch.bool)
    padded[:700, :700] = spans.to_dense()[0]
    tiles = padded.view(rows, config.block_m, keys, config.block_n).any(3).any(1)
    computed = tiles.repeat_interleave(config.block_m, 0).repeat_interleave(config.block_n, 1)[:700, :700]
    assert work_of(call_of(spans), TARGETS["sm_86"]).computed == int(computed.sum())


def test_what_a_dense_mask_hides_is_not_seen():
    dense = torch.rand(2, 1, 50, 60, generator=torch.Generator().manual_seed(0)) > 0.5
    call = Call(torch.nn.Module(), (2, 1, 50, 60), 1, 64, 64, "boolean mask", Spans.full(50, 60), dense)
    work = work_of(call, TARGETS["torch"])
    assert (work.dense, work.visible, work.computed) == (6000, int(dense.sum()), 6000)
    hidden = dense[1, 0, :3, :5].tolist()  # 50 rows in 24 lines: about two rows and a key to a character
    lines = picture(Mask("A", "boolean mask", call), 1)
    assert (len(lines), {len(line) for line in lines}) == (24, {48})
    assert (lines[0][0] == ".") == (not any(row[0] or row[1] for row in hidden))


# ---------------------------------------------------------------------- values without weights


def test_values_that_come_from_inputs_alone_are_kept():
    weight, ids = torch.empty(7, 3, device="meta"), torch.tensor([[1, 2, 0]])
    with Weightless() as mode:
        hidden = torch.nn.functional.embedding(ids, weight)
        positions = torch.arange(3, device=hidden.device)
        moved = (ids != 0).to(hidden.device)
        chosen = hidden[moved]
    assert hidden.is_meta and hidden.shape == (1, 3, 3)
    assert positions.tolist() == [0, 1, 2]
    assert moved.tolist() == [[True, True, False]]
    assert chosen.shape == (2, 3)
    assert mode.guesses == 0


def test_an_embedding_refuses_rows_that_it_does_not_have():
    weight = torch.empty(7, 3, device="meta")
    with Weightless() as mode:
        positions = torch.arange(8, device=weight.device)
        assert torch.nn.functional.embedding(positions[:7], weight).shape == (7, 3)
        assert torch.nn.functional.embedding(positions[:0], weight).shape == (0, 3)
        with pytest.raises(IndexError, match="an embedding of 7 rows is asked for row 7"):
            torch.nn.functional.embedding(positions, weight)
    assert mode.guesses == 0


@pytest.mark.parametrize(
    ("model", "lengths", "layout"),
    [
        ("gpt2", [1024], "left"),
        ("gpt2", [600, 600], "packed"),  # positions begin again
        ("llama", [5000], "left"),  # 2,048 in its configuration, rotary
    ],
)
def test_positions_that_a_model_has_are_not_refused(model, lengths, layout):
    assert explain(model, lengths, layout=layout).serves


@pytest.mark.parametrize("model", ["idefics3", "decision_transformer"])
def test_padding_that_no_vocabulary_has_is_no_reason_to_refuse(model):
    assert not any("rows" in note for note in explain(model, [40, 20]).notes)


def test_what_hangs_on_weights_is_guessed_and_counted():
    weight = torch.empty(5, device="meta")
    with Weightless() as mode:
        assert not (weight > 0).any()
        assert weight.sum().item() == 0
        assert weight.nonzero().shape == (0, 1)
    assert mode.guesses == 3


def test_a_gpu_that_the_kernels_do_not_run_on_is_said(monkeypatch):
    from attention_plugin.explain import layers

    reason = "attention: the GPU 'old' (sm_70) is not supported by the Triton kernels, which run on sm_80"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(layers, "unsupported_device", lambda device: reason)
    with pytest.raises(UsageError, match=r"\(sm_70\) is not supported .*; --architecture NAME shows"):
        layers.Target.chosen(None)
    assert layers.Target.chosen(None, "sm_90").architecture == "sm_90"


def test_large_results_lose_their_values_instead_of_filling_memory():
    with Weightless():
        row = torch.arange(1_000_000, device="meta")
        scores = row[:, None] - row[None]
    assert not row.is_meta
    assert scores.is_meta and scores.shape == (1_000_000, 1_000_000)


# ---------------------------------------------------------------------- the command


def test_the_table_and_the_pictures(tmp_path, capsys):
    source = config_file(tmp_path, "gemma2")
    assert main(["explain", source, "--prompt-lengths", "20", "8", "--architecture", "torch"]) == 0
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    assert "prompts of 20, 8 tokens, padded on the left; torch path, float32; no weights are loaded" in words
    assert "layers.0.self_attn 1 4 / 2 8 torch, written out A: causal, window 5, padding; " in words
    assert "B: causal, padding, 20 queries x 20 keys, the first 2 of the batch" in words
    assert "\n#" + "." * 19 + "   " + "." * 20 + "\n" in printed
    assert "\n" + "#" * 20 + "   " + "." * 12 + "#" * 8 + "\n" in printed
    assert "Of the scores that dense attention computes," in words


def test_json_holds_all_of_it(tmp_path, capsys):
    arguments = ["explain", config_file(tmp_path, "gpt_oss"), "--prompt-lengths", "20", "8", "--padding-side", "right"]
    assert main([*arguments, "--architecture", "sm_90", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["prompt_lengths"], report["layout"]) == ("GptOssModel", [20, 8], "right")
    assert report["target"] == {"architecture": "sm_90", "dtype": "bfloat16"}
    window, causal = report["layers"]
    assert (window["names"], window["mask"], window["sinks"]) == (
        ["layers.0.self_attn"],
        "causal, window 5, padding",
        True,
    )
    assert causal["scores_per_head"]["visible"] == 20 * 21 // 2 + 8 * 9 // 2 + 12 * 8
    assert window["path"] == "Triton 128 x 64"
    assert report["masks"][1]["pictures"][1][-1] == "#" * 8 + "." * 12
    assert report["refused"] == report["not_run"] == report["notes"] == []


def test_the_plot_is_drawn_in_its_colours(tmp_path):
    plot = tmp_path / "masks.png"
    source = config_file(tmp_path, "gpt_oss")
    lengths = ["--prompt-lengths", "600", "200"]
    assert main(["explain", source, *lengths, "--architecture", "torch", "--plot", str(plot)]) == 0
    pixels = (matplotlib.image.imread(plot)[..., :3] * 255).round().astype(int)
    height, width, _ = pixels.shape
    assert 800 < height < 1600 and 800 < width < 1600  # two masks of two prompts
    for colour in COLOURS:
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(-1) <= 1).mean() > 0.002, colour


REFUSED = {
    "no lengths": (["llama", "--prompt-lengths"], "--prompt-lengths is empty; give numbers of tokens"),
    "length 0": (["llama", "--prompt-lengths", "5", "0"], "--prompt-lengths must be at least 1, got 0"),
    "negative": (["llama", "--prompt-lengths", "-4"], "--prompt-lengths must be at least 1, got -4"),
    "huge": (["llama", "--prompt-lengths", "99999999999"], "make a batch of 99,999,999,999 tokens, padding included"),
    "no number": (["llama", "--prompt-lengths", "ten"], "argument --prompt-lengths: invalid int value: 'ten'"),
    "nothing": ([""], f"MODEL_OR_CONFIG is empty; {INSTEAD}"),
    "no path": (["./nowhere"], f"there is no file or folder './nowhere'; {INSTEAD}"),
    "empty folder": (["FOLDER"], f"has no config.json; {INSTEAD}"),
    "no JSON": (["FOLDER/text.json"], "is no JSON file (Expecting value"),
    "no configuration": (["FOLDER/list.json"], f"is no model configuration: it has no 'model_type'; {INSTEAD}"),
    "unknown type": (["FOLDER/unknown.json"], "has no model type 'llamma'; did you mean 'llama'?"),
    "not valid": (["FOLDER/invalid.json"], "transformers cannot read"),
    "cannot be built": (["autoformer"], "transformers cannot build this model: The `prediction_length` config"),
    "no layers": (["FOLDER/empty.json"], "LlamaModel has no attention layers, so there is nothing to explain"),
    "no attention": (["fnet"], "FNetModel has no attention layers, so there is nothing to explain"),
    "too long": (["bert", "--prompt-lengths", "600"], "it has 512 positions, and the prompts take 600"),
    "beyond positions": (["gpt2", "--prompt-lengths", "1025"], "it has 1024 positions, and the prompts take 1025"),
    "offset positions": (["opt", "--prompt-lengths", "5000", "7"], "it has 2048 positions, and the prompts take 5000"),
    "counted positions": (["roberta", "--prompt-lengths", "5000"], "it has 512 positions, and the prompts take 5000"),
    "no positions": (["t5", "--packed"], "--packed: this model takes no `position_ids`"),
    "no architecture": (["llama", "--architecture", "sm_1"], "--architecture must be one of torch, sm_80,"),
    "plot": (["llama", "--plot", "masks.jpg"], "--plot must be a file ending in .png in a folder that exists"),
    "plot of nothing": (["falcon", "--plot", "FOLDER/a.png"], "--plot: there is no mask to draw, since nothing of"),
}


@pytest.mark.parametrize(
    ("lengths", "layout", "words"),
    [
        ([5, 9], "middle", "one of left, right, packed, got 'middle'"),
        ([5.5, 9], "left", r"whole numbers, got \[5.5, 9\]"),
    ],
)
def test_prompts_that_are_none(lengths, layout, words):
    with pytest.raises(UsageError, match=words):
        explain("llama", lengths, layout=layout)


def test_a_folder_may_be_a_path(tmp_path):
    AutoConfig.for_model("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    assert explain(tmp_path).serves


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupted(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("attention_plugin.explain.explain", interrupted)
    assert main(["explain", "llama"]) == 130
    assert capsys.readouterr().err == "my-triton explain: interrupted\n"


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_explained_is_said_in_one_line(case, tmp_path, capsys):
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "unknown.json").write_text('{"model_type": "llamma"}')
    (tmp_path / "invalid.json").write_text('{"model_type": "llama", "num_attention_heads": "many"}')
    (tmp_path / "empty.json").write_text('{"model_type": "llama", "num_hidden_layers": 0}')
    arguments, words = REFUSED[case]
    try:
        status = main(["explain", *(argument.replace("FOLDER", str(tmp_path)) for argument in arguments)])
    except SystemExit as leaving:  # what argparse finds
        status = leaving.code
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers]")]
    assert status == 2
    assert len(errors) == 1
    assert errors[0].startswith("my-triton explain: ")
    assert words in errors[0]


def test_a_hub_id_without_network_says_where_it_was_looked_for(tmp_path):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}",
    }
    command = [sys.executable, "-m", "attention_plugin", "explain", "someone/lama"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2
    assert run.stdout == ""
    assert "'someone/lama' was looked for as a folder, a file, one of" in run.stderr
    assert f"in the hub's cache (HF_HUB_OFFLINE is set), and not found; {INSTEAD}" in run.stderr


def test_what_is_in_the_hubs_cache_is_read_without_asking_the_hub(tmp_path):
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    config_file(snapshot, "llama")
    with socket.create_server(("127.0.0.1", 0)) as hub:
        hub.settimeout(0)
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}",
        }
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-m", "attention_plugin", "explain", "someone/small", "--json"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        assert "llama" in run.stdout
        assert "'someone/small' is shown as it lies in the hub's cache" in run.stderr
        with pytest.raises(BlockingIOError):  # nobody has called
            hub.accept()


@pytest.mark.parametrize(
    ("name", "hint"),
    [("lama", " (did you mean 'llama'?)"), ("roberta-base", " (did you mean 'roberta'?)"), ("nonexistmodel", "")],
)
def test_a_look_up_on_the_hub_is_one_line(name, hint, monkeypatch, caplog, capsys):
    loggers = [logging.getLogger(each) for each in ("huggingface_hub", "urllib3")]
    levels = [logger.level for logger in loggers]

    def retries(source, **options):
        for module in ("huggingface_hub.utils._http", "urllib3.connectionpool"):
            logging.getLogger(module).warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no network")

    monkeypatch.setattr(AutoConfig, "from_pretrained", retries)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert main(["explain", name]) == 2
    error = capsys.readouterr().err
    assert f"in the hub's cache and on the hub, and not found{hint}; {INSTEAD}" in error and error.count("\n") == 1
    assert not caplog.records and [logger.level for logger in loggers] == levels


@pytest.mark.parametrize(
    ("package", "options", "purpose"),
    [("rich", [], "explain without --json"), ("matplotlib", ["--plot", "FOLDER/a.png", "--json"], "--plot")],
)
def test_a_missing_library_is_named_with_the_way_to_get_it(package, options, purpose, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)  # what makes an import fail
    arguments = [option.replace("FOLDER", str(tmp_path)) for option in options]
    assert main(["explain", "llama", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"my-triton explain: {purpose} needs {package}, which cannot be imported" in error
    assert f"pip install {package}, or this package with its extra `cli`" in error
