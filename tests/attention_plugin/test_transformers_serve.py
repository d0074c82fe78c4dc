# SPDX-License-Identifier: Apache-2.0
"""The server of `transformers serve` itself, over HTTP."""

import json
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from attention_plugin.engines import batched_attention, continuous_batching, flash_gates

if Version(transformers.__version__) < Version(flash_gates.MINIMUM_VERSION):
    pytest.skip("continuous batching is served from a later transformers on", allow_module_level=True)

OPTIONS = {"device": "cpu", "cb_num_blocks": 64, "cb_max_batch_tokens": 64, "cb_use_cuda_graph": False}


@pytest.fixture(scope="module")
def folder(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of transformers' own code, as the server loads no other, with a tokenizer."""
    path = tmp_path_factory.mktemp("served")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir, trust_remote_code=True)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_a_request_is_answered_as_eager_does(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    calls = []
    attend = batched_attention._paged_forward
    monkeypatch.setattr(batched_attention, "_paged_forward", lambda *args: calls.append(1) or attend(*args))
    messages, new_tokens = [{"role": "user", "content": "Return the names of all files"}], 8
    body = {"model": str(folder), "messages": messages, "max_tokens": new_tokens, "temperature": 0}
    server = continuous_batching.serve(str(folder), host="127.0.0.1", port=port, **OPTIONS)
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"]
    finally:
        server.kill_server()
    assert len(calls) == 2 * new_tokens  # each layer, for the prompt and for every token after the first
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs: Any = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    eager = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = eager.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the server's way to end
def test_a_port_in_use_is_an_error(folder: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=r"ended before it listened.*pass another `port`"):
            continuous_batching.serve(str(folder), host="127.0.0.1", port=port, **OPTIONS)
