# SPDX-License-Identifier: Apache-2.0
"""What engines are compared with: transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Greedy:
    """What transformers itself answers, greedily and past the end token, in the dtype of its weights."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        """Of a checkpoint directory; `options` as for `from_pretrained`."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        options = {"trust_remote_code": True, "dtype": dtype, **options}
        self.model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()

    def tokens(self, prompt: str, count: int) -> list[int]:
        """New tokens of one text."""
        return self._generate(prompt, count)[0]

    def text(self, prompt: str, count: int) -> str:
        """The same, decoded as servers decode it."""
        return self.tokenizer.decode(self.tokens(prompt, count), skip_special_tokens=True)

    def margin(self, prompt: str, count: int) -> float:
        """The least distance, over the new tokens, between the best score and the second best."""
        return self._generate(prompt, count)[1]

    def _generate(self, prompt: str, count: int) -> tuple[list[int], float]:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        answer = self.model.generate(
            **inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        best = torch.stack(answer.logits).float().topk(2, dim=-1).values  # [count, 1, 2]
        margin = float((best[..., 0] - best[..., 1]).min())
        return answer.sequences[0, inputs.input_ids.shape[1] :].tolist(), margin
