# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' section serve, with a real engine."""

from pathlib import Path

import pytest
import torch

from benchmarks import serve

from launch import ENGINES

LOAD = serve.Load(requests=4, longest=60, new_tokens=6, samples=1)


@pytest.mark.engines
@pytest.mark.parametrize("name", list(ENGINES))
def test_an_engine_with_our_attention_is_timed(name: str) -> None:
    folder = Path(__file__).resolve().parents[2] / "checkpoints" / "reference"
    prompts = serve.prompts_of(folder, LOAD)
    cpu = torch.device("cpu")
    truth = serve.build_truth(folder, prompts, LOAD.new_tokens, torch.float32, cpu)
    result = serve.run_engine(name, ENGINES[name].python, "my_triton", folder, LOAD, prompts, truth, torch.float32, cpu)
    assert result.measured and result.details["tokens_equal_to_eager"] == 24, result.reason
