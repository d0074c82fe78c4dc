# SPDX-License-Identifier: Apache-2.0
"""What engines are compared with: transformers itself."""

from __future__ import annotations

from collections.abc import Sequence
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
        return self._generate(prompt, count)

    def text(self, prompt: str, count: int) -> str:
        """The same, decoded as servers decode it."""
        return self.tokenizer.decode(self.tokens(prompt, count), skip_special_tokens=True)

    def scores(self, prompt: str, tokens: list[int]) -> torch.Tensor:
        """Scores of what might have come in the place of each new token, float32 `[len(tokens), vocabulary]`."""
        inputs = self.tokenizer(prompt, return_tensors="pt").input_ids
        whole = torch.cat([inputs, torch.tensor([tokens])], dim=1)
        with torch.no_grad():
            return self.model(whole).logits[0, inputs.shape[1] - 1 : -1].float()

    def _generate(self, prompt: str, count: int) -> list[int]:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        answer = self.model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None)
        return answer[0, inputs.input_ids.shape[1] :].tolist()


def decided_lengths(folder: Path, prompts: Sequence[str], count: int, dtype: torch.dtype) -> list[int]:
    """How many tokens of the answers to some texts come before the first that rounding to `dtype` may decide.

    Two right implementations each differ from the scores of float32 by about as much as transformers does in this
    dtype. Where the second best is nearer than both together at their worst, over all texts, either may win.
    """
    exact, rounded = Greedy(folder), Greedy(folder, dtype)
    margins, errors = [], []
    for prompt in prompts:
        tokens = rounded.tokens(prompt, count)
        scores, truth = rounded.scores(prompt, tokens), exact.scores(prompt, tokens)
        best = scores.topk(5, dim=-1)
        margins.append(best.values[:, 0] - best.values[:, 1])
        errors.append((best.values - truth.gather(-1, best.indices)).abs().amax())
    toss_up = 2 * max(errors)
    return [int((margin > toss_up).cumprod(0).sum()) for margin in margins]
