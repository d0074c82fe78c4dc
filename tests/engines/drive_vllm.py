# SPDX-License-Identifier: Apache-2.0
"""Run inside vLLM's environment: start an engine, answer rounds of prompts, write the tokens down.

    python drive_vllm.py JOB.json RESULT.json

`launch.py` says what a job and a result hold.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

# Linux lends AMX's registers to a process that asks. vLLM 0.32's own attention uses them in bfloat16 without asking,
# and dies of an illegal instruction where nothing else, such as a large product of oneDNN's, has asked before it.
torch.cpu._init_amx()


def main() -> None:
    """Answer one job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    engine = LLM(**job["engine"])
    result = {"start_seconds": time.monotonic() - started, "rounds": []}
    for work in job["rounds"]:
        sampling = SamplingParams(temperature=0.0, max_tokens=work["max_tokens"], ignore_eos=True)
        outputs = engine.generate([prompt_of(prompt) for prompt in work["prompts"]], sampling, use_tqdm=False)
        result["rounds"].append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "cached": [output.num_cached_tokens or 0 for output in outputs],
            }
        )
    Path(sys.argv[2]).write_text(json.dumps(result))
    os._exit(0)  # whoever started this ends its workers, which spares the seconds that a polite end takes


def prompt_of(prompt):
    """A text, or a text with images and videos, as vLLM takes it. A video is a list of frames."""
    if isinstance(prompt, str):
        return prompt
    import numpy as np
    from PIL import Image

    def read(path):
        return Image.open(path).convert("RGB")

    data = {"image": [read(path) for path in prompt["images"]]} if prompt["images"] else {}
    if prompt["videos"]:
        data["video"] = [np.stack([np.asarray(read(path)) for path in frames]) for frames in prompt["videos"]]
    return {"prompt": prompt["text"], "multi_modal_data": data} if data else {"prompt": prompt["text"]}


if __name__ == "__main__":  # worker processes import this file, and ask for AMX as it does
    main()
