# SPDX-License-Identifier: Apache-2.0
"""Run inside SGLang's environment: start an engine, answer rounds of prompts, write the tokens down.

    python drive_sglang.py JOB.json RESULT.json

`launch.py` says what a job and a result hold.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Answer one job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    from sglang import Engine

    started = time.monotonic()
    engine = Engine(**job["engine"])
    result = {"start_seconds": time.monotonic() - started, "rounds": []}
    for work in job["rounds"]:
        sampling = {"temperature": 0.0, "max_new_tokens": work["max_tokens"], "ignore_eos": True}
        outputs = engine.generate(sampling_params=sampling, **prompts_of(work["prompts"]))
        result["rounds"].append(
            {
                "tokens": [output["output_ids"] for output in outputs],
                "cached": [output["meta_info"]["cached_tokens"] for output in outputs],
            }
        )
    Path(sys.argv[2]).write_text(json.dumps(result))
    os._exit(0)  # whoever started this ends its workers, which spares the seconds that a polite end takes


def prompts_of(prompts):
    """Texts, or texts with images and videos, as SGLang takes them. A video is a list of frames."""
    if isinstance(prompts[0], str):
        return {"prompt": prompts}
    import numpy as np
    from PIL import Image

    def read(frames):
        return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in frames])

    return {
        "prompt": [prompt["text"] for prompt in prompts],
        "image_data": [prompt["images"] for prompt in prompts],
        "video_data": [[read(frames) for frames in prompt["videos"]] or None for prompt in prompts],
    }


if __name__ == "__main__":  # worker processes import this file
    main()
