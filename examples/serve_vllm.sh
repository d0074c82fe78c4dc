#!/usr/bin/env bash
# Serve a model with vLLM and this attention, on a GPU or a CPU. vLLM must be installed, and this package beside it.
#
#   examples/serve_vllm.sh checkpoints/reference        # or any other model; further arguments go to vLLM
#
# Then, in another terminal:
#
#   curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '
#     {"model": "served", "prompt": "Return the", "max_tokens": 40, "temperature": 0}'
set -euo pipefail
model=${1:?"usage: $0 MODEL [vLLM's arguments]"}
shift

# `vllm serve` is the same; vLLM's CPU build has it under this name alone.
exec python -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name served \
    --host 127.0.0.1 --port "${PORT:-8000}" --model-impl transformers --trust-remote-code \
    --attention-backend MY_TRITON "$@"
